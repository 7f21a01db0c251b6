"""Smooth-SwiGLU: found however it is written, exact until something is quantised, and better where it is."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from harness import ALL, assert_close, assert_same, compile_eager, loss_of, step
from torch import nn

from examples.llama import PRESETS, Llama
from quartet import Policy, SpecError, recipes
from quartet.kernels.reference.products.smooth import smooth_scale
from quartet.passes import pipeline
from quartet.passes.find.canonicalize import canonicalize
from quartet.passes.find.find_matmuls import find_matmuls
from quartet.passes.plan.plan import plan
from quartet.passes.recipe.smooth_swiglu import smooth_swiglu

WIDTH, HIDDEN = 32, 48
FORMS = ("channel", "token")


def recipe(form, base="fp8", **changes):
    return replace(recipes()[base], name=f"smooth-{form}", smooth=form, **changes)


class Gated(nn.Module):
    """down(mix(gate(x), up(x)))."""

    def __init__(self, mix, bias=False, fused=None):
        super().__init__()
        self.mix, self.fused = mix, fused
        if fused:
            self.both = nn.Linear(WIDTH, 2 * HIDDEN, bias=bias)
        else:
            self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x):
        a, b = self.fused(self.both(x)) if self.fused else (self.gate(x), self.up(x))
        return self.down(self.mix(a, b))


GATED = {
    "silu": (lambda a, b: F.silu(a) * b, "silu"),
    "silu, b first": (lambda a, b: b * F.silu(a), "silu"),
    "sigmoid": (lambda a, b: a * torch.sigmoid(a) * b, "silu"),
    "sigmoid with b": (lambda a, b: a * (b * torch.sigmoid(a)), "silu"),
    "quotient": (lambda a, b: a / (1 + torch.exp(-a)) * b, "silu"),
    "reciprocal": (lambda a, b: b * (a * (1 / (1 + torch.exp(-a)))), "silu"),
    "in fp32": (lambda a, b: (F.silu(a.float()) * b.float()).to(a.dtype), "silu"),
    "scaled": (lambda a, b: 0.5 * F.silu(a) * b, "silu"),
    "quick gelu": (lambda a, b: a * torch.sigmoid(1.702 * a) * b, "silu"),
    "flat": (lambda a, b: (F.silu(a.flatten(0, 1)) * b.flatten(0, 1)).view(a.shape), "silu"),
    "dropout": (lambda a, b: F.dropout(F.silu(a) * b, 0.25), "silu"),
    "geglu": (lambda a, b: F.gelu(a) * b, "gelu"),
    "geglu, b first": (lambda a, b: b * F.gelu(a), "gelu"),
    "geglu, tanh": (lambda a, b: F.gelu(a, approximate="tanh") * b, "gelu"),
    "reglu": (lambda a, b: F.relu(a) * b, "relu"),
    "reglu, clamp": (lambda a, b: b * a.clamp(min=0), "relu"),
}
NOT_GATED = {
    "silu alone": lambda a, b: F.silu(a) + b,
    "two activations": lambda a, b: F.silu(a) * F.relu(b),
    "squared relu": lambda a, b: F.relu(a) * F.relu(a) + 0 * b,
    "glu": lambda a, b: torch.sigmoid(a) * b,
    "product": lambda a, b: a * b,
    "three": lambda a, b: F.silu(a) * b * (a + b),
}
FUSED = {
    "chunk": lambda y: y.chunk(2, -1),
    "split": lambda y: y.split(HIDDEN, -1),
    "slices": lambda y: (y[..., :HIDDEN], y[..., HIDDEN:]),
    "pairs": lambda y: (y[..., ::2], y[..., 1::2]),
    "unflatten": lambda y: y.unflatten(-1, (2, HIDDEN)).unbind(-2),
}


def data(dtype=torch.float32):
    return torch.randn(3, 11, WIDTH, dtype=dtype, requires_grad=True)


def smoothed(backend, fqn="down"):
    return {r.role: r.notes for r in backend.records if r.fqn == fqn}


@pytest.fixture
def unquantized(monkeypatch):
    """The passes up to this one: every product in the model's dtype."""
    monkeypatch.setattr(pipeline, "PASSES", (canonicalize, find_matmuls, plan, smooth_swiglu))


