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


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for key in ours:
        assert torch.equal(ours[key]["amax"], theirs[key]["amax"]), key


def test_data_parallel_ranks_scale_by_the_largest_of_all(ranks):
    found = ranks("data_parallel")
    for how in ("as wrapped", "named"):
        (ours, sizes), (theirs, _) = (rank[how] for rank in found)
        assert history(ours, "up.weight.x") == (0.0, [5.0, 4.0, 6.0]), how
        assert len(ours) == 6 and sizes == [7] * 3, "one collective an optimizer step, of all slots and a flag"
        assert_equal(ours, theirs)
    alone = [history(rank["none"][0], "up.weight.x") for rank in found]
    assert alone == [(0.0, [4.0, 3.0, 6.0]), (0.0, [5.0, 4.0, 3.0])] and found[0]["none"][1] == []


def test_ranks_that_do_not_run_the_same(ranks):
    ours, theirs = ranks("uneven")
    assert_equal(ours["dropped"], theirs["dropped"])
    assert history(ours["dropped"], "layers.0.up.weight.x") == (0.0, [2.5, 2.0, 3.0, 3.0])
    assert len(history(ours["dropped"], "layers.1.up.weight.x")[1]) == 4, "what one rank leaves out advances on both"
    assert len(history(theirs["dropped"], "layers.2.up.weight.x")[1]) == 4
    assert ours["sizes"] == theirs["sizes"] == [19] * 4
    for rank, steps in ((ours, 1), (theirs, 3)):
        assert 19 not in rank["sizes there"] and history(rank["joined"], "layers.0.up.weight.x")[1][:steps] == [
            4.0 + number for number in reversed(range(steps))]
    assert history(ours["stage"], "up.weight.x") == (0.0, [2.0, 1.0])
    assert history(theirs["stage"], "up.weight.x") == (0.0, [4.0, 3.0, 2.0])


def test_sharded_layers_have_histories_and_resume(ranks):
    found = ranks("sharded")
    assert_equal(found[0]["state"], found[1]["state"])
    for rank in found:
        assert len(rank["state"]) == 12
        assert history(rank["state"], "layers.0.up.weight.x") == (0.0, [4.0, 3.0, 5.0])
        assert history(rank["ended"], "layers.0.up.weight.x") == (0.0, [5.0, 4.0, 6.0, 4.0])
        assert rank["sizes"] == [13] * 3
        assert rank["resumes"] == rank["goes on"]
        assert rank["computed again"] == rank["goes on"], "what a checkpoint around a compiled block runs again"
        assert_equal({key.replace("_checkpoint_wrapped_module.", ""): row for key, row in rank["ended again"].items()},
                     rank["ended"])
