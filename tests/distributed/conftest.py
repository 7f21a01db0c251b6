"""``ranks(work)``: run a module-level function in two gloo processes and collect what it returns."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def _one(rank, work, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        torch.save(work(rank, folder), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture
def ranks(tmp_path):
    """Returns a function: ``ranks(work)`` is the list of ``work(rank, folder)``; a failure on a rank raises here."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")

    def run(work):
        mp.spawn(_one, (work, str(tmp_path)), nprocs=RANKS)
        return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]

    return run
