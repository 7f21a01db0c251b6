"""Products of two activations: what class they are, every recipe on them, and the opening of fused attention."""

import math

import pytest
import torch
from harness import ALL, assert_close, compile_eager, cosine, step
from models import data
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from quartet import Policy, explain, recipes, state_dict
from quartet.backend import make_pipeline
from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.options import Options
from quartet.policy.possible import obstacle

ATTENTION = ("attention_qk", "attention_pv")
QUANTISING = [name for name, recipe in recipes().items() if recipe.quantizes and obstacle(recipe, "bmm") is None]


class Attention(nn.Module):
    """Attention without a mask (``test_masks.py`` has those with one), written out or by PyTorch's fused function."""

    def __init__(self, fused=False, width=64, heads=4, kv_heads=4):
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)  # a bias of k has no gradient but noise
        self.k, self.v = (nn.Linear(width, width // heads * kv_heads, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width)
        self.heads, self.kv_heads, self.fused = heads, kv_heads, fused

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (p(x).view(batch, length, n, -1).transpose(1, 2)
                   for p, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads)))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv_heads)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            y = F.dropout(scores.softmax(-1), 0.0) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class Pair(nn.Module):
    """A parameter, so that something requires a gradient, and a product of two activations."""

    def __init__(self, product):
        super().__init__()
        self.scale, self.product = nn.Parameter(torch.ones(())), product

    def forward(self, a, b):
        return self.product(a * self.scale, b)


def pair(*shapes):
    g = torch.Generator().manual_seed(3)
    return tuple(torch.randn(*shape, generator=g).requires_grad_() for shape in shapes)


def of_class(backend, *classes):
    return [r for r in backend.records if r.op_class in classes]


@pytest.mark.parametrize("fused", (False, True))
def test_the_two_products_of_attention_are_told_apart(fused):
    model, inputs = Attention(fused), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, Policy(None).on("attention", "fp8"), open_attention=True)
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.99)
    sizes = {(r.op_class, r.role): (r.batch, r.m, r.n, r.k) for r in of_class(backend, *ATTENTION)}
    assert sizes == {
        ("attention_qk", "fprop"): (8, 20, 20, 16), ("attention_qk", "dgrad"): (8, 20, 16, 20),
        ("attention_qk", "wgrad"): (8, 20, 16, 20), ("attention_pv", "fprop"): (8, 20, 16, 20),
        ("attention_pv", "dgrad"): (8, 20, 20, 16), ("attention_pv", "wgrad"): (8, 16, 20, 20)}
    assert all(r.lowered for r in of_class(backend, *ATTENTION)) and not of_class(backend, "bmm")


class LinearAttention(Attention):
    """No softmax but that of a loss, behind layers with a bias."""

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = (q.relu() @ (k.relu().mT @ v)).transpose(1, 2).flatten(2)
        return F.log_softmax(x + self.o(y), -1).mean()


def test_a_loss_behind_a_layer_is_no_softmax_of_scores():
    model, inputs = LinearAttention(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, Policy(None).on("bmm", "mxfp8"))
    step(compiled, model, inputs)
    assert len(of_class(backend, "bmm")) == 6 and not of_class(backend, *ATTENTION)


@pytest.mark.parametrize("name", QUANTISING)
def test_every_recipe_on_attention(name):
    model, inputs = Attention(), data(2, 32, 64, grad=True)()
    compiled, backend = compile_eager(model, Policy(None).on("attention", name))
    got, want = step(compiled, model, inputs), step(model, model, inputs)
    assert_close(got, want, least=0.6)
    assert any(cosine(grad, want[1][key]) < 1 - 1e-7 for key, grad in got[1].items())
    recipe, found = recipes()[name], of_class(backend, *ATTENTION)
    assert {r.role for r in found if r.lowered} == {
        role for role in ALL if getattr(recipe, role) is not None and getattr(recipe, role).a.spec is not None}


@pytest.mark.parametrize("spec", ("e4m3/32 e8m0 ceil nearest", "e4m3/row fp32 amax_pow2 nearest",
                                  "e4m3/tensor fp32 amax nearest", "e2m1/16 e4m3 amax nearest"))
