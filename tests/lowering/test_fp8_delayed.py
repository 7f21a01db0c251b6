"""Delayed scaling on FP8 tensor cores: an operand is read once, by what casts it, which hands its magnitude on."""

import re

import pytest
import torch
from around import around, linear, matrix
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet
from quartet.backend import compile_graph
from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops.fp8 import fp8_casts_by_known
from quartet.lowering.targets.fp8 import lower
from quartet.options import Options
from quartet.runtime.capture import Capture
from quartet.runtime.devices import Target


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


DELAYED = quartet.Policy("fp8-delayed").on("*", "fp8-delayed")


def lines(model, rows=64):
    return around("lower", model, matrix(rows, 32).requires_grad_(), target="sm_90", policy=DELAYED).after


def count(model):
    """How often each op of ours stands in the lowered graph."""
    names = [line.partition("= ")[2].partition("(")[0] for line in lines(model)]
    return {name: names.count(name) for name in set(names)}


def casts(model, rows=64):
    """How many are cast by each op, in forward and in backward."""
    found = {"forward": [], "backward": []}
    for line in lines(model, rows):
        if several := re.search(r"= fp8_casts_by_known\(\[(.*?)\]", line):
            found["backward" if "bwd" in line else "forward"].append(len(several[1].split(", ")))
    return found


def mlp():
    return nn.Sequential(linear(32, 64), nn.Tanh(), linear(64, 32))


def test_nothing_is_read_for_a_largest_magnitude_alone():
    found = count(mlp())
    assert found["fp8_casts_by_known"] == 4 and "amax" not in found and "where" not in found  # x, the weights
    assert found["amax_begin"] == found["amax_seen"] == found["amax_note"] == found["amax_record"] == 1


def test_also_in_what_is_checkpointed():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    found = count(Checkpointed())
    assert "amax" not in found and found["amax_note"] == found["amax_record"] == 1


class Branches(nn.Module):
    """Three layers of one X, whose results meet, and one behind them."""

    def __init__(self):
        super().__init__()
        self.branches, self.last = nn.ModuleList(linear(32, 32) for _ in range(3)), linear(32, 32)

    def forward(self, x):
        x = torch.sin(x)
        return self.last(sum(torch.tanh(branch(x)) for branch in self.branches))


def test_weights_and_the_gradients_of_one_x_are_cast_together():
    assert casts(Branches()) == {"forward": [1, 4, 1], "backward": [1, 3]}
    assert casts(Branches(), 62) == {"forward": [1, 4, 1], "backward": [1, 1, 1, 1]}


def test_what_is_known_is_read_from_one_table():
    """Kernels are compiled for how pointers are aligned: these are to multiples of 16 bytes, whatever the slot."""
    made = lines(Branches())
    table = next(line.partition(" ")[0] for line in made if "= clone(" in line and "[10, 4, 1]" in line)
    assert sum(f"= select({table}, 0, " in line for line in made) == 10


def test_the_steps_are_bit_for_bit_those_of_each_alone(monkeypatch):
    """Also what they record."""
    def backend(gm, inputs):
        return compile_graph(gm, inputs, Options(policy=DELAYED, target=Target.named("sm_90")), Capture(),
                             say=lambda *_: None, remember=False)

    torch.manual_seed(0)
    initial, xs = Branches().state_dict(), [matrix(64, 32, grad=False) * 3.0 ** i for i in range(3)]

    def steps():
        torch._dynamo.reset()
        model = Branches()
        model.load_state_dict(initial)
        compiled, found = torch.compile(model, backend=backend, fullgraph=True), []
        for x in xs:
            x = x.clone().requires_grad_()
            out = compiled(x)
            found += [out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(),
                                                [x, *model.parameters()])]
        return found + [entry["amax"] for entry in quartet.state_dict(model)["delayed"].values()]

    together = steps()
    monkeypatch.setattr(lower, "cast_together", lambda *_: set())
    alone = steps()
    assert len(together) == len(alone) == 3 * 6 + 10 and all(value.abs().max() > 0 for value in together)
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("known", [0.0, 0.3, 20.0, float("nan")])
def test_the_op_is_its_parts(known, margin):
    spec = "e4m3/tensor fp32 delayed nearest"
    x, other, known = torch.randn(33, 17, dtype=torch.bfloat16), torch.ones(4, 8), torch.tensor([known])
    seen = reference.largest_magnitude(x)
    amax = torch.where(known > 0, known, seen) * 2.0**margin
    given = [known, torch.ones(1)]
    codes, _, turned, _, scales, found = fp8_casts_by_known([x, other], given, spec, margin, True, True)
    wanted, scale, _ = reference.quantize(x, QuantSpec.parse(spec), amax=amax)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8)) and (scales[0] == scale).all()
    assert torch.equal(turned.view(torch.uint8), codes.t().view(torch.uint8)) and turned.is_contiguous()
    assert torch.equal(found, torch.stack([seen, torch.ones(1, 1)]))
