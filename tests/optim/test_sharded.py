"""FSDP2 on gloo: sharded states train like whole ones, and a checkpoint of two ranks loads on two and on one."""

import sys
from pathlib import Path

import gloo
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import optim_workers as workers  # noqa: E402

pytestmark = gloo.available


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each worker returned, by name, one entry a rank."""
    folder = tmp_path_factory.mktemp("optimizers")
    return {name: gloo.run(workers.__file__, name, folder, ranks)
            for name, ranks in (("save", 2), ("load", 1), ("load_sharded", 2))}


def whole(case):
    """Five steps of one process."""
    net = workers.model(case)
    return workers.train(net, workers.CASES[case](net.parameters()), range(5))


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", workers.CASES)
def test_ranks_train_the_same_weights_as_one_process(case, results):
    for rank in results["save"]:
        assert_equal(rank[case]["then"], whole(case))


@pytest.mark.parametrize("case", workers.CASES)
def test_a_checkpoint_goes_on_with_as_many_ranks(case, results):
    for rank, loaded in zip(results["save"], results["load_sharded"], strict=True):
        assert_equal(rank[case]["then"], loaded[case])


@pytest.mark.parametrize("case", workers.CASES)
def test_a_checkpoint_of_two_ranks_goes_on_with_one(case, results):
    assert_equal(results["save"][0][case]["then"], results["load"][0][case])


@pytest.mark.parametrize("case", workers.CASES)
def test_states_are_sharded(case, results):
    assert any(results["save"][0][case]["sharded"])


def test_placements(tmp_path):
    """A whole state is no shard's; a gradient that is a sum to be made is made one."""
    for said, weight in gloo.run(workers.__file__, "placements", tmp_path, 2):
        assert "plain tensor of shape [8, 256]" in said and "DTensor" in said
        assert torch.equal(weight, torch.full((8, 256), -1.0))
