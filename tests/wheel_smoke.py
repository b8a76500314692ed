"""What an installed wheel must do with nothing around it: no checkout, no pytest, no numpy (`make wheel-test`)."""

import functools
import sys
from pathlib import Path

import torch

import fastvit
from fastvit import _extension, dispatch, ops
from fastvit.testing import VIT_SHAPES, assert_op_as_accurate, make_inputs

SITE = Path(sys.prefix).resolve()


def check_location() -> None:
    for module in (fastvit, _extension.cpp()):
        assert module is not None, _extension.why_not_cpp()
        assert Path(module.__file__).resolve().is_relative_to(SITE), f"{module.__file__} is not in {SITE}"


def check_kernels_are_packaged() -> None:
    import fastvit.kernels

    folder = Path(next(iter(fastvit.kernels.__path__)))
    assert folder.resolve().is_relative_to(SITE), folder
    assert {"attention.py", "patch_embed.py"} <= {path.name for path in folder.iterdir()}
    assert (folder.parent / "py.typed").exists(), "type checkers take the package for untyped"


def check_op(name: str, backend: str) -> None:
    with fastvit.use_backend(backend):
        inputs = make_inputs(name, VIT_SHAPES["tiny"], batch=1, dtype=torch.float32)
        assert_op_as_accurate(name, getattr(ops, name), inputs)


def main() -> int:
    checks = {check.__name__: check for check in (check_location, check_kernels_are_packaged)}
    for name, op in dispatch.OPS.items():
        for backend in {"cpp", "torch"} & set(op.backends):
            checks[f"{name}[{backend}]"] = functools.partial(check_op, name, backend)
    failed = 0
    for label, check in checks.items():
        try:
            check()
        except Exception as error:  # every check reports, then the exit code says it
            failed += 1
            print(f"FAILED {label}: {type(error).__name__}: {error}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
