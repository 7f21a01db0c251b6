"""What a default leaves alone though its class is quantised: small contractions, and what reads the model's input."""

import math

import pytest
import torch
from harness import ALL, FIRST, compile_eager, eager_backend, step
from models import LoRA, data
from torch import nn

from quartet import Policy, explain
from quartet.backend import make_pipeline
from quartet.options import Options

WITHOUT_WGRAD = frozenset({"fprop", "dgrad"})


def lowered(model, *inputs, policy="quartet", fullgraph=True):
    """Module name → roles that are quantised, and → the reasons of the others."""
    compiled, backend = compile_eager(model, policy, fullgraph=fullgraph)
    step(compiled, model, inputs)
    reasons = {(r.fqn, r.role): r.reason for r in backend.records if not r.lowered}
    return backend.lowered(), reasons


@pytest.mark.parametrize("policy", ["quartet", "fp8", "nvfp4"])
def test_contractions_below_a_block_stay_exact(policy):
    if policy == "nvfp4":
        policy = Policy("nvfp4").on("linear", "nvfp4", shape="n == 64 and k == 64")
    model = nn.Sequential(nn.Linear(64, 64), LoRA(rank=16), nn.Linear(64, 64))
    found, reasons = lowered(model, *data(2, 20, 64, grad=True)(), policy=policy)
    assert found["1.a"] == FIRST and found["1.b"] == frozenset({"dgrad", "wgrad"}) and found["0"] == ALL
    assert reasons["1.a", "dgrad"] == reasons["1.b", "fprop"] == (
        "contracts 16 elements, fewer than the 32 of a block: in high precision unless a rule names it")


def test_the_gradient_of_weights_over_few_tokens_stays_exact():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    found, reasons = lowered(model, *data(2, 64, grad=True)())
    assert found == {"0": WITHOUT_WGRAD, "2": WITHOUT_WGRAD}
    assert reasons["2", "wgrad"] == (
        "contracts 2 elements, fewer than the 32 of a block: in high precision unless a rule names it")


def trained_with(model, *counts, **options):
    """What a compiled model's last graph, of so many tokens, is made of; it is trained with each count in turn."""
    compiled, backend = compile_eager(model, "quartet", **options)
    for count in counts:
        backend.records.clear()
        step(compiled, model, data(count, 64, grad=True)())
    return backend


def hidden():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def test_a_short_batch_gets_what_the_first_one_got():
    backend = trained_with(hidden(), 64, 20, dynamic=False)
    assert backend.calls == 2 and backend.lowered() == {"0": ALL, "2": ALL}
    notes = {r.role: " ".join(r.notes) for r in backend.records if r.fqn == "2"}
    assert "decided for the 64 tokens that the layer was first trained with" in notes["wgrad"]
    assert "decided" not in notes["fprop"] + notes["dgrad"]


def test_a_first_batch_of_few_tokens_decides_for_longer_ones():
    backend = trained_with(hidden(), 20, 64, dynamic=False)
    assert backend.calls == 2 and backend.lowered() == {"0": WITHOUT_WGRAD, "2": WITHOUT_WGRAD}
    assert {r.reason for r in backend.records if r.role == "wgrad"} == {
        "contracts 20 elements, fewer than the 32 of a block, in the batch that the layer was first trained with: in "
        "high precision unless a rule names it"}


def test_an_empty_first_batch_decides_nothing():
    assert trained_with(hidden(), 0, 64, 20, dynamic=False).lowered() == {"0": ALL, "2": ALL}


@pytest.mark.parametrize("first, roles", [(20, WITHOUT_WGRAD), (48, ALL)])
def test_a_symbolic_number_of_tokens_counts_as_it_was(first, roles):
    backend = trained_with(hidden(), first, dynamic=True)
    assert backend.lowered() == {"0": roles, "2": roles}


