"""Q-EMA (tetrajet-ema): averages and results as their definition has them, through all that torch.compile does."""

import copy
import gc
import io
import weakref
from dataclasses import replace

import pytest
import torch
from harness import ALL, assert_close, assert_same, compile_eager, count, step
from models import MLP, Block, Twice
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet
from quartet import Policy, SpecError, recipes
from quartet.kernels import reference
from quartet.kernels.reference.q_ema import toward
from quartet.kernels.spec import QuantSpec
from quartet.passes import pipeline
from quartet.passes.find.canonicalize import canonicalize
from quartet.passes.find.find_matmuls import find_matmuls
from quartet.passes.plan.plan import plan
from quartet.passes.recipe.q_ema import toward as toward_pass
from quartet.runtime.slots.remembered import WEIGHTS

SPEC = QuantSpec.parse("e2m1/32 e8m0 ceil nearest")


def recipe(decay=0.9):
    return replace(recipes()["tetrajet-ema"], name="ema", average=decay)


def rounded(x):
    codes, scales, _ = reference.quantize(x, SPEC)
    return reference.dequantize(codes, scales, SPEC)[:, : x.shape[1]]


def averages(model):
    return {key: entry["average"] for key, entry in quartet.state_dict(model).get("averages", {}).items()}


def data():
    return [torch.randn(40, 32, requires_grad=True)]


def forward_of(w, average, x):
    return rounded(x) @ rounded(toward(w, average, SPEC)).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_and_results_over_steps(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(32, 48, bias=False).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), 0.3)
    compiled, backend = compile_eager(layer, recipe(0.8))
    expected = None
    nearest = 0
    for _ in range(8):
        w = layer.weight.detach().clone()
        expected = w.float() if expected is None else expected.lerp(w.float(), 1 - 0.8)
        x = torch.randn(40, 32, dtype=dtype)
        layer.zero_grad()
        y = compiled(x)
        want = forward_of(w, expected, x)
        torch.testing.assert_close(y.float(), want.float(), rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)
        nearest += not torch.equal(toward(w, expected, SPEC).float(), rounded(w))
        y.square().sum().backward()
        optimizer.step()
        assert torch.equal(averages(layer)["weight.w"], expected)
    assert nearest >= 6 and backend.lowered() == {"weight": frozenset({"fprop", "wgrad"})} and backend.calls == 1
    assert averages(layer)["weight.w"].dtype is torch.float32


def test_gradients_come_from_the_moved_weight():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 32, bias=False), data()[0]
    nearest = replace(recipes()["tetrajet"], name="n", dgrad=recipes()["bitnet"].dgrad, wgrad=None)
    compiled, _ = compile_eager(layer, replace(nearest, name="m", average=0.5))
    compiled(x).sum().backward()
    with torch.no_grad():
        old = layer.weight.clone()
        layer.weight.mul_(1.3)
    x.grad = None
    e = torch.randn(40, 32)
    compiled(x).backward(e)
    moved = toward(layer.weight.detach(), old.lerp(layer.weight.detach(), 0.5), SPEC)
    torch.testing.assert_close(x.grad, e @ rounded(moved), rtol=1e-5, atol=1e-5)


def test_micro_batches_of_an_optimizer_step_count_once():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    compiled, _ = compile_eager(layer, recipe(0.5))
    step(compiled, layer, data())
    first = layer.weight.detach().clone()
    optimizer.step()
    second = layer.weight.detach().clone()
    for _ in range(3):
        step(compiled, layer, data())
        torch.testing.assert_close(averages(layer)["weight.w"], first.lerp(second, 0.5))


def test_inference_reads_and_changes_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    compiled, _ = compile_eager(layer, recipe(0.5))
    x = torch.randn(8, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), rounded(x) @ rounded(layer.weight).t())
    assert averages(layer) == {}
    step(compiled, layer, data())
    optimizer.step()
    before = averages(layer)["weight.w"]
    with torch.no_grad():
        y = compiled(x)
    assert torch.equal(averages(layer)["weight.w"], before)
    torch.testing.assert_close(y, compiled(x).detach())  # as the next training step has it
    assert not torch.equal(averages(layer)["weight.w"], before)