def test_a_batch_is_its_matrices_quantised(spec):
    q = QuantSpec.parse(spec)
    name = {"e4m3/32": "mxfp8", "e4m3/row": "fp8-rowwise", "e4m3/tensor": "fp8", "e2m1/16": None}[spec.split()[0]]
    recipe = recipes()[name] if name else recipes()["nvfp4"]
    a, b = pair((3, 24, 40), (3, 40, 16))
    model = Pair(torch.bmm)
    compiled, _ = compile_eager(model, Policy(None).on("bmm", recipe))
    got = compiled(a, b)

    def values(x, spec=q):
        amax = reference.largest_magnitude(x)
        codes, scales, _ = reference.quantize(x, spec, amax=amax)
        return reference.dequantize(codes, scales, spec, amax=amax)[:, : x.shape[1]]

    right = values(b.transpose(1, 2).reshape(-1, 40), recipe.fprop.b.spec).reshape(3, 16, 40).transpose(1, 2)
    expected = values(a.reshape(-1, 40)).reshape(3, 24, 40) @ right
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product, shapes, batch", (
    (torch.bmm, ((3, 24, 40), (3, 40, 16)), 3),
    (torch.mm, ((24, 40), (40, 16)), 1),
    (lambda a, b: torch.einsum("bhik,bhjk->bhij", a, b), ((2, 3, 24, 40), (2, 3, 16, 40)), 6),
    (lambda a, b: torch.baddbmm(torch.ones(3, 24, 16), a, b), ((3, 24, 40), (3, 40, 16)), 3),
    (lambda a, b: a @ b.mT, ((3, 24, 40), (3, 16, 40)), 3),
    (lambda a, b: a @ a.mT + b, ((3, 24, 40), (3, 24, 24)), 3),
))
@pytest.mark.parametrize("recipe", ("fp8", "quartet", "halo-int8-2"))
def test_forms_of_a_product(product, shapes, batch, recipe):
    model, inputs = Pair(product), pair(*shapes)
    compiled, backend = compile_eager(model, Policy(None).on("bmm", recipe))
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.7)
    assert {(r.role, r.batch, r.lowered) for r in backend.records} == {(role, batch, True) for role in ALL}


@pytest.mark.parametrize("name", ("fp8-delayed", "fp8-trillion"))
def test_a_product_without_a_weight_is_scaled_by_its_current_amax(name):
    """Nothing could hold its history. Alone in its graph it once left a table of histories without entries."""
    model, inputs = Pair(torch.bmm), pair((3, 24, 40), (3, 40, 16))
    compiled, backend = compile_eager(model, Policy(None).on("bmm", name))
    for _ in range(2):
        assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.99)
    assert backend.count("amax_begin") == backend.count("amax_record") == 0
    assert {r.notes for r in backend.records if r.lowered} == {
        ("scaled by the current amax: no weight of its own to keep a history for",)}


def test_a_product_without_a_weight_beside_one_that_has_a_history():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(40, 40, bias=False)

        def forward(self, a, b):
            return self.layer(a) @ b + a @ b

    model, inputs = Net(), pair((24, 40), (40, 40))
    compiled, backend = compile_eager(model, Policy("fp8-delayed").on("bmm", "fp8-delayed"))
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.99)
    assert sorted(state_dict(model)["delayed"]) == [f"layer.weight.{operand}" for operand in "ewx"]
    assert {bool(r.notes) for r in backend.records if r.op_class == "bmm"} == {True}
    assert {r.notes for r in backend.records if r.op_class == "linear"} == {()}


def test_a_batch_of_weights_is_grouped():
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 40, 16))})

    def run(x):
        return torch.bmm(x, model["w"])

    (x,) = pair((3, 24, 40))
    compiled, backend = compile_eager(run, Policy(None).on("grouped", "mxfp8"), fullgraph=False)
    got, want = compiled(x), run(x)
    assert cosine(got, want) > 0.999 and not torch.equal(got, want)
    assert [(r.op_class, r.role) for r in backend.records if r.lowered][0] == ("grouped", "fprop")


def test_products_of_activations_are_left_alone_unless_a_rule_names_them():
    model, inputs = Attention(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, "quartet")
    step(compiled, model, inputs)
    reasons = {r.op_class: r.reason for r in of_class(backend, *ATTENTION)}
    assert reasons == {c: f"recipe 'quartet' leaves {c} in high precision unless a rule names it" for c in ATTENTION}


