"""``ranks("name")``: run a function of workers.py in two gloo processes and collect what each returns."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A function: ``ranks("ddp")`` is the list of ``workers.ddp(rank, folder)``; a failure on a rank raises here."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)  # spawned processes inherit it, and find workers.py
    import workers

    def run(name):
        folder = tmp_path_factory.mktemp(name)
        mp.spawn(workers.main, (name, str(folder), RANKS), nprocs=RANKS)
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]

    yield run
    sys.path.remove(here)
