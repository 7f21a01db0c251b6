"""Delayed scaling: histories as their definition has them, through everything that torch.compile does to a model."""

import contextlib
import copy
import io
import math
import weakref
from dataclasses import replace

import pytest
import torch
from harness import compile_eager, count, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet
from quartet import Delayed, Gemm, Operand, Policy, QuantSpec, Recipe, SpecError
from quartet.kernels import reference
from quartet.runtime.slots import amax
from quartet.runtime.slots.remembered import WEIGHTS

SPEC = QuantSpec.parse("e4m3/tensor fp32 delayed nearest")
WIDTH = 32


def recipe(history=None, name="delayed"):
    operand, saved = Operand(SPEC), Operand(SPEC, "saved")
    return Recipe(name, fprop=Gemm(operand, operand), dgrad=Gemm(operand, saved), wgrad=Gemm(operand, saved),
                  history=history or Delayed(4))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Checkpointed(MLP):
    def forward(self, x):
        return x + checkpoint(lambda x: self.down(torch.tanh(self.up(x))), x, use_reentrant=False)


def data(scale=1.0):
    return [(torch.randn(40, WIDTH) * scale).requires_grad_()]


def histories(model):
    """key → (pending, history without its empty entries)."""
    found = {}
    for key, entry in quartet.state_dict(model)["delayed"].items():
        pending, *history = entry["amax"].tolist()
        found[key] = pending, [h for h in history if h]
    return found


def assert_state(model, expected):
    got = quartet.state_dict(model)["delayed"]
    assert got.keys() == expected["delayed"].keys()
    for key, entry in got.items():
        want = expected["delayed"][key]
        assert torch.equal(entry["amax"], want["amax"]), key
        assert (entry["due"], entry["counted"]) == (want["due"], want["counted"]), key


class Model:
    """The definition, in Python, of one operand's history."""

    def __init__(self, length):
        self.length, self.history, self.pending = length, [], 0.0

    def advance(self):
        if 0 < self.pending < math.inf:
            self.history = [self.pending, *self.history][: self.length]
        self.pending = 0.0

    def scale_by(self, current):
        return max(self.history) if self.history else current

    def record(self, current):
        self.pending = max(self.pending, current)


@pytest.mark.parametrize("history", [Delayed(4), Delayed(1), Delayed(4, "most_recent"), Delayed(3, "max", 2)], ids=str)
def test_histories_and_results_over_ten_steps(history):
    layer = nn.Linear(WIDTH, 48, bias=False)
    compiled, backend = compile_eager(layer, recipe(history))
    slots = {operand: Model(history.entries) for operand in "xwe"}
    torch.manual_seed(3)
    for number in range(10):
        x = torch.randn(40, WIDTH) * 2.0 ** torch.randn(()).item()
        e = torch.randn(40, 48) * 2.0 ** torch.randn(()).item()
        if number == 4:
            x.zero_()
        if number == 6:
            e[0, 0] = math.inf
        x.requires_grad_()
        layer.weight.grad = None
        with torch.no_grad():
            layer.weight.mul_(1 + 0.1 * torch.randn(()))
        for slot in slots.values():
            slot.advance()
        y = compiled(x)
        y.backward(e)
        with torch.no_grad():
            quantized = {}
            for operand, tensor in {"x": x, "w": layer.weight, "e": e}.items():
                current = tensor.abs().max().item()
                by = torch.tensor([[slots[operand].scale_by(current) * 2.0**history.margin]])
                slots[operand].record(current)
                codes, scales, _ = reference.quantize(tensor.detach(), SPEC, amax=by)
                quantized[operand] = reference.dequantize(codes, scales, SPEC)
            q = quantized
            torch.testing.assert_close(y, q["x"] @ q["w"].t(), equal_nan=True)
            torch.testing.assert_close(x.grad, q["e"] @ q["w"], equal_nan=True)
            torch.testing.assert_close(layer.weight.grad, q["e"].t() @ q["x"], equal_nan=True)
        state = histories(layer)
        for operand, slot in slots.items():
            pending, kept = state[f"weight.{operand}"]
            assert pending == pytest.approx(slot.pending, rel=1e-7), (number, operand)
            assert kept == pytest.approx(slot.history, rel=1e-7), (number, operand)
    assert backend.calls == 1