@pytest.mark.parametrize("first, roles", [(20, WITHOUT_WGRAD), (64, ALL)])
def test_evaluation_and_a_look_decide_nothing_for_training(first, roles):
    model = hidden()
    compiled, backend = compile_eager(model, "quartet", dynamic=False)
    for count in (20, 64):
        with torch.no_grad():
            compiled(*data(count, 64)())
        explain(model, *data(count, 64)())
    backend.records.clear()
    step(compiled, model, data(first, 64, grad=True)())
    assert backend.lowered() == {"0": roles, "2": roles}


class Normed(nn.Module):
    """A weight that is computed from two parameters."""

    def __init__(self):
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.last = nn.Linear(64, 64)

    def forward(self, x):
        return self.last(torch.relu(self.inner(x)))


def test_a_parametrised_layer_remembers_too():
    assert trained_with(Normed(), 64, 20, dynamic=False).lowered() == {"inner": ALL, "last": ALL}


def test_only_what_decides_is_in_the_key():
    """Graphs of a symbolic batch are shared by all batches that are decided alike."""
    def key(*counts, model=None):
        model, keys = model or hidden(), []

        def backend(gm, inputs):
            keys.append(make_pipeline(gm, inputs, Options.parse(options={"policy": "quartet"})).uuid())
            return gm

        for count in counts:
            torch._dynamo.reset()
            torch.compile(model, backend=backend, dynamic=True)(*data(count, 64)())
        return keys[-1]

    assert key(40) == key(48) == key(48, 20) != key(20)
    assert key(20) == key(3) == key(20, 48)


@pytest.mark.parametrize("rule, roles", [
    (lambda p: p.on("*.b", "quartet"), ALL), (lambda p: p.on("linear", "quartet"), ALL),
    (lambda p: p.on(recipe="quartet"), frozenset({"dgrad", "wgrad"})),
    (lambda p: p.on(recipe="fp8", shape="k < 32"), frozenset({"dgrad", "wgrad"})),
    (lambda p: p.on("*.b", None), None)])
def test_a_rule_that_names_a_layer_decides(rule, roles):
    model = nn.Sequential(nn.Linear(64, 64), LoRA(), nn.Linear(64, 64))
    found, _ = lowered(model, *data(2, 20, 64, grad=True)(), policy=rule(Policy("quartet")))
    assert found.get("1.b") == roles


class Fourier(nn.Module):
    """Sines and cosines of coordinates at frequencies that are a parameter, and a layer behind them."""

    def __init__(self, coordinates=2):
        super().__init__()
        self.frequencies, self.out = nn.Parameter(torch.randn(coordinates, 32)), nn.Linear(64, 64)

    def forward(self, x):
        p = 2 * math.pi * ((2 * x - 1) @ self.frequencies)
        return self.out(torch.cat([p.sin(), p.cos()], -1))


@pytest.mark.parametrize("coordinates", [2, 64])
@pytest.mark.parametrize("policy", ["quartet", "fp8"])
def test_a_parameter_that_is_no_layers_weight_stays_exact(coordinates, policy):
    found, reasons = lowered(Fourier(coordinates), *data(64, coordinates, grad=True)(), policy=policy)
    assert found == {"out": ALL}
    assert reasons["frequencies", "wgrad"] == (
        "multiplies a floating-point input of the model (x) by a parameter that is no layer's weight: in high "
        "precision unless a rule names it")


class Hidden(nn.Module):
    """Parameters of one's own behind a layer: as ``[in, out]`` and as ``[out, in]``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.a, self.b = nn.Parameter(torch.randn(64, 96) / 8), nn.Parameter(torch.randn(64, 96) / 8)

    def forward(self, x):
        return torch.tanh(self.first(x) @ self.a) @ self.b.t()


def test_a_parameter_between_layers_is_quantised():
    found, _ = lowered(Hidden(), *data(40, 64, grad=True)())
    assert found == {"first": ALL, "a": ALL, "b": ALL}


def features(width):
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


class Series(nn.Module):
    """Windows of several channels, normalised by their own statistics; ``patch`` steps are one token."""

    def __init__(self, channels=3, patch=32):
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(channels * patch, 96)
        self.block, self.head = nn.Linear(96, 96), nn.Linear(96, 4)

    def forward(self, x):
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
        x = self.embed(x.unfold(1, self.patch, self.patch).flatten(2).double().float())
        return self.head(torch.relu(self.block(x)).mean(1))


class Patches(nn.Module):
    """Patches of an image that have as many numbers as the model is wide."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.block(torch.relu(self.embed(x)))