def test_roles_of_attention_by_policy():
    policy = Policy(None).on("attention_qk", "mxfp8", role="fprop").on("attention_pv", "fp8", role=("fprop", "dgrad"))
    model, inputs = Attention(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, policy)
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.98)
    assert {(r.op_class, r.role, r.recipe) for r in backend.records if r.lowered} == {
        ("attention_qk", "fprop", "mxfp8"), ("attention_pv", "fprop", "fp8"), ("attention_pv", "dgrad", "fp8")}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_and_autocast(dtype):
    model, (x,) = Attention(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, Policy(None).on("attention", "mxfp8"))
    with torch.autocast("cpu", dtype):
        got, want = step(compiled, model, (x,)), step(model, model, (x,))
    assert_close(got, want, least=0.98)
    assert all(r.lowered and r.dtype == str(dtype).removeprefix("torch.") for r in of_class(backend, *ATTENTION))


def test_symbolic_sizes():
    model = Attention()
    compiled, backend = compile_eager(model, Policy(None).on("attention", "quartet"), dynamic=True)
    for batch, length in ((2, 33), (3, 20), (5, 47)):
        inputs = data(batch, length, 64, grad=True)()
        assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.6)
    assert backend.calls == 1 and all(isinstance(r.m, str) for r in of_class(backend, "attention_qk"))


def test_a_checkpointed_attention_repeats_its_random_bits():
    model, inputs = Attention(), data(2, 32, 64, grad=True)()
    policy = Policy(None).on("attention", "quartet")
    plain, _ = compile_eager(model, policy)
    again, _ = compile_eager(lambda x: checkpoint(model, x, use_reentrant=False), policy)
    first, second = step(plain, model, inputs), step(again, model, inputs)
    for name, grad in first[1].items():
        torch.testing.assert_close(second[1][name], grad, rtol=1e-5, atol=1e-7)


# scaled_dot_product_attention

def test_fused_attention_is_reported_and_stays_fused():
    model, inputs = Attention(fused=True), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, Policy(None).on("attention", "fp8"))
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.999)
    found = of_class(backend, *ATTENTION)
    assert {(r.op_class, r.role) for r in found} == {(c, role) for c in ATTENTION for role in ALL}
    assert all("open_attention=True" in r.reason and not r.lowered and r.batch == 8 for r in found)


@pytest.mark.parametrize("kv_heads", (4, 2))
def test_opened_attention_is_the_same_function(kv_heads):
    model, inputs = Attention(fused=True, kv_heads=kv_heads), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, Policy(None), open_attention=True)
    got, want = step(compiled, model, inputs), step(model, model, inputs)
    for name, grad in got[1].items():
        torch.testing.assert_close(grad, want[1][name], rtol=1e-4, atol=1e-6)
    compiled, backend = compile_eager(model, Policy(None).on("attention", "mxfp8"), open_attention=True)
    assert_close(step(compiled, model, inputs), want, least=0.98)
    assert {r.op_class for r in backend.records if r.lowered} == set(ATTENTION)


def test_opening_changes_no_setting_of_pytorch_and_is_part_of_the_key():
    from torch.backends import cuda

    def settings():
        return (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
                cuda.cudnn_sdp_enabled())

    before = settings()
    model, inputs = Attention(fused=True), data(2, 20, 64, grad=True)()
    report = explain(model, *inputs, options={"policy": "fp8", "open_attention": True})
    assert settings() == before and {r.op_class for r in report} == {"linear", *ATTENTION}
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    options = [Options.parse(None, {"policy": "fp8", "open_attention": opened}) for opened in (False, True)]
    assert len({make_pipeline(gm, [], each).config.key() for each in options}) == 2


class Flex(nn.Module):
    """FlexAttention, whose mask and score are graphs inside of its operator that return one node each."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
        y = flex.flex_attention(q, k, v, block_mask=mask, score_mod=lambda score, b, h, i, j: score + 0.01 * (i - j))
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("trains", [True, False])
def test_graphs_inside_of_flex_attention_are_left_alone(monkeypatch, trains):
    monkeypatch.setattr(flex, "_validate_device", lambda *operands: None)  # it refuses to train on a CPU
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
    with torch.set_grad_enabled(trains):
        report = explain(Flex(), torch.randn(2, 128, 64), mask, options={"policy": "fp8"}, target="sm_90")
    rows = {(row.fqn, row.role) for row in report.records if row.lowered}
    roles = ("fprop", "dgrad", "wgrad") if trains else ("fprop",)
    assert rows == {(name, role) for name in ("qkv", "o") for role in roles} - {("qkv", "dgrad")}
    inside = [row for row in report.records if row.op_class in ATTENTION]
    assert len(inside) == (6 if trains else 2) and all("flex_attention" in row.reason for row in inside)
