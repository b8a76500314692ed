"""The CPU ops and threads: any number, changed between calls, several callers at once; always the same bits.

ThreadSanitizer runs this file too (.ci/sanitize), so every op's forward and backward is here once with several threads.
"""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastvit import ops
from fastvit.reference import HeadNorm, Rope
from fastvit.testing import Shape, make_inputs, run_with_gradients

C = pytest.importorskip("fastvit._C", reason="the C++ extension is not built")

# Several row blocks, panels and row groups of each op; no size is a multiple of another
SHAPE = Shape(embed_dim=80, num_heads=2, hidden_dim=200, tokens=131, patch_size=8, image_size=40)
OPS = (
    *("patch_embed", "layernorm_linear", "attention", "attention_packed", "attention_varlen"),
    *("linear_residual", "layernorm_mlp"),
)


def run(op: str, inputs: dict) -> dict[str, torch.Tensor]:
    return run_with_gradients(getattr(ops, op), inputs)


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def in_threads(*works: Callable[[], None]) -> None:
    """Run each in a Python thread of its own, at once; raise what the first of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture(autouse=True)
def _threads():
    """Four threads, more than many machines have cores, and no pack of an earlier test."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    C.clear_pack_cache()
    yield
    torch.set_num_threads(before)
    C.clear_pack_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_number_of_threads_changed_between_calls(op, dtype):
    inputs = make_inputs(op, SHAPE, 3, dtype)
    expected = run(op, inputs)
    for threads in (1, 7, 2):
        torch.set_num_threads(threads)
        assert C.cpu_capabilities()["threads"] == threads
        assert_same_bits(run(op, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normalised_and_rotated_heads(dtype):
    """The gradients of the norms' weights are sums over all heads."""
    vectors = {name: (torch.rand(40) + 0.5).to(dtype).requires_grad_() for name in ("weight", "bias")}
    inputs = make_inputs("attention_packed", SHAPE, 3, dtype) | vectors
    rope = Rope(torch.randn(130, 80), 1, True)

    def attend(weight, bias, **rest):
        norm = HeadNorm(weight, bias)
        return ops.attention_packed(**rest, q_norm=norm, k_norm=norm, rope=rope)

    expected = run_with_gradients(attend, inputs)
    for threads in (1, 7, 2):
        torch.set_num_threads(threads)
        assert_same_bits(run_with_gradients(attend, inputs), expected)


@pytest.mark.parametrize("op", OPS)
def test_few_rows(op):
    """Fewer row blocks than threads: the columns are shared out too."""
    shape = Shape(embed_dim=192, num_heads=3, hidden_dim=768, tokens=5, patch_size=8, image_size=16)
    inputs = make_inputs(op, shape, 1, torch.float32)
    several = run(op, inputs)
    torch.set_num_threads(1)
    assert_same_bits(run(op, inputs), several)


@pytest.mark.parametrize("op", OPS)
def test_several_callers_with_the_same_weights(op):
    inputs = make_inputs(op, SHAPE, 2, torch.float32)
    expected = run(op, inputs)
    with torch.no_grad():
        output = getattr(ops, op)(**inputs)  # on packs that are kept

    def train() -> None:
        for _ in range(2):
            assert_same_bits(run(op, inputs), expected)

    def infer() -> None:
        with torch.no_grad():
            for _ in range(4):
                assert torch.equal(getattr(ops, op)(**inputs), output)

    in_threads(train, train, infer, infer)


def test_several_callers_with_weights_of_their_own():
    cases = [(op, make_inputs(op, SHAPE, 2, torch.float32, seed=seed)) for seed, op in enumerate(OPS)]
    expected = [run(op, inputs) for op, inputs in cases]

    def work(first: int) -> None:
        for i in range(len(cases)):
            (op, inputs), results = cases[(first + i) % len(cases)], expected[(first + i) % len(cases)]
            assert_same_bits(run(op, inputs), results)

    in_threads(*(lambda first=first: work(first) for first in range(3)))


@pytest.mark.parametrize("op", OPS)
def test_backward_in_another_thread(op):
    inputs = make_inputs(op, SHAPE, 2, torch.float32)
    expected = run(op, inputs)
    output, results = getattr(ops, op)(**inputs), {}
    wanted = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad]

    def backward() -> None:
        grads = torch.autograd.grad(output, [inputs[name] for name in wanted], torch.ones_like(output))
        results.update({f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)})

    in_threads(backward)
    assert_same_bits(results | {"output": output.detach()}, expected)


def test_weights_that_come_and_go_while_others_are_packed():
    """Each thread frees what it packed, so entries expire and addresses come back while the others look theirs up."""
    x = torch.randn(9, 48)

    def work() -> None:
        for i in range(30):
            weight = torch.randn(80, 48)
            for _ in range(2):
                out = C.linear_residual_fwd(x, weight, None, torch.zeros(9, 80), None, None, True)
                torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-4, atol=1e-4)
            if i % 10 == 3:
                C.clear_pack_cache()
            C.pack_cache_info()

    in_threads(work, work, work)
    assert C.pack_cache_info()["entries"] == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_inter_op_threads():
    """TorchScript's forked tasks run on the inter-op pool, each with an intra-op pool of its own."""
    inputs = {name: value.detach() for name, value in make_inputs("layernorm_linear", SHAPE, 3, torch.float32).items()}
    expected = ops.layernorm_linear(**inputs)

    @torch.jit.script
    def product(x, norm_weight, norm_bias, weight, bias):
        return torch.ops.fastvit.layernorm_linear_fwd(x, norm_weight, norm_bias, weight, bias, 1e-6, True, "cpp")[0]

    @torch.jit.script
    def products(x, norm_weight, norm_bias, weight, bias):
        tasks = [torch.jit.fork(product, x, norm_weight, norm_bias, weight, bias) for _ in range(4)]
        return [torch.jit.wait(task) for task in tasks]

    for out in products(*inputs.values()):
        assert torch.equal(out, expected)
