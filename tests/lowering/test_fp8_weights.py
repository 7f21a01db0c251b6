"""The scales of all FP8 weights of a graph come from one reduction, and are what each weight's own would be."""

import re

import pytest
import torch
from around import around, linear, matrix
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import quartet
from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.ops import fp8
from quartet.lowering.ir.ops.fp8 import AMAX_OF_EACH, amax_of_each, amax_of_weights
from quartet.lowering.targets.fp8 import lower
from quartet.runtime.slots.weights import REUSED

INPUTS = [matrix(*shape, grad=False) for shape in ((64, 32), (64, 32), (32, 64), (48, 32))]
FP8 = quartet.Policy("fp8").on("*", "fp8")


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


def reductions(model, x=None, **options):
    """Names that the reduction over a list reads, one for each such node, and how many largest magnitudes are found
    one by one in forward."""
    x = matrix(64, 32) * 1 if x is None else x
    lines = around("lower", model, x.detach().requires_grad_(), target="sm_90", **({"policy": FP8} | options)).after
    found = [line for line in lines if re.search("= amax_of_(each|weights)", line)]
    lists = [line.partition("[")[2].partition("]")[0].split(", ") for line in found]
    return lists, sum("= amax(" in line and "bwd" not in line for line in lines)


class Hidden(nn.Module):
    """Layers behind an activation, so that no X is an input of the graph."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(torch.sin(x))


def test_one_reduction_for_all_weights():
    lists, alone = reductions(Hidden(linear(32, 64), linear(64, 64), linear(64, 32)))
    assert lists == [["layers.0.weight", "layers.1.weight", "layers.2.weight"]]
    assert alone == 3  # of each X


def test_a_weight_of_two_layers_is_read_once():
    tied = linear(32, 32)
    lists, _ = reductions(Hidden(tied, nn.ReLU(), tied, linear(32, 32)))
    assert lists == [["layers.0.weight", "layers.3.weight"]]


def test_weights_of_several_recipes_and_dtypes_are_apart():
    policy = quartet.Policy("fp8").on("*", "fp8").on("layers.1", "fp8-rowwise")
    lists, _ = reductions(Hidden(linear(32, 32), linear(32, 32), linear(32, 32)), policy=policy)
    assert lists == [["layers.0.weight", "layers.2.weight"]]


def test_nothing_for_one_weight_or_one_that_is_computed():
    assert reductions(Hidden(linear(32, 32))) == ([], 2)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Parameter(matrix(32, 32)), nn.Parameter(matrix(32, 32))

        def forward(self, x):
            return torch.sin(torch.sin(x) @ (self.left * 2)) @ (self.right * 2)

    assert reductions(Scaled())[0] == []


def test_it_stands_outside_of_what_is_checkpointed():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Hidden):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    lists, _ = reductions(Checkpointed(linear(32, 32), linear(32, 32)))
    assert lists == [["layers.0.weight", "layers.1.weight"]]


@pytest.mark.parametrize("rule", ["amax", "amax_pow2"])
def test_the_scales_are_those_of_each_tensor(rule):
    spec = QuantSpec.parse(f"e4m3/tensor fp32 {rule} nearest")
    xs = [torch.randn(33, 17, dtype=torch.bfloat16) * scale for scale in (1.0, 1e-30, 3e4)]
    xs += [torch.zeros(4, 8, dtype=torch.bfloat16), torch.full((2, 2), float("-inf"), dtype=torch.bfloat16)]
    xs.append(torch.tensor([[1.0, float("nan")]], dtype=torch.bfloat16))
    together = reference.scale_of_amax(amax_of_each(xs), spec)
    for i, x in enumerate(xs):
        for table, alone in zip(together, reference.fp32_scale(x, spec), strict=True):
            torch.testing.assert_close(table[i], alone, rtol=0, atol=0, equal_nan=True)


def test_they_are_found_once_an_optimizer_step(monkeypatch):
    found = []
    monkeypatch.setattr(fp8, "_amax_launched", lambda xs: found.append(len(xs)) or amax_of_each.reference(xs))
    (once,) = [provider for provider in amax_of_weights.providers if provider.name == "triton"]
    weights = [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))]
    optimizer = torch.optim.SGD(weights, 0.5)
    REUSED.watch()

    def times(forwards):
        del found[:]
        for _ in range(forwards):
            result = once.run(weights)
            assert torch.equal(result, amax_of_each.reference(weights)) and result.shape == (len(weights), 1, 1)
            result.zero_()  # compiled code may write to it
        return len(found)

    assert times(2) == 2, "no optimizer has stepped them"
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert times(4) == 2, "the first of all steps does not know that more will ask"
    optimizer.step()
    assert times(4) == 1
    with torch.no_grad():
        weights[1].mul_(2)
    assert times(3) == 1


def test_an_input_is_not_among_the_weights():
    model = nn.Sequential(linear(32, 32), nn.Tanh(), linear(32, 32))
    lines = around("lower", model, matrix(64, 32).requires_grad_(), target="sm_90", policy=FP8).after
    names = [line for line in lines if "= amax_of" in line]
    assert len(names) == 1 and "amax_of_weights" in names[0] and "[0.weight, 2.weight]" in names[0]


def test_each_scale_lies_where_the_product_takes_it():
    gm = lowered_products()
    (scaled, *others) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten._scaled_mm.default)
    for node in (scaled, *others):
        for scale in node.args[2:4]:
            value = scale.meta["val"]
            assert value.shape == (1, 1) and value.storage_offset() * value.element_size() % 16 == 0


def products(x, *weights):
    """A chain of FP8 products, as semantic ops."""
    spec, ops = "e4m3/tensor fp32 amax nearest", torch.ops.quartet
    for w in weights:
        x, w = (ops.quantize(t, spec, None, 0)[:2] for t in (torch.sin(x), w))
        x = ops.scaled_mm(*x, *w, spec, spec, torch.bfloat16)
    return x


def lowered_products():
    gm = make_fx(products, tracing_mode="fake")(*INPUTS)
    lower.lower(gm.graph, gm.graph.find_nodes(op="call_function", target=ir.SCALED_MM), lambda *_: True)
    return gm


def test_products_are_bit_for_bit_those_of_scales_one_by_one(monkeypatch):
    results = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(lower, "scales_of_weights", lambda *_: {})
        gm = lowered_products()
        assert bool(gm.graph.find_nodes(op="call_function", target=AMAX_OF_EACH)) == together
        gm.recompile()
        results.append(gm(*INPUTS))
    assert torch.equal(*results) and results[0].abs().max() > 0