def test_micro_batches_of_an_optimizer_step_count_once():
    layer = nn.Linear(WIDTH, 48, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    compiled, _ = compile_eager(layer, recipe())
    sizes = iter((3.0, 5.0, 2.0, 7.0, 4.0, 1.0, 6.0))

    def forward():
        size = next(sizes)
        x = torch.full((40, WIDTH), size)
        compiled(x).sum().backward()

    forward()
    optimizer.step()  # from here on the optimizer is known
    forward(), forward(), forward()
    assert histories(layer)["weight.x"] == (7.0, [3.0])
    optimizer.step()
    forward(), forward()
    assert histories(layer)["weight.x"] == (4.0, [7.0, 3.0])
    assert histories(layer)["weight.e"] == (1.0, [1.0, 1.0])
    state = quartet.state_dict(layer)
    again = copy.deepcopy(layer)
    quartet.load_state_dict(again, state)
    compiled, _ = compile_eager(again, recipe())
    forward()  # a run that resumes amid the micro-batches goes on with them
    assert histories(again)["weight.x"] == (6.0, [7.0, 3.0])
    assert_state(layer, state)


def test_recomputation_does_not_count_twice():
    torch.manual_seed(0)
    plain, model = MLP(), Checkpointed()
    model.load_state_dict(plain.state_dict())
    first, _ = compile_eager(plain, recipe())
    second, backend = compile_eager(model, recipe())
    for size in (1.0, 3.0, 2.0):
        inputs = data(size)
        a, b = step(first, plain, inputs), step(second, model, inputs)
        assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][name], b[1][name]) for name in a[1])
        assert histories(plain) == histories(model)
    backward, = backend.backwards()
    assert count(backward, "quantize") > 2, "the forward is computed again"
    assert count(backward, "amax_begin") == 0 and count(backward, "amax_record") == 1


def trained(model, compiled, steps, optimizer):
    losses = []
    for number in steps:
        torch.manual_seed(number)
        for _ in range(2):
            losses.append(step(compiled, model, data(1 + number))[0].item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("when", ["before compilation", "after a step"])
def test_a_resumed_run_goes_on_bit_for_bit(when):
    model = MLP()
    before = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    compiled, _ = compile_eager(model, recipe())
    trained(model, compiled, range(3), optimizer)
    assert list(model.state_dict()) == before
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "quartet": quartet.state_dict(model)}, file)
    expected = trained(model, compiled, range(3, 6), optimizer)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch._dynamo.reset()
    other = MLP()
    compiled, _ = compile_eager(other, recipe())
    optimizer = torch.optim.SGD(other.parameters(), 0.05)
    if when == "after a step":
        trained(other, compiled, [9], optimizer)
    other.load_state_dict(saved["model"])
    quartet.load_state_dict(compiled, saved["quartet"])
    assert_state(other, saved["quartet"])
    assert trained(other, compiled, range(3, 6), optimizer) == expected
    assert_state(other, quartet.state_dict(model))

    forgetful = MLP()
    forgetful.load_state_dict(saved["model"])
    compiled, _ = compile_eager(forgetful, recipe())
    optimizer = torch.optim.SGD(forgetful.parameters(), 0.05)
    assert trained(forgetful, compiled, range(3, 6), optimizer) != expected, "the state matters"


