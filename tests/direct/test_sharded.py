"""DDP and FSDP2 on gloo: ranks train the weights that one process trains, and hold only their rows."""

import sys
from pathlib import Path

import gloo
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import direct_workers as workers  # noqa: E402
from direct_models import assert_same  # noqa: E402

pytestmark = gloo.available
RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A function: what the worker of a name returned, one entry a rank."""
    folder, found = tmp_path_factory.mktemp("direct"), {}

    def run(name, ranks=RANKS):
        if name not in found:
            found[name] = gloo.run(workers.__file__, name, folder, ranks)
        return found[name]

    return run


def whole(case):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a rank has: the order of sums depends on it
    try:
        net = workers.model(case)
        workers.steps(net, workers.wrapped(case, net))
        return workers.stored(net)
    finally:
        torch.set_num_threads(before)


def close(left, right, case):
    """Gradients of halves add up in another order, so that a code in a thousand may round the other way."""
    assert (left != right).float().mean() < 2e-3, case


@pytest.mark.parametrize("case", workers.CASES)
def test_ranks_of_ddp_stay_equal_and_train_like_one(case, ranks):
    first, second = (rank[case] for rank in ranks("ddp"))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    alone = whole(case)
    close(first["down.weight.codes"], alone["down.weight.codes"], case)
    assert torch.allclose(first["down.weight.scale"], alone["down.weight.scale"], rtol=1e-3)


def test_a_broadcast_gives_all_ranks_the_codes_of_one(ranks):
    first, second = ranks("ddp")
    assert_same(first["broadcast"], workers.stored(workers.model("4", seed=1)))
    for name in ("broadcast", "of one"):
        assert_same(first[name], second[name])


@pytest.mark.parametrize("case", workers.CASES)
def test_fsdp_shards_rows_and_trains_like_one(case, ranks):
    alone = whole(case)
    for name in ("up.weight", "down.weight"):
        parts = [rank[case][name] for rank in ranks("fsdp")]
        close(torch.cat([codes for codes, _ in parts]), alone[f"{name}.codes"], case)
        scales = parts[0][1] if workers.CASES[case][1] else torch.cat([scale for _, scale in parts])
        assert torch.allclose(scales, alone[f"{name}.scale"], rtol=1e-3)
    rows, each = alone["up.weight.codes"].shape
    assert ranks("fsdp")[0][case]["bytes"] == -(-rows // RANKS) * each * alone["up.weight.codes"].itemsize


@pytest.mark.parametrize("case", workers.CASES)
def test_fsdp_of_one_rank_trains_like_none(case, ranks):
    (found,), alone = (rank[case] for rank in ranks("fsdp_of_one", 1)), whole(case)
    for name in ("up.weight", "down.weight"):
        codes, scales = found[name]
        assert torch.equal(codes, alone[f"{name}.codes"]) and torch.equal(scales, alone[f"{name}.scale"])


def test_rows_that_the_ranks_do_not_divide_train_and_are_saved(ranks):
    (first, second), (alone,) = ([rank["uneven"] for rank in run]
                                 for run in (ranks("fsdp"), ranks("fsdp_of_one", 1)))
    for case, outputs in alone.items():
        assert torch.equal(first[case], outputs) and torch.equal(second[case], outputs), case
        assert not torch.equal(outputs[0], outputs[1])


def whole_rows(ranks, key, name, paper):
    codes, scales = zip(*(rank[key][name] for rank in ranks), strict=True)
    return torch.cat(codes), scales[0] if paper else torch.cat(scales)


@pytest.mark.parametrize("case", workers.CASES)
def test_a_checkpoint_of_two_ranks_goes_on_with_two_and_with_one(case, ranks):
    saved, (alone,) = [rank[case] for rank in ranks("save")], [rank[case] for rank in ranks("load", 1)]
    again = [rank[case] for rank in ranks("load_sharded")]
    for name in ("up.weight", "down.weight"):
        for key, earlier in (("loaded", "saved"), ("then", "then")):
            expected = whole_rows(saved, earlier, name, workers.CASES[case][1])
            for found in (alone[key][name], whole_rows(again, key, name, workers.CASES[case][1])):
                assert all(map(torch.equal, found, expected)), (name, key)
        assert not torch.equal(alone["loaded"][name][0], alone["then"][name][0])
