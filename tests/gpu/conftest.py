"""Tests of what only a GPU can show: they are marked ``gpu``, and skipped where there is none."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The first GPU, as the current one, with nothing left of what earlier tests allocated."""
    torch.cuda.empty_cache()
    return torch.device("cuda", torch.cuda.current_device())