def test_evaluation_reads_and_does_not_write():
    model = MLP()
    compiled, backend = compile_eager(model, recipe())
    with torch.no_grad():
        compiled(*data())
    assert not any(h for _, h in histories(model).values()) and "up.weight.e" not in histories(model)
    step(compiled, model, data(3))
    step(compiled, model, data())
    state = quartet.state_dict(model)
    for surroundings in (torch.no_grad(), torch.inference_mode()):
        with surroundings:
            x = torch.randn(40, WIDTH)
            model.eval()
            y = compiled(x)
            assert_state(model, state)
            slots = {k: v["amax"][1:].max().reshape(1, 1) for k, v in state["delayed"].items()}

            def linear(layer, name, x, slots=slots):
                q = [reference.dequantize(*reference.quantize(t, SPEC, amax=slots[f"{name}.weight.{o}"])[:2], SPEC)
                     for o, t in (("x", x), ("w", layer.weight))]
                return q[0] @ q[1].t() + layer.bias

            hidden = linear(model.up, "up", x).tanh()
            torch.testing.assert_close(y, x + linear(model.down, "down", hidden))
    assert sum(count(gm, "amax_read") for gm in backend.capture.graphs) >= 1
    model.train()
    step(compiled, model, data())
    assert len(histories(model)["up.weight.x"][1]) == 2, "training goes on with the same slots"


def test_inference_mode_first():
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    with torch.inference_mode():
        compiled(*data())
    step(compiled, model, data())
    assert histories(model)["up.weight.x"][0] > 0


def test_explain_and_dump_leave_the_state_alone(tmp_path):
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, data())
    state = quartet.state_dict(model)
    report = quartet.explain(model, *data(5), options={"policy": Policy(recipe()), "dump": str(tmp_path)})
    assert "up" in str(report)
    assert_state(model, state)
    fresh = MLP()
    quartet.explain(fresh, *data(5), options={"policy": Policy(recipe())})
    assert quartet.state_dict(fresh) == {"delayed": {}}


def test_a_copy_has_its_own_state():
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, data())
    state = quartet.state_dict(model)
    twin = copy.deepcopy(model)
    assert quartet.state_dict(twin) == {"delayed": {}}
    quartet.load_state_dict(twin, state)
    step(compile_eager(twin, recipe())[0], twin, data(7))
    assert_state(model, state)
    assert histories(twin)["up.weight.x"][1] == [histories(model)["up.weight.x"][0]]


def test_state_goes_with_its_weights():
    model = MLP()
    step(compile_eager(model, recipe())[0], model, data())
    assert len(amax.SLOTS.of(model.up.weight)) == 3
    before = len(WEIGHTS.of)
    torch._dynamo.reset()
    del model
    assert len(WEIGHTS.of) < before


def test_shapes_and_modes_share_slots():
    model = MLP()
    compiled, backend = compile_eager(model, recipe(), dynamic=False)
    for rows, size in ((40, 2.0), (48, 3.0), (40, 5.0)):
        compiled(torch.full((rows, WIDTH), size)).sum().backward()
    assert backend.calls == 2
    assert histories(model)["up.weight.x"] == (5.0, [3.0, 2.0])
    assert len(quartet.state_dict(model)["delayed"]) == 6


def test_symbolic_shapes():
    model = MLP()
    compiled, backend = compile_eager(model, recipe(), dynamic=True)
    for rows, size in ((40, 2.0), (48, 3.0), (45, 5.0)):
        compiled(torch.full((rows, WIDTH), size)).sum().backward()
    assert backend.calls == 1 and histories(model)["up.weight.x"] == (5.0, [3.0, 2.0])


def test_one_graph_for_all_layers_keeps_their_histories_apart():
    layers = nn.ModuleList(MLP() for _ in range(3))
    _, backend = compile_eager(layers[0], recipe())
    for layer in layers:
        layer.compile(backend=backend)
    for _ in range(2):
        x = torch.full((40, WIDTH), 1.0)
        for number, layer in enumerate(layers):
            layer(x * (1 + number)).sum().backward()
    assert backend.calls == 1
    for number in range(3):
        assert histories(layers)[f"{number}.up.weight.x"] == (1.0 + number, [1.0 + number])


def test_graph_breaks():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MLP(), MLP()

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model = Broken()
    compiled, backend = compile_eager(model, recipe(), fullgraph=False)
    for _ in range(3):
        step(compiled, model, data())
    assert backend.calls == 2
    state = histories(model)
    assert len(state) == 12 and all(len(history) == 2 for _, history in state.values())


