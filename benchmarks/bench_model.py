"""A whole model by each provider, inference and a training step, under pytest-benchmark."""

import pytest
from common import PROVIDERS, time_model


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_model(benchmark, mode, provider):
    time_model(benchmark, mode, provider)
