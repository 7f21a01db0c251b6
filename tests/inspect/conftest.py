"""The tests of the inspector compile as the scenarios do, each with dynamo's caches empty."""

import logging
import sys
from pathlib import Path

import pytest
import torch

logging.getLogger("torch.__trace").propagate = False  # pytest would format and keep every line
sys.path[:0] = [str(Path(__file__).parents[1] / "scenarios"), str(Path(__file__).parent)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
