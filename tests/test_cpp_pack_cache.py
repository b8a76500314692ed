"""Packed weights are kept between calls and never served stale."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

C = pytest.importorskip("fastvit._C", reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def _empty_cache():
    C.clear_pack_cache()
    yield
    C.clear_pack_cache()


def run(x: Tensor, weight: Tensor, cache: bool = True) -> Tensor:
    return C.linear_residual_fwd(x, weight, None, torch.zeros(x.shape[0], weight.shape[0]), None, None, cache)


def assert_fresh(x: Tensor, weight: Tensor) -> None:
    torch.testing.assert_close(run(x, weight), F.linear(x, weight.detach()), rtol=1e-4, atol=1e-4)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(9, 48)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(80, 48)


def test_one_entry_a_weight_and_none_without_cache(x, weight):
    run(x, weight, cache=False)
    assert C.pack_cache_info() == {"entries": 0, "bytes": 0}
    run(x, weight)
    run(x, weight)
    assert C.pack_cache_info() == {"entries": 1, "bytes": 128 * 48 * 4}
    run(x, weight[:40])
    assert C.pack_cache_info()["entries"] == 2
    C.clear_pack_cache()
    assert C.pack_cache_info()["entries"] == 0
    assert_fresh(x, weight)


def test_in_place_update_counts_a_version(x, weight):
    run(x, weight)
    weight[0, 0] += 100  # one element, which no sample need hit
    assert_fresh(x, weight)


@pytest.mark.parametrize("size", [(80, 48), (257, 48), (2304, 48)])
def test_data_write_leaves_the_version_alone(x, size):
    weight = torch.nn.Parameter(torch.randn(size))
    run(x, weight.detach())
    version = weight._version
    weight.data.mul_(0.999)
    assert weight._version == version
    assert_fresh(x, weight.detach())


SINGLE = {"first": (0, 0), "last": (-1, -1), "middle": (200, 30)}


@pytest.mark.parametrize("layout", ["rows", "columns", "both"])
@pytest.mark.parametrize("place", SINGLE)
def test_one_value_written_through_data(x, place, layout):
    """No version, no other value: seen when the slice it lies in is looked at, all of which are within 64 calls."""
    weight = torch.randn(640, 48)
    weight = {"rows": weight, "columns": weight.t().contiguous().t(), "both": torch.randn(640, 96)[:, ::2]}[layout]
    run(x, weight)
    weight.data[SINGLE[place]] += 100
    for _ in range(64):
        run(x, weight)
    assert_fresh(x, weight)


def test_one_value_is_seen_at_once_before_many_rows():
    x, weight = torch.randn(64 * 128, 48), torch.randn(640, 48)
    run(x, weight)
    weight.data[123, 17] += 100
    assert_fresh(x, weight)


def test_a_column_written_through_data_is_seen_at_once(x):
    for column in range(48):
        weight = torch.randn(640, 48)
        run(x, weight)
        weight.data[:, column] = 0.0
        assert_fresh(x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pruning_through_data_is_seen_at_once(dtype):
    """A mask over one value in ten, in a 16-bit weight whose rows are no whole cache lines."""
    x, weight = torch.randn(9, 47).to(dtype), torch.randn(640, 47).to(dtype)
    residual = torch.zeros(9, 640)
    C.linear_residual_fwd(x, weight, None, residual, None, None, True)
    weight.data[torch.rand(640, 47) < 0.1] = 0
    out = C.linear_residual_fwd(x, weight, None, residual, None, None, True)
    torch.testing.assert_close(out, F.linear(x.float(), weight.float()), rtol=2e-2, atol=2e-2)


def test_exponential_moving_average(x):
    """As EMA codes write it: lerp of the data, one after the other or all at once."""
    average, model = torch.nn.Linear(48, 80), torch.nn.Linear(48, 80)
    run(x, average.weight.detach())
    average.weight.data.lerp_(model.weight.data, 0.001)
    assert_fresh(x, average.weight.detach())
    torch._foreach_lerp_([average.weight.data], [model.weight.data], 0.001)
    assert_fresh(x, average.weight.detach())


def test_data_swap(x, weight):
    parameter = torch.nn.Parameter(weight)
    run(x, parameter.detach())
    parameter.data = torch.randn_like(weight)
    assert_fresh(x, parameter.detach())


def test_load_state_dict(x):
    layer, other = torch.nn.Linear(48, 80), torch.nn.Linear(48, 80)
    run(x, layer.weight.detach())
    layer.load_state_dict(other.state_dict())
    assert_fresh(x, layer.weight.detach())


def test_storage_resized_in_place(x, weight):
    run(x, weight)
    values = torch.randn(80, 48)
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(80 * 48 * 4)
    weight.data.copy_(values)
    assert_fresh(x, weight)


def test_address_of_a_freed_weight(x):
    seen: set[int] = set()
    reused = 0
    for _ in range(50):
        weight = torch.randn(80, 48)
        reused += weight.data_ptr() in seen
        seen.add(weight.data_ptr())
        assert_fresh(x, weight)
        del weight
    assert reused > 0
    assert C.pack_cache_info()["entries"] == 0


def test_entry_goes_with_its_weight(x):
    weight = torch.randn(80, 48)
    run(x, weight)
    assert C.pack_cache_info()["entries"] == 1
    del weight
    assert C.pack_cache_info() == {"entries": 0, "bytes": 0}


def test_inference_tensors(x):
    with torch.inference_mode():
        weight = torch.randn(80, 48)
        assert_fresh(x, weight)
        weight.copy_(torch.randn(80, 48))
        assert_fresh(x, weight)


def test_views_and_dtypes_of_one_storage(x):
    base = torch.randn(160, 48)
    for view in (base[:80], base[80:], base[::2], base.t()[:, :48].contiguous().t()):
        assert_fresh(x, view)
    half = base.bfloat16()
    out = C.linear_residual_fwd(x.bfloat16(), half, None, torch.zeros(9, 160), None, None, True)
    torch.testing.assert_close(out, F.linear(x.bfloat16().float(), half.float()), rtol=1e-2, atol=1e-2)


def test_two_threads(x):
    weights = [torch.randn(80, 48) for _ in range(4)]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(60):
                assert_fresh(x, weights[i % 4])
                if i % 20 == 7:
                    C.clear_pack_cache()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
