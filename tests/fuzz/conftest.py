"""Programs are made from seeds; ``QUARTET_FUZZ`` says how many (``make fuzz N=1000``)."""

import logging
import sys
from pathlib import Path

import pytest
import torch

logging.getLogger("torch.__trace").propagate = False  # pytest would format and keep every line
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), torch._functorch.config.patch(enable_autograd_cache=False):
        yield
