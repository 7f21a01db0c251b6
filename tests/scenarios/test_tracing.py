"""What dynamo and autograd can do to a model on the way to the backend."""

import pytest
import torch
from harness import ALL, FIRST, assert_close, assert_same, compile_eager, compile_plain, count, step
from models import BLOCK, MLP, Block, Llama, data, tokens
from torch import nn

from quartet import Policy

NAMED = Policy("quartet").on("linear", "quartet")  # also where fewer than 32 tokens would be left alone
BARE = {name.removeprefix("layers.0."): roles for name, roles in BLOCK.items()}


def test_dynamic_sizes_without_recompiling():
    model = Block()
    compiled, backend = compile_eager(model, dynamic=True)
    step(compiled, model, data(2, 20, 64, grad=True)())
    calls = backend.calls
    for b, t in ((3, 7), (5, 33), (2, 32)):
        inputs = data(b, t, 64, grad=True)()
        assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.6)
    assert backend.calls == calls and backend.lowered() == BARE
    assert any(isinstance(r.k, str) for r in backend.records if r.role == "wgrad")


def test_marked_dynamic_batch_is_the_static_graph_bit_for_bit():
    model = MLP()
    compiled, backend = compile_eager(model)
    static, _ = compile_eager(model, dynamic=False)
    for rows in (40, 3, 65):
        (x,) = data(rows, 64)()
        expected = step(static, model, (x,))
        torch._dynamo.mark_dynamic(x, 0)
        assert_same(step(compiled, model, (x,)), expected)
    assert backend.calls == 1


@pytest.mark.parametrize("shape, policy", [
    ((33, 64), "quartet"), ((41, 64), "quartet"), ((2, 3, 7, 64), "quartet"), ((1, 64), NAMED), ((1, 1, 64), NAMED),
    ((2, 3, 5, 64), NAMED)])
def test_odd_token_counts(shape, policy):
    model, (x,) = MLP(), data(*shape, grad=True)()
    compiled, backend = compile_eager(model, policy)
    got = step(compiled, model, (x,))
    assert backend.lowered() == {"up": ALL, "down": ALL}
    assert_close(got, step(model, model, (x,)), least=0.5)
    padded = [r for r in backend.records if r.role == "wgrad"]
    assert all("k padded to" in r.notes[0] for r in padded)


