"""Weights and tokens split over two processes by DTensor."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

ROLES = ("dgrad", "fprop", "wgrad")


@pytest.fixture(scope="module")
def weights_split(ranks):
    return ranks("tensor_parallel")


@pytest.fixture(scope="module")
def tokens_split(ranks):
    return ranks("sequence_parallel")


def cosine(a, b):
    return cosine_similarity(*(torch.cat([g[name].flatten() for name in sorted(a)]) for g in (a, b)), dim=0)


def lowered(*names):
    return sorted((name, role) for name in names for role in ROLES)


def test_split_matmuls_are_found_and_lowered(weights_split):
    for rank in weights_split:
        assert rank["lowered"] == lowered("0.q", "0.k", "0.v", "0.o", "1.up", "1.down")
        assert {"all_reduce", "wait_tensor"} <= set(rank["collectives"])


def test_gradients_of_split_weights_point_the_same_way(weights_split):
    for rank in weights_split:
        assert 0.7 < cosine(rank["eager"], rank["compiled"]) < 0.9999


def test_replicated_parameters_stay_equal(weights_split):
    ours, theirs = (rank["replicated"] for rank in weights_split)
    assert {"0.norm.weight", "1.norm.weight", "1.down.bias"} <= ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["0.norm.weight"].std() > 0, "they were trained"


def test_split_weights_train(weights_split):
    ours, theirs = (rank["losses"] for rank in weights_split)
    assert ours == theirs and ours[-1] < 0.7 * ours[0], ours


def test_matmuls_are_found_behind_gathered_tokens(tokens_split):
    for rank in tokens_split:
        assert rank["lowered"] == lowered("up", "down")
        assert {"all_gather_into_tensor", "reduce_scatter_tensor"} <= set(rank["collectives"])
        assert 0.7 < cosine(rank["eager"], rank["compiled"]) < 0.9999


def test_weight_gathered_in_the_graph_is_a_weight(tokens_split):
    for rank in tokens_split:
        assert {"all_gather_into_tensor", "reduce_scatter_tensor"} <= set(rank["gathered collectives"])
        assert set(rank["gathered lowered"]) >= {("0", "fprop"), ("0", "wgrad"), *(("1", role) for role in ROLES)}
        assert 0.7 < cosine(rank["gathered eager"], rank["gathered"]) < 0.9999