def test_layers_that_read_one_tensor_share_its_slot():
    class QKV(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x) + self.v(x)

    model = QKV()
    compiled, backend = compile_eager(model, recipe())
    step(compiled, model, [torch.randn(2, 20, WIDTH)])
    assert sorted(histories(model)) == sorted(["q.weight.x", *(f"{n}.weight.{o}" for n in "qkv" for o in "we")])
    assert count(backend.forwards()[0], "quantize") == 4


def test_a_weight_that_is_used_twice_has_a_slot_for_each_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, data())
    assert sorted(histories(model)) == [f"layer.weight.{o}" for o in ("e", "e2", "w", "x", "x2")]


def test_moved_model():
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, data())
    model.to(torch.bfloat16)
    x = torch.full((40, WIDTH), 3.0, dtype=torch.bfloat16)
    compiled(x).sum().backward()
    pending, history = histories(model)["up.weight.x"]
    assert pending == 3.0 and len(history) == 1


def test_mixed_histories_in_one_graph():
    model = MLP()
    policy = Policy(recipe(Delayed(2), "short")).on("down", recipe(Delayed(3), "long"))
    compiled, _ = compile_eager(model, policy)
    for _ in range(5):
        step(compiled, model, data())
    state = histories(model)
    assert len(state["up.weight.x"][1]) == 2 and len(state["down.weight.x"][1]) == 3
    assert all(p == pytest.approx(h[0], rel=0.2) for k, (p, h) in state.items() if k.endswith(".w"))


def test_graphs_without_delayed_scaling_have_no_more_inputs():
    model = MLP()
    compiled, backend = compile_eager(model, "fp8")
    step(compiled, model, data())
    assert quartet.state_dict(model) == {"delayed": {}} and backend.count("amax_begin") == 0
    assert len(backend.forwards()[0].graph.find_nodes(op="placeholder")) == 5


def test_what_cannot_be_loaded_is_refused_and_changes_nothing():
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, data())
    state = quartet.state_dict(model)
    wrong = {"delayed": {"upp.weight.x": state["delayed"]["up.weight.x"]}}
    with pytest.raises(ValueError, match="'upp.weight'.*nearest is 'up.weight'"):
        quartet.load_state_dict(model, wrong)
    with pytest.raises(ValueError, match="'up.weight.x'.*amax"):
        quartet.load_state_dict(model, {"delayed": {"up.weight.x": torch.zeros(3)}})
    with pytest.raises(ValueError, match="'delayed'"):
        quartet.load_state_dict(model, model.state_dict())
    with pytest.raises(TypeError, match="model"):
        quartet.state_dict(state)
    assert_state(model, state)


def test_a_longer_or_shorter_history_takes_what_fits():
    model = MLP()
    compiled, _ = compile_eager(model, recipe(Delayed(4)))
    for size in (1.0, 2.0, 3.0, 4.0):
        compiled(torch.full((40, WIDTH), size)).sum().backward()
    torch._dynamo.reset()
    compiled, _ = compile_eager(model, recipe(Delayed(2)))
    compiled(torch.full((40, WIDTH), 5.0)).sum().backward()
    assert histories(model)["up.weight.x"] == (5.0, [4.0, 3.0])
    torch._dynamo.reset()
    compiled, _ = compile_eager(model, recipe(Delayed(8)))
    compiled(torch.full((40, WIDTH), 6.0)).sum().backward()
    assert histories(model)["up.weight.x"] == (6.0, [5.0, 4.0, 3.0])


@pytest.mark.parametrize("bad", [{"length": 0}, {"length": 1.5}, {"algorithm": "mean"}, {"margin": 99}])
def test_impossible_histories(bad):
    with pytest.raises(SpecError, match="not possible|does not exist"):
        Delayed(**bad)


def test_recipe_with_a_history_survives_toml():
    policy = Policy(recipe(Delayed(16, "most_recent", 1)))
    assert Policy.from_toml(policy.to_toml()) == policy
    assert policy.digest() != Policy(recipe(Delayed(16, "most_recent"))).digest()