def test_graph_break_gives_two_graphs_that_are_both_lowered():
    class Broken(MLP):
        def forward(self, x):
            x = self.up(x)
            torch._dynamo.graph_break()
            return self.down(x)

    model, inputs = Broken(), data(40, 64)()
    compiled, backend = compile_eager(model, fullgraph=False)
    got = step(compiled, model, inputs)
    assert backend.calls == 2 and backend.lowered() == {"up": FIRST, "down": ALL}
    assert_close(got, step(model, model, inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_forward_is_the_training_forward(mode):
    model, (x,) = Block(), data(2, 20, 64)()
    compiled, backend = compile_eager(model)
    expected = compiled(x).detach()
    with mode():
        assert torch.equal(compiled(x), expected)
    assert backend.calls == 2
    inference = backend.capture.graphs[-1]
    assert count(inference, "cpu_quantize") + count(inference, "quantize") == 7 + 4
    assert count(inference, "seed") == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_every_matmul(dtype):
    model, inputs = Block(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model)
    with torch.autocast("cpu", dtype):
        got, expected = step(compiled, model, inputs), step(model, model, inputs)
    assert backend.lowered() == BARE
    assert {r.dtype for r in backend.records} == {str(dtype).removeprefix("torch.")}
    assert all(grad.dtype == torch.float32 for grad in got[1].values())
    assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_float_dtypes_are_left_alone_with_a_reason(dtype):
    model = nn.Linear(64, 48, dtype=dtype)
    x = torch.randn(8, 64, dtype=dtype)

    def run(x):
        return torch.view_as_real(model(x)).sum() if dtype.is_complex else model(x).sum()

    compiled, backend = compile_eager(run)
    assert_same(step(compiled, model, (x,)), step(compile_plain(run), model, (x,)))
    assert not backend.lowered()
    assert str(dtype).removeprefix("torch.") in backend.records[0].reason


def test_integer_matmul_is_left_alone():
    weight = nn.Parameter(torch.randint(-5, 5, (32, 16)), requires_grad=False)
    compiled, backend = compile_eager(lambda x: x @ weight)
    x = torch.randint(-5, 5, (8, 32))
    assert torch.equal(compiled(x), x @ weight)
    assert ["int64" in r.reason for r in backend.records] == [True]


def test_regional_compile_shares_one_graph_between_layers():
    model, inputs = Llama(layers=3), tokens()
    expected = step(model, model, inputs)
    _, backend = compile_eager(model)
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    got = step(model, model, inputs)
    assert backend.calls == 1
    assert backend.lowered() == BARE
    assert_close(got, expected)


class Region(Block):
    forward = torch.compiler.nested_compile_region(Block.forward)


def test_nested_compile_region_is_lowered_once_for_all_layers():
    model, inputs = Llama(layers=2), tokens()
    expected = step(model, model, inputs)
    for layer in model.layers:
        layer.__class__ = Region
    compiled, backend = compile_eager(model)
    got = step(compiled, model, inputs)
    assert backend.lowered() == BLOCK
    assert_close(got, expected)
    assert not torch.equal(got[0], expected[0])


class RegionMLP(MLP):
    forward = torch.compiler.nested_compile_region(MLP.forward)


def test_region_that_multiplies_its_input_itself():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = RegionMLP(64, 96, 64), RegionMLP(64, 96, 64)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model, inputs = Net(), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model)
    got = step(compiled, model, inputs)
    assert backend.lowered() == {"a.up": ALL, "a.down": ALL}
    assert_close(got, step(model, model, inputs))


def test_compiled_autograd_gives_the_same_gradients():
    model, inputs = MLP(), data(40, 64, grad=True)()
    compiled, _ = compile_eager(model)
    expected = step(compiled, model, inputs)
    torch._dynamo.reset()
    compiled, backend = compile_eager(model)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        assert_same(step(compiled, model, inputs), expected)
    assert backend.lowered() == {"up": ALL, "down": ALL}


def test_compiled_autograd_does_not_quantise_backward_twice():
    model, inputs = Llama(), tokens()
    compiled, _ = compile_eager(model)
    expected = step(compiled, model, inputs)
    torch._dynamo.reset()
    compiled, backend = compile_eager(model)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
        assert_same(step(compiled, model, inputs), expected)
    assert backend.lowered() == BLOCK


def test_gradient_accumulation_adds_up():
    model, (x,) = MLP(), data(40, 64)()
    compiled, _ = compile_eager(model)
    first, second = step(compiled, model, (x,), seed=1), step(compiled, model, (x,), seed=2)
    model.zero_grad()
    for seed in (1, 2):
        torch.manual_seed(seed)
        compiled(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, first[1][name] + second[1][name])


def test_retained_graph_replays_the_same_bits():
    model, (x,) = MLP(), data(40, 64)()
    with torch._functorch.config.patch(donated_buffer=False):
        compiled, _ = compile_eager(model)
        loss = compiled(x).square().mean()
        first = torch.autograd.grad(loss, tuple(model.parameters()), retain_graph=True)
        torch.rand(3)
        second = torch.autograd.grad(loss, tuple(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_seed_is_drawn_in_forward():
    model, (x,) = MLP(), data(40, 64)()
    compiled, backend = compile_eager(model)
    torch.manual_seed(4)
    loss = compiled(x).sum()
    after = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(4)
    torch.randint(0, 2**62, [1])
    assert torch.equal(torch.get_rng_state(), after)
    assert [count(gm, "seed") for gm in backend.capture.graphs] == [1, 0]
