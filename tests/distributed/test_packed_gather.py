"""FSDP2 gathers weights as codes: the same numbers, fewer bytes, and a reason where it does not."""

from pathlib import Path

import gloo
import pytest

WEIGHTS = tuple(f"layers.{i}.{name}.weight" for i in range(2) for name in ("up", "down"))


def run(tmp_path_factory, name, ranks=2):
    return gloo.run(Path(__file__).with_name("packed_workers.py"), name, tmp_path_factory.mktemp(name), ranks)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return run(tmp_path_factory, "packed")


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return run(tmp_path_factory, "refused")[0]


def equal_to_quantising_after_the_gather(found):
    assert found["packed"] == WEIGHTS and found["plain"], found
    assert found["differ"] == [] and found["fell"], found


@pytest.mark.parametrize("how", ["quartet", "fp8", "quartet-paper", "kept unsharded", "checkpointed",
                                 "compiled whole", "groups of one rank", "optimizer in backward"])
def test_packed_gathers_change_no_bit(packed, how):
    for rank in packed:
        equal_to_quantising_after_the_gather(rank[how])


@gloo.available
def test_replicated_groups(tmp_path_factory):
    for found in run(tmp_path_factory, "replicated", 4):
        equal_to_quantising_after_the_gather(found)


@gloo.available
def test_bytes_on_the_wire(tmp_path_factory):
    for rank in run(tmp_path_factory, "sent"):
        (whole, _), (mxfp4, _), (fp8, calls) = (rank[policy] for policy in ("bf16", "quartet", "fp8"))
        gathered = [sum(n for (name, _), n in found.items() if name == "all_gather") for found in (whole, mxfp4, fp8)]
        assert gathered[1] <= 0.28 * gathered[0] and gathered[2] <= 0.52 * gathered[0], gathered
        assert calls["all_reduce", "int32"] == 1, "one reduction of maxima for all weights of a step"
        assert ("all_reduce", "int32") not in mxfp4, "blocks need none"
        reduced = {n for found in (whole, mxfp4, fp8) for (name, _), n in found.items() if name == "reduce_scatter"}
        assert len(reduced) == 1, "gradients are reduced as before"


@gloo.available
def test_checkpoints_are_those_of_whole_weights(tmp_path_factory):
    for found in run(tmp_path_factory, "saved"):
        assert found["keys"] == found["others"] and found["kinds"] == {"DTensor"}
        assert found["remembered"] == [{"delayed": {}}] * 2, "neither before the scales of a step are found nor after"
        assert found["differ"] == [], "it goes on bit for bit"


@gloo.available
def test_a_changed_weight_is_quantised_again(tmp_path_factory):
    for found in run(tmp_path_factory, "changed"):
        packed, whole = found[True], found[False]
        assert packed == whole
        assert len(set(whole.values())) == 4, "what is written changes the loss, what is swapped back does not"


@pytest.mark.parametrize(("policy", "name", "reason"), [
    ("fp8", "first.weight", "shared"), ("fp8", "odd.weight", "33 rows"),
    ("fp8", "embed.weight", "no weight of a linear"),
    ("fp8", "first.bias", "no weight of a linear"), ("fp8", "lm_head.weight", "leaves lm_head in high precision"),
    ("fp8", "free.weight", ""), ("fp8-block", "free.weight", "128 rows together"),
    ("fp8-rowwise", "free.weight", "quantised anew by dgrad"), ("fp8-delayed", "free.weight", "earlier steps"),
    ("bitnet", "free.weight", "mean magnitude"), ("halo-fp8-1", "free.weight", "whole rotated tensor"),
    ("fp4-dge", "free.weight", "slope of its quantiser"),
    ("skipped", "layers.0.up.weight", "skip="), ("skipped", "layers.1.up.weight", ""),
])
def test_high_precision_has_a_reason(refused, policy, name, reason):
    assert reason in refused[policy][name] and bool(reason) == bool(refused[policy][name])


@pytest.mark.parametrize(("name", "says"), [
    ("other", "up.weight is gathered as codes of 'e4m3/tensor fp32 amax nearest'"),
    ("eager", "something reads it in high precision"), ("auto", "Name a recipe"), ("late", "before the first forward"),
    ("unsharded", "fully_shard"),
])
def test_errors_say_what_to_do(refused, name, says):
    assert says in refused[name], refused[name]


def test_a_graph_for_a_gpu_is_divided_where_weights_are_several_tensors(tmp_path_factory):
    """What the budget for a GPU asks of the partitioner counts gradients, of which such a weight has one."""
    assert run(tmp_path_factory, "pretended", 1) == [True]