def check(model, form, activation, inputs, least=0.9):
    compiled, backend = compile_eager(model, recipe(form))
    got = step(compiled, model, inputs)
    assert_close(got, step(model, model, inputs), least)
    assert smoothed(backend) == dict.fromkeys(ALL, (f"smoothed per {form} ({activation})",))
    return backend


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATED)
def test_forms(name, form):
    mix, activation = GATED[name]
    check(Gated(mix, bias=name == "geglu"), form, activation, [data()], 0.9 if name != "dropout" else -1)


@pytest.mark.parametrize("name", NOT_GATED)
def test_others_are_not_smoothed(name):
    model, inputs = Gated(NOT_GATED[name]), [data()]
    compiled, backend = compile_eager(model, recipe("channel"))
    got = step(compiled, model, inputs)
    assert smoothed(backend) == dict.fromkeys(ALL, ())
    compiled, _ = compile_eager(model, "fp8")
    assert_same(got, step(compiled, model, inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(name, form):
    check(Gated(GATED["silu"][0], fused=FUSED[name]), form, "silu", [data()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "geglu, tanh", "quotient", "in fp32"])
def test_half_precision(name, dtype, form):
    mix, activation = GATED[name]
    check(Gated(mix).to(dtype), form, activation, [data(dtype)])


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    model, x = Gated(GATED["silu"][0]), data()

    def run(x, call=model):
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    compiled, backend = compile_eager(model, recipe(form))
    got = step(lambda x: run(x, compiled), model, [x])
    assert_close(got, step(run, model, [x]), 0.9)
    assert smoothed(backend) == dict.fromkeys(ALL, (f"smoothed per {form} (silu)",))


@pytest.mark.parametrize("form", FORMS)
def test_symbolic_tokens(form):
    model = Gated(GATED["silu"][0])
    compiled, backend = compile_eager(model, recipe(form), dynamic=True)
    for tokens in (10, 7):
        x = torch.randn(3, tokens, WIDTH, requires_grad=True)
        assert_close(step(compiled, model, [x]), step(model, model, [x]), 0.9)
    assert backend.calls == 1 and smoothed(backend)["fprop"]


@pytest.mark.parametrize("form", FORMS)
def test_llama(form):
    model = Llama(replace(PRESETS["tiny"], layers=1), 16)
    inputs = torch.randint(0, 256, (2, 16)), torch.randint(0, 256, (2, 16))
    compiled, backend = compile_eager(model, recipe(form))
    assert_close(step(compiled, model, inputs), step(model, model, inputs), 0.9)
    noted = {r.fqn for r in backend.records if any("smoothed" in note for note in r.notes)}
    assert noted == {"blocks.0.ffn.down_proj"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["silu", "geglu", "reglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_and_gradients_are_unchanged(unquantized, name, form, dtype):
    model, inputs = Gated(GATED[name][0]).to(dtype), [data(dtype)]
    with torch.no_grad():
        model.up.weight[3] *= 1e4
        model.up.weight[4] *= 1e-4
        model.up.weight[5] = 0
        inputs[0][0, 2] *= 1e3
        inputs[0][0, 3] = 0
    compiled, backend = compile_eager(model, recipe(form))
    got = step(compiled, model, inputs)
    ops = [str(n.target) for gm in backend.capture.graphs for n in gm.graph.nodes]
    assert any("amax" in op for op in ops) and not any("quartet" in op for op in ops)
    assert_same(got, step(compile_eager(model, "bf16")[0], model, inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("roles", [{"fprop"}, {"fprop", "wgrad"}, {"fprop", "dgrad"}, {"dgrad"}, {"wgrad"}])
def test_some_roles_only(unquantized, form, roles):
    model, inputs = Gated(GATED["silu"][0]), [data()]
    base = recipe(form, "fp8-rowwise")
    policy = Policy(None)
    for role in roles:
        policy = policy.on("down", base, role=role)
    compiled, backend = compile_eager(model, policy)
    assert_same(step(compiled, model, inputs), step(compile_eager(model, "bf16")[0], model, inputs))
    used = roles if form == "channel" or "wgrad" in roles else roles - {"dgrad"}
    assert bool(used) == any("amax" in str(n.target) for gm in backend.capture.graphs for n in gm.graph.nodes)


def test_scales():
    b = torch.tensor([[[3.0, 0.0, 1e-30, -4.0]], [[-5.0, 0.0, 0.0, 2.0]]])
    s, inverse = smooth_scale(b, "channel")
    assert s.tolist() == [[0.125, 1.0, 2.0**64, 0.25]] and torch.equal(inverse, 1 / s)
    s, inverse = smooth_scale(b, "token")
    assert s.tolist() == [[0.25], [0.125]] and torch.equal(inverse, 1 / s)
    for bad in (float("nan"), float("inf")):
        assert smooth_scale(torch.tensor([[1.5, bad]]), "channel")[0].tolist() == [[0.5, 1.0]]
    assert smooth_scale(torch.zeros(2, 4), "token")[0].tolist() == [[1.0], [1.0]]
    assert smooth_scale(torch.full((1, 1), 1e4, dtype=torch.float16), "token")[0].item() == 2.0**-8


@pytest.mark.parametrize("exponent", range(-40, 41, 8))
def test_largest_magnitude_lies_between_a_half_and_one(exponent):
    b = torch.randn(64, 33) * 2.0**exponent
    for form, axis in (("channel", 0), ("token", 1)):
        top = (b * smooth_scale(b, form)[0]).abs().amax(axis)
        assert ((top > 0.5) & (top <= 1)).all()


def spiky(outlier):
    """(model, tokens, where the signal is) with aligned gate and up weights, so that X is quadratic in the input.

    One channel of both weights is 30 times the others and points along what all tokens have in common, or one token
    is 300 times the others. The signal is in the other channels, or the other tokens.
    """
    torch.manual_seed(0)
    model, x = Gated(GATED["silu"][0]), torch.randn(64, WIDTH)
    with torch.no_grad():
        model.up.weight.normal_(std=WIDTH**-0.5)
        if outlier == "channel":
            common = F.normalize(torch.randn(WIDTH), dim=0)
            model.up.weight -= model.up.weight @ common[:, None] * common
            model.up.weight[7] = 30 * common
            model.down.weight[:, 7] *= 1e-6
            x += 20 * common
        else:
            x[7] *= 300
        model.gate.weight.copy_(model.up.weight)
    others = torch.arange(HIDDEN if outlier == "channel" else len(x)) != 7
    return model, x, others


def errors(outlier, policy):
    """Relative error of the output and of the gradient of the down projection, where the signal is."""
    model, x, others = spiky(outlier)
    compiled, _ = compile_eager(model, policy)

    def run(call):
        model.zero_grad()
        out = call(x)
        if outlier == "channel":
            loss_of(out).backward()
            return out.detach(), model.down.weight.grad[:, others].clone()
        loss_of(out[others]).backward()
        return out[others].detach(), model.down.weight.grad.clone()

    return [float((a - b).norm() / b.norm()) for a, b in zip(run(compiled), run(model), strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_an_outlier_takes_the_signal_from_plain_fp8(form):
    plain, smooth = (errors(form, Policy(None).on("down", r)) for r in ("fp8", recipe(form)))
    for lost, kept in zip(plain, smooth, strict=True):
        assert kept < 0.05 and lost > 5 * kept, (plain, smooth)


@pytest.mark.parametrize("form", FORMS)
def test_under_activation_checkpointing(form):
    class Checkpointed(Gated):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    plain, inputs = Gated(GATED["silu"][0]), [data()]
    model = Checkpointed(plain.mix)
    model.load_state_dict(plain.state_dict())
    policy = recipe(form, "fp8-rowwise")
    expected = step(compile_eager(plain, policy)[0], plain, inputs)
    compiled, backend = compile_eager(model, policy)
    assert_same(step(compiled, model, inputs), expected)
    assert smoothed(backend)["wgrad"]


@pytest.mark.parametrize("form", FORMS)
def test_two_layers_that_read_one_gated_activation(form):
    class Two(Gated):
        def __init__(self, mix):
            super().__init__(mix)
            self.other = nn.Linear(HIDDEN, WIDTH, bias=False)

        def forward(self, x):
            mixed = self.mix(self.gate(x), self.up(x))
            return self.down(mixed) + self.other(mixed)

    model = Two(GATED["silu"][0])
    backend = check(model, form, "silu", [data()])
    assert smoothed(backend, "other") == smoothed(backend)
    amaxes = [n for n in backend.forwards()[0].graph.nodes if str(n.target) == "aten.amax.default"]
    assert len(amaxes) == 1, "one scale for both"


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(SpecError, match="'rows'.*'channel', 'token'"):
        recipe("rows")
