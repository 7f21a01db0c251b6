"""Tests of what only a GPU can show: they are marked ``gpu``, and skipped where there is none."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from quartet.runtime.replay.library import LAUNCHER  # noqa: E402


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def alone():
    """Nothing of another test: graphs and how often they were compiled; what C++ may do for a weight, which it knows
    by its address, where another test's weight may have lain; random numbers; the error mode of a test that failed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    LAUNCHER.forbid_all()
    yield
    torch._dynamo.reset()
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def device() -> torch.device:
    """The first GPU, as the current one, with nothing left of what earlier tests allocated."""
    torch.cuda.empty_cache()
    return torch.device("cuda", torch.cuda.current_device())