def test_smooth_and_delayed_together():
    from examples.llama import PRESETS, Llama

    model = Llama(replace(PRESETS["tiny"], layers=1), 16)
    inputs = torch.randint(0, 256, (2, 16)), torch.randint(0, 256, (2, 16))
    compiled, backend = compile_eager(model, replace(recipe(), smooth="channel"))
    for _ in range(2):
        step(compiled, model, inputs)
    state = histories(model)
    slots = "x:smooth-channel", "w:smooth-channel", "e"
    assert {k for k in state if "down_proj" in k} == {f"blocks.0.ffn.down_proj.weight.{slot}" for slot in slots}
    assert all(len(history) == 1 for _, history in state.values())


class Region(MLP):
    forward = torch.compiler.nested_compile_region(MLP.forward)


def test_the_body_of_a_nested_region_scales_by_the_current_amax_and_says_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Region(), Region(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.c(self.b(torch.tanh(self.a(x))))

    model, inputs = Net(), data()
    compiled, backend = compile_eager(model, recipe())
    for _ in range(2):
        got = step(compiled, model, inputs)
    assert sorted(histories(model)) == [f"c.weight.{o}" for o in "ewx"]
    assert torch.isfinite(got[0])
    notes = {(r.fqn, r.role): r.notes for r in backend.records}
    assert "no history in a nested region" in notes["a.up", "fprop"][0] and notes["c", "fprop"] == ()


def test_interleaved_and_repeated_backwards():
    layer = nn.Linear(WIDTH, 48, bias=False)
    compiled, _ = compile_eager(layer, recipe())
    outputs = [compiled(torch.full((40, WIDTH), size)) for size in (1.0, 2.0, 3.0)]
    for number, y in enumerate(outputs):
        y.backward(torch.full_like(y, 1.0 + number), retain_graph=True)
    first = layer.weight.grad.clone()
    layer.weight.grad = None
    for number, y in enumerate(outputs):
        y.backward(torch.full_like(y, 1.0 + number))
    assert torch.equal(layer.weight.grad, first)
    assert histories(layer)["weight.x"] == histories(layer)["weight.e"] == (3.0, [])


@pytest.mark.parametrize("how", ["eager", "quartet"])
def test_compiled_autograd(how):
    results = []
    for enabled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = MLP()
        compiled, backend = compile_eager(model, recipe())
        compiler = torch.compile(backend=backend if how == "quartet" else "eager")
        with torch._dynamo.compiled_autograd._enable(compiler) if enabled else contextlib.nullcontext():
            for number in range(3):
                torch.manual_seed(number)
                loss, gradients = step(compiled, model, data(1.0 + number))
        results.append((loss, gradients["up.weight"], histories(model)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_a_delayed_scale_saturates_what_grew():
    layer = nn.Linear(WIDTH, 48, bias=False)
    compiled, _ = compile_eager(layer, recipe())
    for _ in range(2):
        compiled(torch.ones(40, WIDTH)).sum().backward()
    y = compiled(torch.full((40, WIDTH), 100.0))
    y.sum().backward()
    torch.testing.assert_close(y, compiled(torch.ones(40, WIDTH)), rtol=0.1, atol=1e-3)
    state = histories(layer)["weight.x"]
    assert state[1][0] == 100.0 and compiled(torch.full((40, WIDTH), 100.0)).abs().max() > 50 * y.abs().max()


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 64, bias=False) for _ in range(2))
        self.down = nn.Linear(64, WIDTH, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def rotating(signs="none"):
    operand, turn = Operand(SPEC), quartet.Rotation(16, signs)
    gemm = Gemm(operand, operand, turn)
    return Recipe("rotating", fprop=gemm, dgrad=gemm, wgrad=gemm, history=Delayed(4))


@pytest.mark.parametrize(("other", "slots"), [
    (replace(recipe(), name="channel", smooth="channel"), {"x:smooth-channel", "w:smooth-channel", "e"}),
    (replace(recipe(), name="token", smooth="token"), {"x:smooth-token", "w", "e:smooth-token"}),
    (rotating(), {"x:H16", "w:H16", "e:H16", "e:H16+turned", "w:H16+turned", "x:H16+turned"}),
    (rotating("random"), {"x:H16-signs", "w:H16-signs", "e:H16-signs", "e:H16-signs+turned", "w:H16-signs+turned",
                          "x:H16-signs+turned"}),
], ids=["smooth per channel", "smooth per token", "rotated", "rotated at random"])
def test_histories_belong_to_what_was_measured(other, slots):
    """Another recipe does not continue what this one has measured of something else."""
    torch.manual_seed(0)
    model = Gated()
    for policy in (other, recipe()):
        torch._dynamo.reset()
        compiled, _ = compile_eager(model, policy)
        for _ in range(2):
            step(compiled, model, data())
    lengths = {key.removeprefix("down.weight."): len(history) for key, (_, history) in histories(model).items()
               if key.startswith("down")}
    assert lengths == {slot: 3 if slot in slots & set("xwe") else 1 for slot in slots | set("xwe")}


def test_a_state_that_does_not_say_what_it_measured_is_refused():
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, data())
    state = quartet.state_dict(model)
    assert {entry["of"] for entry in state["delayed"].values()} == {""}
    old = copy.deepcopy(state["delayed"])
    for entry in old.values():
        del entry["of"]
    with pytest.raises(ValueError, match=r"'up.weight.e' of the state does not say .* earlier version .*'delayed': {}"):
        quartet.load_state_dict(model, {"delayed": old})
    with pytest.raises(ValueError, match="'of': 'smooth-token'"):
        quartet.load_state_dict(model, {"delayed": {"up.weight.x:smooth-token": state["delayed"]["up.weight.x"]}})
    assert_state(model, state)
    quartet.load_state_dict(model, {**state, "delayed": {}})


@pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])
def test_histories_outlive_conversions(swap):
    model = MLP()
    compiled, _ = compile_eager(model, recipe())
    step(compiled, model, data())
    state, other = quartet.state_dict(model), MLP()
    quartet.load_state_dict(other, state)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        other.double().float()
        other.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert_state(other, state)


