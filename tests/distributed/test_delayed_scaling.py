"""Amax histories of delayed scaling on two processes."""

from pathlib import Path

import gloo
import pytest
import torch

pytestmark = gloo.available


@pytest.fixture
def ranks(tmp_path):
    return lambda name: gloo.run(Path(__file__).with_name("delayed_workers.py"), name, tmp_path)


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
