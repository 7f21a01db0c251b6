"""``quartet.State``: what is remembered of a model through torch.distributed.checkpoint."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import compile_eager, step
from models import MLP
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

import quartet
from quartet.integrations import files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(policy, steps, model, compiled):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for number in steps:
        torch.manual_seed(number)
        losses.append(step(compiled, model, [torch.randn(40, 64) * (1 + number)])[0].item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("policy", ["fp8-delayed", "tetrajet-ema"])
def test_a_run_resumed_from_a_distributed_checkpoint_goes_on_bit_for_bit(policy, tmp_path):
    torch.manual_seed(0)
    model = MLP()
    compiled, _ = compile_eager(model, policy)
    trained(policy, range(3), model, compiled)
    dcp.save({"model": model.state_dict(), "quartet": quartet.State(model)}, checkpoint_id=tmp_path)
    expected = trained(policy, range(3, 6), model, compiled)

    torch._dynamo.reset()
    other = MLP()
    weights = other.state_dict()
    assert isinstance(quartet.State(other), Stateful)
    dcp.load({"model": weights, "quartet": quartet.State(other)}, checkpoint_id=tmp_path)
    other.load_state_dict(weights)
    compiled, _ = compile_eager(other, policy)
    assert trained(policy, range(3, 6), other, compiled) == expected
    torch._dynamo.reset()
    forgetful = MLP()
    forgetful.load_state_dict(weights)
    compiled, _ = compile_eager(forgetful, policy)
    assert trained(policy, range(3, 6), forgetful, compiled) != expected, "the state matters"


def test_stages_of_a_model_save_into_one_checkpoint_and_load_by_other_divisions(tmp_path):
    model = nn.Sequential(*(MLP() for _ in range(3)))
    compiled, _ = compile_eager(model, "fp8-delayed")
    step(compiled, model, [torch.randn(40, 64)])
    saved = quartet.State(model).state_dict()
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert saved["0.up.weight"] and not saved["0.up.bias"]
    parts = [quartet.State(part).state_dict() for part in (model[:1], model[1:])]
    assert [len(part) for part in parts] == [3, 6]
    other = nn.Sequential(*(MLP() for _ in range(3)))
    quartet.State(other).load_state_dict(saved)
    want, got = (quartet.state_dict(m)["delayed"] for m in (model, other))
    assert want.keys() == got.keys() and all(torch.equal(want[k]["amax"], got[k]["amax"]) for k in want)
    with pytest.raises(ValueError, match="parameter '2.up.weight'"):
        quartet.State(other[:1]).load_state_dict({k: v for k, v in saved.items() if k.startswith("2.up.w")})


def test_weights_that_are_assigned_come_before_the_state():
    """They are other parameters; weights that are copied in keep the histories of those that are there."""
    model = MLP()
    compiled, _ = compile_eager(model, "fp8-delayed")
    trained("fp8-delayed", range(2), model, compiled)
    saved, remembered = model.state_dict(), quartet.state_dict(model)
    for assign, after in ((False, True), (True, False)):
        other = MLP()
        quartet.load_state_dict(other, remembered)
        other.load_state_dict(saved, assign=assign)
        assert bool(quartet.state_dict(other)["delayed"]) == after
        quartet.load_state_dict(other, remembered)
        assert quartet.state_dict(other)["delayed"].keys() == remembered["delayed"].keys()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut off"])
def test_a_damaged_file_beside_a_checkpoint_is_named(tmp_path, content):
    assert not files.load(MLP(), tmp_path)
    files.save(MLP(), tmp_path)
    assert files.load(MLP(), tmp_path)
    files.file_of(tmp_path).write_bytes(content)
    with pytest.raises(ValueError, match="quartet_state_0.pt is damaged: .* resume from another checkpoint"):
        files.load(MLP(), tmp_path)
