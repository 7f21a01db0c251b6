"""The seed decides everything: runs repeat, steps differ, a resumed run goes on bit for bit."""

import copy

import pytest
import torch
from harness import assert_same, compile_eager, eager_backend, step
from models import MLP, Llama, Residual, data, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from quartet.runtime.streams import draw


def train(model, compiled, optimizer, steps, start=0):
    losses = []
    for i in range(start, start + steps):
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        loss = compiled(x).square().mean() + compiled(x + 1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh(seed=0, drop=0.0):
    torch.manual_seed(seed)
    model = Residual(lambda block, x: nn.functional.dropout(block(x), drop))
    return model, compile_eager(model)[0], torch.optim.AdamW(model.parameters(), lr=1e-2)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_same_seed_trains_alike_and_another_seed_does_not():
    runs = []
    for seed in (1, 1, 2):
        model, compiled, optimizer = fresh()
        torch.manual_seed(seed)
        runs.append((train(model, compiled, optimizer, 3), state(model)))
    assert runs[0][0] == runs[1][0] and equal(runs[0][1], runs[1][1])
    assert not equal(runs[0][1], runs[2][1])


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_resumed_run_is_the_unbroken_run(tmp_path, drop):
    model, compiled, optimizer = fresh(drop=drop)
    torch.manual_seed(1)
    train(model, compiled, optimizer, 10)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
               tmp_path / "checkpoint.pt")
    losses = train(model, compiled, optimizer, 10, start=10)
    unbroken = state(model)

    torch._dynamo.reset()
    model, compiled, optimizer = fresh(seed=99, drop=drop)
    saved = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert train(model, compiled, optimizer, 10, start=10) == losses
    assert equal(state(model), unbroken)


@pytest.mark.parametrize("kernels", [(), ("cpp",)])
def test_two_steps_on_one_input_never_share_bits(kernels):
    model, (x,) = MLP(), data(40, 64)()
    compiled, _ = compile_eager(model, disable_kernels=kernels)
    torch.manual_seed(1)
    gradients = []
    for _ in range(3):
        model.zero_grad()
        compiled(x).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in ("up.weight", "down.weight"):
        a, b, c = (g[name] for g in gradients)
        assert not torch.equal(a, b) and not torch.equal(b, c) and not torch.equal(a, c)


def test_layers_of_one_graph_draw_different_bits():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    model[1].weight.data.copy_(model[0].weight.data)

    def run(x):
        return model[0](x).square().sum() + model[1](x.clone()).square().sum()

    compiled, _ = compile_eager(run)
    _, gradients = step(compiled, model, data(40, 64)())
    assert not torch.equal(gradients["0.weight"], gradients["1.weight"])


class Dropping(nn.Module):
    """Two layers around a dropout of PyTorch's or of the test's."""

    def __init__(self, drop):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(64, 96), nn.Linear(96, 64), drop

    def forward(self, x):
        return self.down(self.drop(self.up(x)))


def seeds(backend):
    """Whether each seed leaves the generator as it is."""
    return [len(n.args) > 1 and n.args[1] for gm in backend.forwards() for n in gm.graph.nodes
            if "quartet.seed" in str(n.target)]


NOISE = {
    "dropout": lambda: nn.Dropout(0.5), "normal": lambda: lambda x: x + torch.randn_like(x),
    "drop path": lambda: lambda x: x * torch.bernoulli(torch.full((len(x), 1), 0.5)),
    "checkpointed": lambda: lambda x: checkpoint(nn.functional.dropout, x, 0.5, use_reentrant=False),
}


@pytest.mark.parametrize("name", NOISE)
def test_the_users_random_numbers_are_those_without_the_backend(name):
    """So that two runs from one seed drop the same elements and shuffle alike."""
    model, (x,) = Dropping(NOISE[name]()), data(40, 64, grad=True)()
    found = []
    for policy in ("quartet", "bf16"):
        torch._dynamo.reset()
        compiled, backend = compile_eager(model, policy)
        torch.manual_seed(3)
        for _ in range(3):
            out = compiled(x)
            out.square().mean().backward()
        found.append((torch.get_rng_state(), torch.randperm(100)))
        assert seeds(backend) == ([True] if policy == "quartet" else [])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("drop", [nn.Identity(), nn.Dropout(0.0), nn.Dropout(0.5).eval()])
def test_a_seed_is_drawn_where_nothing_else_moves_the_generator(drop):
    model, (x,) = Dropping(drop), data(40, 64)()
    compiled, backend = compile_eager(model)
    torch.manual_seed(3)
    before, gradients = torch.get_rng_state(), []
    for _ in range(2):
        model.zero_grad()
        compiled(x).square().mean().backward()
        gradients.append(model.up.weight.grad.clone())
    assert seeds(backend) == [False] and not torch.equal(*gradients)
    assert not torch.equal(before, torch.get_rng_state())


def test_a_seed_that_is_read_differs_with_the_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seed, again = (draw(torch.device("cpu"), moves=True) for _ in range(2))
    assert torch.equal(seed, again) and torch.equal(before, torch.get_rng_state())
    assert seed.dtype == torch.int64 and 0 <= seed < 2**62
    torch.rand(1)
    assert not torch.equal(draw(torch.device("cpu"), moves=True), seed)
    torch.set_rng_state(before)
    assert torch.equal(draw(torch.device("cpu"), moves=True), seed) and not torch.equal(draw(torch.device("cpu")), seed)


def test_forward_is_deterministic_and_draws_nothing():
    model, inputs = Llama(), tokens()
    compiled, _ = compile_eager(model)
    first = compiled(*inputs)
    before = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_dict_never_changes_and_copies_train_on():
    model, (x,) = MLP(), data(40, 64)()
    names = {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
    compiled, backend = compile_eager(model)
    expected = step(compiled, model, (x,))
    assert {name: (value.dtype, value.shape) for name, value in model.state_dict().items()} == names
    assert {k.removeprefix("_orig_mod.") for k in compiled.state_dict()} == set(names)
    twin = copy.deepcopy(model)
    assert_same(step(torch.compile(twin, backend=eager_backend()), twin, (x,)), expected)
    other = MLP()
    other.load_state_dict(model.state_dict())
    assert_same(step(torch.compile(other, backend=eager_backend()), other, (x,)), expected)


def test_model_cast_between_steps_compiles_anew():
    model, (x,) = MLP(), data(40, 64)()
    compiled, backend = compile_eager(model)
    step(compiled, model, (x,))
    model.bfloat16()
    loss, gradients = step(compiled, model, (x.bfloat16(),))
    assert torch.isfinite(loss) and gradients["up.weight"].dtype == torch.bfloat16
    assert [r.dtype for r in backend.records] == ["float32"] * 5 + ["bfloat16"] * 5
    assert all(r.lowered for r in backend.records)


@pytest.mark.parametrize("recipe", ["quartet", "fp8-delayed", "tetrajet-ema", "nvfp4"])
@pytest.mark.parametrize("process", [lambda: torch.set_default_device("meta"),
                                     lambda: torch.set_default_dtype(torch.half)], ids=["device", "dtype"])
def test_what_the_process_makes_by_default_changes_nothing(recipe, process):
    results = []
    for change in (lambda: None, process):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = MLP(), torch.randn(40, 64)
        compiled, _ = compile_eager(model, recipe)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            change()
            torch.manual_seed(1)
            for _ in range(3):
                optimizer.zero_grad()
                compiled(x).square().mean().backward()
                optimizer.step()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        results.append(state(model))
    assert equal(*results)
