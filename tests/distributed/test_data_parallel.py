"""DDP and FSDP2 around compiled models, on two processes."""

import pytest
import torch
from torch.testing import assert_close

ROLES = ("dgrad", "fprop", "wgrad")
EVERY = [(f"layers.{layer}.{name}", role) for layer in range(3) for name in ("down", "up") for role in ROLES]


@pytest.fixture(scope="module")
def ddp(ranks):
    return ranks("ddp")


@pytest.fixture(scope="module")
def fsdp(ranks):
    return ranks("fsdp")


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_ranks_draw_different_bits(ddp):
    for rank in ddp:
        assert equal(rank["same data"], rank["same data again"]), "the seed decides"
    ours, theirs = (rank["same data"] for rank in ddp)
    assert not torch.equal(ours["up.weight"], theirs["up.weight"]), "the same seed and data, another stream"
    assert torch.equal(ours["down.bias"], theirs["down.bias"]), "what no stochastic rounding touches is equal"


@pytest.mark.parametrize("how", ["whole", "split"])
def test_ddp_gradients_are_equal_on_all_ranks(ddp, how):
    ours, theirs = (rank[how] for rank in ddp)
    assert equal(ours, theirs)
    assert all(torch.isfinite(grad).all() and grad.any() for grad in ours.values())


def test_ddp_gradient_is_the_mean_of_the_local_ones(ddp):
    for name, grad in ddp[0]["whole"].items():
        assert_close(grad, (ddp[0]["alone"][name] + ddp[1]["alone"][name]) / 2)
    assert ddp[0]["whole lowered"] == [(name, role) for name in ("down", "up") for role in ROLES]


def test_ddp_cut_at_its_buckets(ddp):
    for rank in ddp:
        assert rank["split calls"] > 1, "the backend is called once a bucket"
        assert rank["split lowered"] == EVERY


def test_ddp_trains(ddp):
    assert equal(ddp[0]["weights"], ddp[1]["weights"])
    for rank in ddp:
        assert rank["losses"][-1] < 0.7 * rank["losses"][0], rank["losses"]


def test_fsdp_computes_what_the_unsharded_model_does(fsdp):
    for rank in fsdp:
        assert torch.equal(rank["whole"], rank["unsharded"]) and torch.equal(rank["blocks"], rank["unsharded"])


@pytest.mark.parametrize("how", ["", "whole "])
def test_fsdp_trains(fsdp, how):
    for rank in fsdp:
        losses = rank[f"{how}losses"]
        assert all(loss < 10 for loss in losses) and losses[-1] < 0.7 * losses[0], losses
        modules = {name.rsplit(".", 1)[-1] for name, _ in rank[f"{how}lowered"]}
        assert modules == {"up", "down"} and len(rank[f"{how}lowered"]) >= 6


def test_fsdp_keeps_parameters_sharded_and_their_names(fsdp):
    assert all(rank["keys"] and rank["sharded"] for rank in fsdp)


def test_fsdp_resumes_from_a_checkpoint_bit_for_bit(fsdp):
    for rank in fsdp:
        assert rank["resumes"] == rank["goes on"]
