"""What a mask keeps apart stays apart: no later token changes an earlier result, or takes part in its gradients."""

import math

import pytest
import torch
from harness import ALL, compile_eager
from torch import nn
from torch.nn import functional as F

from quartet import Policy, recipes
from quartet.passes.plan.plan import UnsupportedMatmul
from quartet.policy.possible import obstacle

LENGTH, AT = 48, 20  # token AT is what the later ones must not reach
PRODUCTS = ("attention_qk", "attention_pv", "bmm")
LOCAL = ("quartet", "mxfp8")
QUANTISING = [name for name, recipe in recipes().items() if recipe.quantizes and obstacle(recipe, "bmm") is None]


def future(n=LENGTH):
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def softmax(q, k, v, mask=None, fill=float("-inf")):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores.masked_fill(mask, fill)).softmax(-1) @ v


class Mixer(nn.Module):
    """``[batch, tokens, 64]`` through ``mix(q, k, v, *constants)`` of two heads."""

    def __init__(self, mix, *constants):
        super().__init__()
        self.qkv, self.out, self.mix = nn.Linear(64, 192, bias=False), nn.Linear(64, 64), mix
        for i, constant in enumerate(constants):
            self.register_buffer(f"constant{i}", constant)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = self.mix(q, k, v, *self.buffers())
        return self.out(y.transpose(1, 2).flatten(2))


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_with_a_mask(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def filled(q, k, v):
    return softmax(q, k, v, future(), torch.finfo(q.dtype).min)


def where_of_a_buffer(q, k, v, lower):  # as minGPT has it
    return softmax(q, k, v, lower == 0)


def subtracted(q, k, v):
    lower = torch.tril(torch.ones(LENGTH, LENGTH))
    return (q @ k.mT / 6 - 1e4 * (1 - lower)).softmax(-1) @ v


def added_by_baddbmm(q, k, v, bias):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(bias.expand(len(q), LENGTH, LENGTH), q, k.mT, alpha=1)
    return (scores.softmax(-1) @ v).unflatten(0, (-1, 2))


def linear_attention(q, k, v):
    return (F.elu(q) + 1) @ (F.elu(k) + 1).mT * torch.ones(LENGTH, LENGTH).tril() @ v


def retention(q, k, v, decay):
    return q @ k.mT * decay @ v


def state_space_chunk(q, k, v):
    total = F.logsigmoid(v[..., :1]).cumsum(-2)
    decay = (total - total.mT).masked_fill(future(), float("-inf")).exp()
    return (q @ k.mT * decay) @ v


def columns_first(q, k, v):
    p = (k @ q.mT / 6).masked_fill(future().mT, float("-inf")).softmax(-2)
    return (v.mT @ p).mT


def running_mean(q, k, v):
    return torch.ones(LENGTH, LENGTH).tril() / torch.arange(1, LENGTH + 1)[:, None] @ v


def sinks(q, k, v, bias):  # as GPT-OSS has them: a score of each head that takes part in the softmax and weighs nothing
    sink = torch.ones(1, 2, 1, 1).expand(len(q), 2, LENGTH, 1)
    return torch.cat([q @ k.mT / 6 + bias, sink], -1).softmax(-1)[..., :-1] @ v


class TalkingHeads(Mixer):
    """Heads are mixed before the softmax and after it."""

    def __init__(self):
        super().__init__(self.talk, BIAS)
        self.before, self.after = (nn.Linear(2, 2, bias=False) for _ in range(2))

    def talk(self, q, k, v, bias):
        scores = self.before((q @ k.mT / 6).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + bias
        return self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class TalkingByEinsum(TalkingHeads):
    """The matrix is the second operand before the softmax, the first after it."""

    def talk(self, q, k, v, bias):
        scores = torch.einsum("bhij,gh->bgij", q @ k.mT / 6, self.before.weight) + bias
        return torch.einsum("gh,bhij->bgij", self.after.weight, scores.softmax(-1)) @ v


class TalkingByConvolution(TalkingHeads):
    def __init__(self):
        super().__init__()
        self.before, self.after = (nn.Conv2d(2, 2, 1, bias=False) for _ in range(2))

    def talk(self, q, k, v, bias):
        return self.after((self.before(q @ k.mT / 6) + bias).softmax(-1)) @ v


class BehindExperts(Mixer):
    """What attention reads are experts, weighed by a softmax of scores."""

    def __init__(self):
        super().__init__(lambda q, k, v, bias: (q @ k.mT / 6 + bias).softmax(-1) @ v, BIAS)
        self.router, self.experts = nn.Linear(64, 2), nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        p = self.router(x).softmax(-1)
        h = sum(p[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        q, k, v = (layer(h).unflatten(-1, (2, 32)).transpose(1, 2) for layer in self.qkv)
        return self.out(self.mix(q, k, v, *self.buffers()).transpose(1, 2).flatten(2))


LOWER, BIAS = torch.ones(LENGTH, LENGTH).tril(), torch.zeros(LENGTH, LENGTH).masked_fill(future(), float("-inf"))
CAUSAL = {
    "fused": lambda: Mixer(fused), "fused, mask given": lambda: Mixer(fused_with_a_mask, BIAS),
    "fused, condition given": lambda: Mixer(fused_with_a_mask, ~future()), "filled": lambda: Mixer(filled),
    "buffer": lambda: Mixer(where_of_a_buffer, LOWER), "subtracted": lambda: Mixer(subtracted),
    "baddbmm": lambda: Mixer(added_by_baddbmm, BIAS), "linear attention": lambda: Mixer(linear_attention),
    "retention": lambda: Mixer(retention, LOWER * 0.9), "state space": lambda: Mixer(state_space_chunk),
    "columns first": lambda: Mixer(columns_first), "running mean": lambda: Mixer(running_mean),
    "sinks": lambda: Mixer(sinks, BIAS), "talking heads": TalkingHeads,
    "talking heads, einsum": TalkingByEinsum, "talking heads, convolution": TalkingByConvolution,
    "behind experts": BehindExperts,
}


class TokenMixing(nn.Module):
    """A matrix over tokens with a triangle of weights, as a causal gMLP has it."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(LENGTH, LENGTH) / 7), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(F.linear(x.mT, self.weight.tril()).mT)


def compiled(model, policy, **options):
    return compile_eager(model, policy, open_attention=True, **options)


def rule(recipe):
    return Policy(None).on("attention", recipe).on("bmm", recipe)


def past(run, model, x):
    """Results up to token ``AT``, and the gradients of that token's loss."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = run(x)
    y[:, AT].square().sum().backward()
    return y[:, : AT + 1].detach(), x.grad, [p.grad.clone() for p in model.parameters()]


def assert_causal(run, model, weights=True):
    """``weights``: of their gradients too, which a linear layer that is quantised itself sums over all tokens."""
    x = torch.randn(2, LENGTH, 64)
    other = x.clone()
    other[:, AT + 1:] = 30 * torch.randn(2, LENGTH - AT - 1, 64)
    (y, gx, gw), (z, hx, hw) = past(run, model, x), past(run, model, other)
    assert torch.equal(y, z)
    assert gx[:, : AT + 1].any() and not gx[:, AT + 1:].any() and not hx[:, AT + 1:].any()
    assert torch.equal(gx, hx)
    assert not weights or all(torch.equal(a, b) for a, b in zip(gw, hw, strict=True))


def lowered(backend):
    """Roles that are quantised of each product of activations."""
    rows = [r for r in backend.records if r.op_class in PRODUCTS]
    return [{r.role for r in rows if r.site == site and r.lowered} for site in sorted({r.site for r in rows})]


@pytest.mark.parametrize("recipe", LOCAL)
@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_later_is_seen(name, recipe):
    model = CAUSAL[name]()
    run, backend = compiled(model, rule(recipe))
    assert_causal(run, model)
    scores, mixing = {"fprop"}, {"wgrad" if name == "columns first" else "dgrad"}  # what makes S, and what makes gP
    assert lowered(backend) == ([set()] if name == "running mean" else [scores, mixing])
    contracts = {r for r in backend.records if r.op_class in PRODUCTS and not r.lowered}
    assert contracts and all("contracts tokens under a mask" in r.reason for r in contracts)


@pytest.mark.parametrize("recipe", QUANTISING)
def test_every_recipe_on_causal_attention(recipe):
    model = Mixer(filled)
    run, backend = compiled(model, rule(recipe))
    assert_causal(run, model)
    assert all(roles <= allowed for roles, allowed in zip(lowered(backend), ({"fprop"}, {"dgrad"}), strict=True))


def test_a_triangle_of_weights():
    model = TokenMixing()
    run, backend = compiled(model, Policy(None).on("linear", "mxfp8", shape=f"k == {LENGTH}"))
    assert_causal(run, model)
    rows = [r for r in backend.records if r.k == LENGTH or LENGTH in (r.m, r.n)]
    assert {r.role for r in rows if "under a mask" in r.reason} == {"fprop", "dgrad"}


@pytest.mark.parametrize("recipe", ("fp8", "nvfp4", "fp8-block", "int8"))
def test_what_shares_a_scale_among_tokens_says_so(recipe):
    run, backend = compiled(Mixer(filled), rule(recipe))
    run(torch.randn(2, LENGTH, 64)).sum().backward()
    (scores,) = [r for r in backend.records if (r.op_class, r.role) == ("attention_qk", "fprop")]
    assert not scores.lowered and "shares a scale among tokens" in scores.reason and "mxfp8" in scores.reason


def test_strict_names_what_contracts_tokens():
    run, _ = compiled(Mixer(filled), rule("mxfp8"), strict=True)
    with pytest.raises(Exception, match="dgrad contracts tokens under a mask") as caught:
        run(torch.randn(2, LENGTH, 64)).sum().backward()
    assert UnsupportedMatmul.__name__ in repr(caught.value) + repr(caught.value.__cause__)
    torch._dynamo.reset()
    policy = Policy(None).on("attention_qk", "mxfp8", role="fprop").on("attention_pv", "mxfp8", role="dgrad")
    run, backend = compiled(Mixer(filled), policy, strict=True)
    run(torch.randn(2, LENGTH, 64)).sum().backward()
    assert lowered(backend) == [{"fprop"}, {"dgrad"}]


def rotary(q, k, v, angle):
    def turned(t):
        return t * angle.cos() + torch.cat([-t[..., 16:], t[..., :16]], -1) * angle.sin()

    return softmax(turned(q), turned(k), v)


def capped_and_dropped(q, k, v):
    return F.dropout((30 * (q @ k.mT / 6 / 30).tanh()).softmax(-1), 0.1) @ v


class Biased(nn.Module):
    """Relative positions by a table of parameters, in buckets as T5 has them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 2)

    def forward(self, q, k, v):
        distance = torch.arange(LENGTH)[None] - torch.arange(LENGTH)[:, None]
        bucket = torch.where(distance > 0, 8, 0) + distance.abs().clamp(max=7)
        return (q @ k.mT / 6 + self.table(bucket).permute(2, 0, 1)).softmax(-1) @ v


UNMASKED = {
    "fused": lambda: Mixer(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)), "plain": lambda: Mixer(softmax),
    "rotary": lambda: Mixer(rotary, torch.randn(LENGTH, 32)), "capped and dropped": lambda: Mixer(capped_and_dropped),
    "relative positions": lambda: Mixer(Biased()),
    "activation functions": lambda: Mixer(lambda q, k, v: F.leaky_relu(q) @ (F.elu(k).mT @ F.softplus(v))),
}


@pytest.mark.parametrize("name", UNMASKED)
def test_without_a_mask_all_products_are_quantised(name):
    model = UNMASKED[name]()
    run, backend = compiled(model, rule("fp8"))
    run(torch.randn(2, LENGTH, 64)).sum().backward()
    rows = [r for r in backend.records if r.op_class in PRODUCTS]
    assert len(rows) == 6 and all(r.lowered for r in rows) and {r.role for r in rows} == ALL


def test_padding_of_whole_tokens_is_no_mask_of_a_product():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Mixer(softmax)

        def forward(self, x, there):
            return self.mixer(x * there[..., None]) * there[..., None]

    run, backend = compiled(Padded(), rule("fp8"))
    run(torch.randn(2, LENGTH, 64), torch.rand(2, LENGTH) > 0.3).sum().backward()
    assert all(r.lowered for r in backend.records if r.op_class in PRODUCTS)


LEAKING = {  # forward of a linear layer: X has one scale, or half of one, a tensor
    "fp8", "fp8-delayed", "fp8-trillion", "nvfp4", "quartet2",
    *(f"halo-{element}-{level}" for element in ("fp8", "int8") for level in range(3)),
}


@pytest.mark.parametrize("recipe", [n for n, r in recipes().items() if r.quantizes and n != "fp4-dge"])
def test_linear_layers_of_recipes_with_scales_within_a_row_see_nothing_later(recipe):
    """The others share one scale among all tokens of a batch; ``docs/recipes.md`` names them."""
    assert (recipe in LEAKING) != recipes()[recipe].fprop.a.spec.row_local
    if recipe not in LEAKING:
        model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))
        run, backend = compile_eager(model, Policy(recipe))
        assert_causal(run, model, weights=False)
        assert all(r.lowered for r in backend.records if r.role == "fprop")