def test_micro_batches_of_a_compiled_optimizer_step_count_once():
    """The hooks of an optimizer are compiled with it; once it has stepped outside, its steps go on to count."""
    layer = nn.Linear(WIDTH, 48, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    compiled, _ = compile_eager(layer, recipe())

    def forward(size):
        compiled(torch.full((40, WIDTH), size)).sum().backward()

    forward(3.0)
    optimizer.step()
    forward(5.0), forward(2.0)
    step = torch.compile(optimizer.step, backend="aot_eager")
    step()
    forward(7.0), forward(4.0)
    assert histories(layer)["weight.x"] == (7.0, [5.0, 3.0])
    step()
    forward(1.0)
    assert histories(layer)["weight.x"] == (1.0, [7.0, 5.0, 3.0])


def test_what_a_captured_step_changes_advances_in_every_forward(monkeypatch):
    """Nothing tells of its replays."""
    layer = nn.Linear(WIDTH, 48, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    compiled, _ = compile_eager(layer, recipe())

    def forward(size):
        compiled(torch.full((40, WIDTH), size)).sum().backward()

    forward(3.0)
    optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.step()
    monkeypatch.undo()
    forward(5.0)
    optimizer.step()
    forward(2.0), forward(1.0)
    assert histories(layer)["weight.x"] == (1.0, [2.0, 5.0, 3.0])


@pytest.mark.parametrize("policy", ["fp8-delayed", "tetrajet-ema"])
def test_nothing_of_ours_refers_to_a_parameter(policy):
    """Beside what the stand-in keeps under the other policy too."""
    found = []
    for name in ("fp8", policy):
        torch._dynamo.reset()
        model = MLP()
        compiled, _ = compile_eager(model, name)
        step(compiled, model, data())
        found.append(len(weakref.getweakrefs(model.up.weight)))
    assert found[1] <= found[0]