@pytest.mark.parametrize("model, shape, first, inner", [
    (lambda: features(48), (40, 48), "0", {"2"}),
    (lambda: nn.Sequential(nn.BatchNorm1d(48), *features(48)), (40, 48), "1", {"3"}),
    (Series, (16, 96, 3), "embed", {"block"}),
    (Patches, (4, 1, 32, 32), "embed", {"block"}),
])
def test_a_layer_that_reads_the_models_input_stays_exact(model, shape, first, inner):
    model = model()
    for grad in (False, True):
        torch._dynamo.reset()
        found, reasons = lowered(model, *data(*shape, grad=grad)())
        assert set(found) == inner
        assert reasons[first, "fprop"].startswith("reads a floating-point input of the model")
    torch._dynamo.reset()
    assert first in lowered(model, *data(*shape)(), policy=Policy("quartet").on(first, "quartet"))[0]


class Mixed(nn.Module):
    """Numbers and categories of one table."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(10, 64), nn.Linear(96, 64), nn.Linear(64, 64)

    def forward(self, numbers, kinds):
        return self.second(self.first(torch.cat([numbers, self.table(kinds)], -1)).relu())


class Buffered(nn.Module):
    """A layer that reads a table of its own, and one that reads a hidden state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.randn(40, 48))
        self.place, self.block = nn.Linear(48, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.block(x + self.place(self.positions))


class Halved(nn.Module):
    """A graph break before a layer of a width that no layer writes."""

    def __init__(self):
        super().__init__()
        self.block, self.last = nn.Linear(64, 64), nn.Linear(128, 64)

    def forward(self, x):
        h = torch.relu(self.block(x))
        torch._dynamo.graph_break()
        return self.last(torch.cat([h, h], -1))


@pytest.mark.parametrize("model, shape", [
    (lambda: nn.Sequential(nn.Linear(48, 64)), (40, 48)),
    (lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), (40, 64)),
    (lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), (40, 64)),
    (Buffered, (40, 64)), (Halved, (40, 64))])
def test_hidden_states_are_no_inputs(model, shape):
    model = model()
    found, _ = lowered(model, *data(*shape, grad=True)(), fullgraph=False)
    assert set(found) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_a_block_that_is_compiled_by_itself_reads_a_hidden_state():
    """Its first layer reads 48 features, which nothing in it writes but the model does."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.down(self.up(x).relu())

    model = nn.Sequential(nn.Linear(64, 48), Block())
    backend = eager_backend("quartet")
    model[1].compile(backend=backend)
    step(model, model, data(40, 64, grad=True)())
    assert backend.lowered() == {"up": ALL, "down": ALL}


def test_a_mixture_of_numbers_and_embeddings_is_hidden():
    assert set(lowered(Mixed(), torch.randn(40, 32), torch.arange(40) % 10)[0]) == {"first", "second"}


def test_what_a_function_of_several_models_gets_is_their_input():
    """A student and its teacher, which share the features; layers by themselves read what they are given."""
    def net():
        return nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96))

    first, second, x = net(), net(), torch.randn(64, 48)
    compiled, backend = compile_eager(lambda x: (first(x) - second(x)).square().mean(), "quartet")
    compiled(x).backward()
    assert {(r.fqn, r.lowered) for r in backend.records} == {("0", False), ("2", True), ("4", True)}
    assert {r.reason for r in backend.records if r.fqn == "0"} == {
        "reads a floating-point input of the model (x): in high precision unless a rule names it"}
    up, down = nn.Linear(48, 96), nn.Linear(96, 64)
    compiled, backend = compile_eager(lambda x: down(up(x).relu()).square().mean(), "quartet")
    compiled(x).backward()
    assert {r.lowered for r in backend.records if r.fqn == "up"} == {True}