def test_moving_alone_leaves_the_rest(monkeypatch):
    monkeypatch.setattr(pipeline, "PASSES", (canonicalize, find_matmuls, plan, toward_pass))
    model, inputs = MLP(), [torch.randn(40, 64, requires_grad=True)]
    compiled, backend = compile_eager(model, recipe())
    got = step(compiled, model, inputs)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("up", "down"):
            weight = getattr(moved, name).weight
            weight.copy_(toward(weight, weight, SPEC))
    want = step(moved, moved, inputs)
    assert torch.equal(got[0], want[0]) and backend.count("toward") == 2


class Checkpointed(MLP):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_recomputation_reads_and_does_not_advance():
    torch.manual_seed(0)
    plain, model = MLP(), Checkpointed()
    model.load_state_dict(plain.state_dict())
    first, _ = compile_eager(plain, recipe())
    second, backend = compile_eager(model, recipe())
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (plain, model)]
    for number in range(3):
        inputs = [torch.randn(40, 64, requires_grad=True)]
        assert_same(step(second, model, inputs, number), step(first, plain, inputs, number))
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(averages(plain).values(), averages(model).values(), strict=True))
    backward, = backend.backwards()
    assert count(backward, "toward") >= 1 and count(backward, "average_advance") == 0


@pytest.mark.parametrize("model", [Block, Twice])
def test_models(model):
    torch.manual_seed(0)
    model, inputs = model(), [torch.randn(2, 20, 64, requires_grad=True)]
    compiled, backend = compile_eager(model, "tetrajet-ema")
    assert_close(step(compiled, model, inputs), step(model, model, inputs))
    weights = {f"{name}.w" for name, p in model.named_parameters() if p.dim() == 2}
    assert set(averages(model)) == weights and backend.count("average_advance") == len(weights)
    assert all(roles == ALL for roles in backend.lowered().values())


def test_parts_of_one_parameter_have_averages_of_their_own():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 32))

        def forward(self, x):
            a, b, c = (torch.nn.functional.linear(x, w) for w in self.weight.chunk(3))
            return torch.tanh(a) * b + c

    model, inputs = Chunked(), data()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, inputs)
    found = averages(model)
    assert set(found) == {"weight.w", "weight.w2", "weight.w3"}
    assert torch.equal(torch.cat(list(found.values())), model.weight.detach())


def test_autocast_averages_the_parameter_itself():
    torch.manual_seed(0)
    model, x = nn.Linear(32, 32), data()[0]
    compiled, _ = compile_eager(model, recipe())
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    y.float().sum().backward()
    assert torch.equal(averages(model)["weight.w"], model.weight.detach())


def test_symbolic_tokens():
    torch.manual_seed(0)
    model = MLP()
    compiled, backend = compile_eager(model, recipe(), dynamic=True)
    for n in (40, 24, 9):
        inputs = [torch.randn(n, 64, requires_grad=True)]
        assert_close(step(compiled, model, inputs), step(model, model, inputs), 0.85)
    assert backend.calls == 1


def trained(model, compiled, steps, optimizer):
    losses = []
    for number in steps:
        torch.manual_seed(number)
        losses.append(step(compiled, model, [torch.randn(40, 64)], number)[0].item())
        optimizer.step()
    return losses


def test_a_resumed_run_goes_on_bit_for_bit():
    torch.manual_seed(0)
    model = MLP()
    names = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    compiled, _ = compile_eager(model, recipe())
    trained(model, compiled, range(3), optimizer)
    assert list(model.state_dict()) == names
    file = io.BytesIO()
    torch.save({"quartet": quartet.state_dict(model), "model": model.state_dict()}, file)
    expected = trained(model, compiled, range(3, 7), optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch._dynamo.reset()
    other = MLP()
    compiled, _ = compile_eager(other, recipe())
    optimizer = torch.optim.SGD(other.parameters(), 0.5)
    trained(other, compiled, [9], optimizer)
    quartet.load_state_dict(compiled, saved["quartet"])
    other.load_state_dict(saved["model"])
    assert trained(other, compiled, range(3, 7), optimizer) == expected
    for key, value in averages(model).items():
        assert torch.equal(averages(other)[key], value)


def test_loading_a_state_without_averages_drops_them():
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, [torch.randn(40, 64)])
    assert averages(model)
    quartet.load_state_dict(model, {"delayed": {}})
    assert averages(model) == {}
    with pytest.raises(ValueError, match="a parameter 'uq.weight' that the model does not have; the nearest is"):
        quartet.load_state_dict(model, {"delayed": {}, "averages": {"uq.weight.w": {"average": torch.zeros(1)}}})
    with pytest.raises(ValueError, match="entry 'up.weight.w' of the state"):
        quartet.load_state_dict(model, {"delayed": {}, "averages": {"up.weight.w": {"average": 1}}})


