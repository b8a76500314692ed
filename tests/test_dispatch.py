"""Choosing a backend: support with reasons, preference, and the user's choice."""

import subprocess
import sys
import warnings

import pytest
import torch

import fastvit
from fastvit import dispatch
from fastvit.dispatch import Backend, Op, Unsupported, recording, use_backend


@pytest.fixture
def op():
    """An op whose preferred backend takes only positive tensors."""
    refuses = lambda x: [] if (x > 0).all() else ["x has a value that is not positive"]  # noqa: E731
    made = Op("made_up", Backend("cpp", lambda x: x + 1, refuses, ("cpu",)), Backend("torch", lambda x: x + 2))
    yield made
    del dispatch.OPS["made_up"]


def test_auto_takes_the_first_backend_without_reasons(op):
    assert op(torch.ones(1)).item() == 2
    with pytest.warns(UserWarning, match="made_up: not using 'cpp': x has a value that is not positive"):
        assert op(-torch.ones(1)).item() == 1


def test_auto_warns_once_for_a_reason(op):
    dispatch._warned.clear()
    with pytest.warns(UserWarning, match="not positive"):
        op(-torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(-torch.ones(1))


def test_a_chosen_backend_runs_or_raises_with_every_reason(op):
    with use_backend("cpp"):
        assert op(torch.ones(1)).item() == 2
        with pytest.raises(Unsupported, match="'cpp' cannot run this call: x has a value") as error:
            op(-torch.ones(1))
    assert error.value.reasons == ["x has a value that is not positive"]


def test_a_backend_that_the_op_lacks_is_refused(op):
    with use_backend("triton"), pytest.raises(Unsupported, match="made_up has only cpp, torch"):
        op(torch.ones(1))


def test_choices_nest_and_end(op):
    with use_backend(made_up="torch"):
        assert op(torch.ones(1)).item() == 3
        with use_backend("auto"):
            assert op(torch.ones(1)).item() == 2
        assert op(torch.ones(1)).item() == 3
    assert op(torch.ones(1)).item() == 2


def test_a_choice_ends_when_its_block_raises(op):
    with pytest.raises(RuntimeError, match="inside"), use_backend("torch"):
        raise RuntimeError("inside")
    assert op(torch.ones(1)).item() == 2


def test_explain_lists_the_reasons_of_every_backend(op):
    assert op.explain(-torch.ones(1)) == {"cpp": ["x has a value that is not positive"], "torch": []}


def test_explaining_keeps_the_reasons_of_a_call(op):
    with dispatch.explaining() as explained:
        op(torch.ones(1))
    op(-torch.ones(1))
    assert explained == {"made_up": {"cpp": [], "torch": []}}


def test_recording_names_what_ran(op):
    with recording() as calls:
        op(torch.ones(1))
    assert calls == [("made_up", "cpp")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((("tritton",), {}), "'tritton' is no backend"), (((), {"atention": "torch"}), "'atention' is no op")],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        use_backend(*arguments[0], **arguments[1])
    assert not dispatch._choice


@pytest.mark.parametrize(
    ("value", "expected"),
    [("torch", {"*": "torch"}), ("attention=torch,layernorm_mlp=reference", None), ("torch,reference", "error")],
)
def test_environment(value, expected):
    code = "import fastvit.dispatch as d; print(d._choice)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"FASTVIT_BACKEND": value, "PATH": ""}, capture_output=True, text=True
    )
    if expected == "error":
        assert run.returncode == 1
        assert "names more than one default backend" in run.stderr
    else:
        expected = expected or {"attention": "torch", "layernorm_mlp": "reference"}
        assert run.stdout.strip() == str(expected), run.stderr


def test_every_op_has_a_reference_and_ends_with_plain_pytorch():
    for name, known in dispatch.OPS.items():
        assert callable(getattr(fastvit.reference, name))
        assert list(known.backends)[-2:] == ["torch", "reference"]
