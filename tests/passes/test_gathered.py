"""``gathered``: codes that data parallelism has gathered stand in place of what would quantise the weight."""

import pytest
import torch
from around import around, linear, matrix
from torch import nn

import quartet
from quartet.lowering.shards import quantize_shard
from quartet.runtime.distributed import GatheredWeight, Packing, Scale

SPECS = {"tetrajet": "e2m1/32 e8m0 ceil nearest", "fp8": "e4m3/tensor fp32 amax nearest",
         "fp8-block": "e4m3/128 fp32 amax_pow2 nearest"}


def gathered(recipe, spec=None):
    """A linear layer whose weight is codes, and the policy that names its recipe."""
    layer, packing = linear(64, 32), Packing(spec or SPECS[recipe])
    w = layer.weight.detach()
    scale = None
    if packing.by_tensor:
        amax = w.abs().amax().float().reshape(1, 1)
        scale = Scale(amax, 448 / amax, amax / 448)
    planes = quantize_shard(w, packing, scale)
    planes.setdefault("scales", scale and scale.scale)
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(GatheredWeight(planes, packing, 64, w.dtype)))
    return layer, quartet.Policy(recipe).on("*", recipe)


@pytest.mark.parametrize("recipe", ["tetrajet", "fp8"])
def test_the_weight_is_not_quantised_again(recipe):
    layer, policy = gathered(recipe)
    shown = around("gathered", layer, matrix(64, 64), policy=policy)
    removed = [line for line in shown.text.splitlines() if line.startswith("-")]
    assert [line for line in removed if "gathered_weight(" in line]
    assert len([line for line in removed if " quantize(" in line]) == 1, "that of forward"
    assert not [line for line in shown.text.splitlines() if line.startswith("+") and " quantize(" in line]


def test_nothing_without_gathered_weights():
    assert not around("gathered", linear(64, 32), matrix(64, 64), policy=quartet.Policy("fp8").on("*", "fp8")).text


def test_another_read_is_an_error():
    layer, policy = gathered("fp8-block")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="weight is gathered as codes of 'e4m3/128 fp32"):
        around("gathered", layer, matrix(64, 64), policy=policy)
