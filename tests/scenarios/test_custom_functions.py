"""What runs in backward though autograd did not make it: products of custom Functions are found as dgrad and wgrad."""

import pytest
import torch
from custom_functions import (
    Autocast,
    ByHand,
    Cast,
    Checkpointed,
    Head,
    Linear,
    Lora,
    Megatron,
    Recomputed,
    Scaled,
    Shared,
    Transposed,
    Triple,
)
from harness import ALL, FIRST, assert_close, assert_same, compile_eager, compile_plain, cosine, step
from models import data

import quartet
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir

SQUARE = {"q": (64, 64), "k": (64, 64), "v": (64, 64)}
INNER = {"inner": ALL}
MODELS = {
    "linear": (lambda: ByHand(Linear, w=(96, 64)), INNER | {"w": ALL}),
    "transposed": (lambda: ByHand(Transposed, w=(64, 96)), INNER | {"w": ALL}),
    "megatron": (lambda: ByHand(Megatron, w=(96, 64), b=(96,)), INNER | {"w": ALL}),
    "autocast": (lambda: Autocast(Megatron, w=(96, 64), b=(96,)), INNER | {"w": ALL}),
    "lora": (lambda: ByHand(Lora, w=(64, 64), a=(32, 64), b=(64, 32)),
             INNER | {"w": frozenset({"fprop", "dgrad"}), "a": ALL, "b": ALL}),
    "triple": (lambda: ByHand(Triple, **SQUARE), INNER | dict.fromkeys("qkv", ALL)),
    "first": (lambda: ByHand(Triple, first=True, **SQUARE), dict.fromkeys("qkv", FIRST)),
    "recomputed": (lambda: ByHand(Recomputed, up=(96, 64), down=(32, 96)), INNER | {"up": ALL, "down": ALL}),
    "scaled": (lambda: ByHand(Scaled, w=(96, 64)), INNER | {"w": ALL}),
    "cast": (lambda: ByHand(Cast, torch.bfloat16, w=(96, 64)), INNER | {"w": ALL}),
    "shared": (lambda: Shared(Linear, w=(64, 64)), INNER | {"w": ALL}),
    "checkpointed": (lambda: Checkpointed(Linear, w=(96, 64)), INNER | {"w": ALL}),
}


def example(name: str):
    make, roles = MODELS[name]
    model = make()
    dtype = next(model.parameters()).dtype
    rows = (4, 16, 64) if name in ("megatron", "autocast") else (64, 64)
    (x,) = data(*rows)()
    return model, (x.to(dtype).requires_grad_(name != "first"),), roles


@pytest.mark.parametrize("name", MODELS)
def test_gradients_written_by_hand_are_found_and_stay_good(name):
    model, inputs, roles = example(name)
    exact = step(model, model, inputs)
    compiled, backend = compile_eager(model, quartet.Policy("quartet").on("*", "quartet"))
    got = step(compiled, model, inputs)
    assert backend.lowered() == roles and not backend.alone()
    assert_close(got, exact, least=0.75)
    torch._dynamo.reset()
    compiled, _ = compile_eager(model, quartet.Policy("fp8").on("*", "fp8"))
    assert_close(step(compiled, model, inputs), exact, least=0.98)


@pytest.mark.parametrize("name", MODELS)
def test_policy_bf16_leaves_them_bit_for_bit(name):
    model, inputs, _ = example(name)
    compiled, backend = compile_eager(model, "bf16")
    got = step(compiled, model, inputs)
    assert not backend.lowered()
    assert_same(got, step(compile_plain(model), model, inputs))


def test_each_gradient_is_that_of_its_own_weight():
    """Which wgrad is whose shows in a rule by name: one layer alone is quantised, and the others are exact."""
    model, inputs, _ = example("first")
    exact = step(compile_plain(model), model, inputs)[1]
    for name in "qkv":
        torch._dynamo.reset()
        compiled, backend = compile_eager(model, quartet.Policy("bf16").on(name, "fp8", role="wgrad"))
        got = step(compiled, model, inputs)[1]
        assert backend.lowered() == {name: frozenset({"wgrad"})}
        assert {n for n in "qkv" if not torch.equal(got[n], exact[n])} == {name}


def test_rules_and_rounding_are_those_of_backward():
    model, inputs, _ = example("linear")
    compiled, backend = compile_eager(model, quartet.Policy("quartet").on("w", "mxfp8", role="dgrad").on("inner", None))
    step(compiled, model, inputs)
    assert {r.role: r.recipe for r in backend.records if r.fqn == "w"} == {
        "fprop": "quartet", "dgrad": "mxfp8", "wgrad": "quartet"}
    torch._dynamo.reset()
    compiled, backend = compile_eager(model, "quartet", disable_passes=("lower",))
    step(compiled, model, inputs)
    (forward,), (backward,) = backend.forwards(), backend.backwards()
    rounding = [{QuantSpec.parse(n.args[1]).stochastic for n in gm.graph.nodes if n.target is ir.QUANTIZE}
                for gm in (forward, backward)]
    assert rounding == [{False}, {True}]


def test_gradients_of_a_loss_in_chunks_are_found_where_forward_makes_them():
    torch.manual_seed(0)
    model, inputs = Head(), (torch.randn(64, 64), torch.randint(0, 96, (64,)))
    exact = step(model, model, inputs)
    policy = quartet.Policy("quartet").on("head", "quartet")
    compiled, backend = compile_eager(model, policy)
    got = step(compiled, model, inputs)
    assert backend.lowered() == {"inner": FIRST, "head": ALL} and not backend.alone()
    assert all(cosine(grad, exact[1][name]) > 0.9 for name, grad in got[1].items())
    torch._dynamo.reset()
    compiled, _ = compile_eager(model, "bf16")
    assert_same(step(compiled, model, inputs), step(compile_plain(model), model, inputs))


def test_a_weight_used_again_as_a_decoder_is_no_gradient():
    """y·W of y = x·Wᵀ has the operands of a dgrad, but a result of forward is made of it."""
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(96, 64) / 8)

        def forward(self, x):
            return torch.relu(x @ self.w.t()) @ self.w

    model, inputs = Tied(), data(64, 64, grad=True)()
    compiled, backend = compile_eager(model)
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.75)
    assert len({r.site for r in backend.records}) == 2 and backend.lowered() == {"w": ALL}
