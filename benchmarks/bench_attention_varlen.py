"""Each provider, forward and backward, under pytest-benchmark."""

import pytest
from common import PROVIDERS, time_op


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_attention_varlen(benchmark, mode, provider):
    time_op(benchmark, "attention_varlen", mode, provider)
