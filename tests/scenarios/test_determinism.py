"""The seed decides everything: runs repeat, steps differ, a resumed run goes on bit for bit."""

import copy

import pytest
import torch
from harness import assert_same, compile_eager, eager_backend, step
from models import MLP, Llama, Residual, data, tokens


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


def fresh(seed=0):
    torch.manual_seed(seed)
    model = Residual(lambda block, x: block(x))
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


def test_resumed_run_is_the_unbroken_run(tmp_path):
    model, compiled, optimizer = fresh()
    torch.manual_seed(1)
    train(model, compiled, optimizer, 10)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
               tmp_path / "checkpoint.pt")
    losses = train(model, compiled, optimizer, 10, start=10)
    unbroken = state(model)

    torch._dynamo.reset()
    model, compiled, optimizer = fresh(seed=99)
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