def test_explain_leaves_no_average():
    model = MLP()
    report = quartet.explain(model, torch.randn(40, 64), options={"policy": "tetrajet-ema"})
    assert averages(model) == {} and "rounds toward its moving average (0.998)" in str(report)


def test_it_stops_an_oscillation():
    """A weight that is pushed to and fro over the middle of two codes changes its code every time, but not this one."""
    def changes(name):
        torch.manual_seed(0)
        torch._dynamo.reset()
        layer = nn.Linear(32, 1, bias=False)
        compiled, _ = compile_eager(layer, name)
        with torch.no_grad():
            layer.weight.fill_(2.52)
            layer.weight[0, 0] = 6
        x, seen = torch.eye(32), []
        for number in range(20):
            seen.append(compiled(x)[1:].detach().clone())
            with torch.no_grad():
                layer.weight[0, 1:] += 0.05 * (-1) ** (number + 1)
        return sum(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))

    assert changes("tetrajet") == 19 and changes("tetrajet-ema") <= 1


def test_impossible_recipes_are_refused():
    base = recipes()["tetrajet-ema"]
    for decay in (1.0, -0.1, 1, "0.9"):
        with pytest.raises(SpecError, match="such as 0.998"):
            replace(base, name="x", average=decay)
    for other in ("fp8", "nvfp4", "fp4-dge"):
        with pytest.raises(SpecError, match="needs W of fprop in e2m1"):
            replace(recipes()[other], name="x", average=0.9)
    with pytest.raises(SpecError, match="use one of the two"):
        replace(base, name="x", smooth="channel")


def test_the_decay_is_data():
    policies = [Policy(recipe(decay)) for decay in (0.9, 0.99, 0.0)]
    assert len({p.digest() for p in policies}) == 3
    assert all(Policy.from_toml(p.to_toml()) == p for p in policies)


def test_a_product_of_two_activations_has_no_average():
    """Also of two matrices, whose second comes from a weight: it is another matrix in each step."""
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)

        def forward(self, x):
            return self.a(x) @ self.b(x).t()

    model, inputs = Scores(), [torch.randn(32, 40, requires_grad=True)]
    compiled, backend = compile_eager(model, replace(recipe(), name="everything", skip=()))
    step(compiled, model, inputs)
    assert sorted(quartet.state_dict(model)["averages"]) == ["a.weight.w", "b.weight.w"]
    (note,) = {r.notes for r in backend.records if r.op_class == "bmm" and r.role == "fprop"}
    assert "no moving average of such a weight" in note[-1]


def test_an_average_goes_with_its_model():
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    compiled(torch.randn(40, 64)).sum().backward()
    average = WEIGHTS.of.get(model.up.weight).averages["w"]
    assert average.value.grad_fn is None and not average.value.requires_grad
    parameter, value = weakref.ref(model.up.weight), weakref.ref(average.value)
    del model, compiled, _, average
    torch._dynamo.reset()
    gc.collect()
    assert parameter() is None and value() is None


def test_parts_are_numbered_whatever_the_policy_leaves_alone():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 32))

        def forward(self, x):
            a, b = self.weight.split((32, 64))
            return torch.nn.functional.linear(x, a).sum(1) + torch.nn.functional.linear(x, b).sum(1)

    for smallest, names in ((1, {"weight.w", "weight.w2"}), (64, {"weight.w2"})):
        torch._dynamo.reset()
        model = Chunked()
        policy = Policy(None).on("*", recipe(), shape=f"n >= {smallest}")
        compiled, _ = compile_eager(model, policy)
        step(compiled, model, data())
        assert set(averages(model)) == names
