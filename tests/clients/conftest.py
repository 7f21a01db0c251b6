"""``graphs``: the backend by its name, without generated code; and a small Llama with something to learn."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from uncompiled import uncompiled

logging.getLogger("torch.__trace").propagate = False  # pytest would format and keep every line
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def without_code(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.lookup_backend("quartet")
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "quartet", uncompiled)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    torch.manual_seed(0)
