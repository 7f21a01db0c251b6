"""Delayed scaling on FP8 tensor cores: an operand is read once, by what casts it, which hands its magnitude on."""

import pytest
import torch
from around import around, linear, matrix
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet
from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops.fp8 import fp8_quantize, fp8_quantize_delayed


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


def count(model, recipe="fp8-delayed"):
    """How often each op of ours stands in the lowered graph."""
    policy = quartet.Policy(recipe).on("*", recipe)
    lines = around("lower", model, matrix(64, 32).requires_grad_(), target="sm_90", policy=policy).after
    names = [line.partition("= ")[2].partition("(")[0] for line in lines]
    return {name: names.count(name) for name in set(names)}


def mlp():
    return nn.Sequential(linear(32, 64), nn.Tanh(), linear(64, 32))


def test_nothing_is_read_for_a_largest_magnitude_alone():
    found = count(mlp())
    assert found["fp8_quantize_delayed"] == 6 and "amax" not in found and "where" not in found
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


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("known", [0.0, 0.3, 20.0])
def test_the_op_is_its_parts(known, margin):
    spec = "e4m3/tensor fp32 delayed nearest"
    x, known = torch.randn(33, 17, dtype=torch.bfloat16), torch.tensor([known])
    seen = reference.largest_magnitude(x)
    amax = (known if known > 0 else seen) * 2.0**margin
    wanted = *fp8_quantize.reference(x, amax, spec, True, True, torch.arange(33)), seen
    for mine, other in zip(fp8_quantize_delayed(x, known, spec, margin, True, True), wanted, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    codes, scales, _ = reference.quantize(x, QuantSpec.parse(spec), amax=amax.reshape(1, 1))
    assert torch.equal(wanted[0].view(torch.uint8), codes.view(torch.uint8)) and torch.equal(wanted[2], scales)
