"""Amax histories of delayed scaling on two processes."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


@pytest.fixture
def ranks(tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch is built without gloo")
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)  # spawned processes inherit it
    import delayed_workers

    def run(name):
        mp.spawn(delayed_workers.main, (name, str(tmp_path), RANKS), nprocs=RANKS)
        return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]

    yield run
    sys.path.remove(here)


def history(state, key):
    pending, *entries = state[key]["amax"].tolist()
    return pending, [e for e in entries if e]


def test_data_parallel_ranks_scale_by_the_largest_of_all(ranks):
    found = ranks("data_parallel")
    assert [history(rank["all"], "up.weight.x") for rank in found] == [(3.0, [3.0, 5.0]), (4.0, [3.0, 5.0])]
    assert [history(rank["none"], "up.weight.x") for rank in found] == [(3.0, [2.0, 5.0]), (4.0, [3.0, 2.0])]
    ours, theirs = (rank["all"] for rank in found)
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for key in ours:
        assert torch.equal(ours[key]["amax"][1:], theirs[key]["amax"][1:]), key


def test_sharded_layers_have_histories_and_resume(ranks):
    for rank in ranks("sharded"):
        assert len(rank["state"]) == 12
        assert history(rank["state"], "layers.0.up.weight.x")[1][-1] == 5.0
        assert rank["resumes"] == rank["goes on"]
