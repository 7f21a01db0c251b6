"""FSDP version 1, whose modules hold views of a flat parameter while forward runs."""

from pathlib import Path

import gloo
import pytest
import torch

pytestmark = gloo.available


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return gloo.run(Path(__file__).with_name("flat_workers.py"), "flat", tmp_path_factory.mktemp("flat"))


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_quantised_as_the_unsharded_model_is_and_under_its_names(flat, how):
    for rank in flat:
        assert rank[f"{how} lowered"] == rank["alone lowered"] != []
        assert torch.equal(rank[how], rank["alone"])
        losses = rank[f"{how} losses"]
        assert losses[-1] < 0.95 * losses[0]


def test_what_is_remembered_of_a_parameter_is_refused(flat):
    assert all("FSDP version 1" in rank["delayed"] and "fully_shard" in rank["delayed"] for rank in flat)


def test_layers_of_torch_itself_are_quantised_inside_of_wrappers(flat):
    for rank in flat:
        found = rank["layers of torch.nn"]
        assert found["DDP"] == found["FSDP1"] == 5, "two layers, and no gradient of the first input"
        assert "Sequential under fully_shard cannot be compiled" in found["FSDP2"] and "class Block" in found["FSDP2"]
