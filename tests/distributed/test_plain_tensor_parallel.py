"""Tensor parallelism on plain tensors: which ranks draw the same bits has to be said."""

from pathlib import Path

import gloo
import pytest
import torch

pytestmark = gloo.available


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return gloo.run(Path(__file__).with_name("plain_workers.py"), "plain", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("how", ["ranks", "group", "mesh"])
def test_what_a_named_group_replicates_stays_equal(plain, how):
    ours, theirs = (rank[how] for rank in plain)
    assert torch.equal(ours["shared"], theirs["shared"]) and not torch.equal(ours["own"], theirs["own"])
    assert torch.equal(ours["shared"], plain[0]["ranks"]["shared"]), "of a group the lowest rank's stream"


def test_ranks_draw_their_own_bits_otherwise(plain):
    ours, theirs = (rank["none"]["shared"] for rank in plain)
    assert not torch.equal(ours, theirs)


def test_ranks_share_compiled_graphs(plain):
    assert plain[0]["keys"] == plain[1]["keys"]
    assert len(plain[0]["keys"]) == 1, "nor does the group make another graph"


def test_a_group_without_this_rank_is_refused(plain):
    for rank, found in enumerate(plain):
        assert f"rank {rank} is not among [{1 - rank}]" in found[str([1 - rank])]
        assert "a ProcessGroup, a DeviceMesh or a list of ranks, not str 'tp'" in found["tp"]
