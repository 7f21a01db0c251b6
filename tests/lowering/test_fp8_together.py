"""FP8 weights that follow each other, and gradients that meet one X, are cast in one launch, bit for bit as alone."""

import re

import pytest
import torch
from around import around, linear, matrix
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet
from quartet.backend import compile_graph
from quartet.kernels.spec import QuantSpec
from quartet.kernels.triton.bytes import tensors
from quartet.lowering.ir.graph import pull
from quartet.lowering.targets.fp8 import casts as fp8_casts
from quartet.lowering.targets.fp8 import lower, together
from quartet.options import Options
from quartet.runtime.capture import Capture
from quartet.runtime.devices import Target

FP8 = quartet.Policy("fp8").on("*", "fp8")


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


class Branches(nn.Module):
    """Three layers of one X, whose results meet, and one behind them."""

    def __init__(self, *widths, last=32):
        super().__init__()
        self.branches = nn.ModuleList(linear(32, width) for width in widths)
        self.last = linear(min(widths), last)

    def forward(self, x):
        x = torch.sin(x)
        width = self.last.in_features
        return self.last(sum(torch.tanh(branch(x))[:, :width] for branch in self.branches))


def casts(model, rows=64, **options):
    """How many are cast in each launch, by direction, and how many scales are made at once in backward, by a launch of
    their own or in that which casts."""
    x = matrix(rows, 32, grad=False).requires_grad_()
    lines = around("lower", model, x, target="sm_90", **({"policy": FP8} | options)).after
    found = {"forward": [], "backward": [], "scales": []}
    for line in lines:
        call = re.search(r"= fp8_(casts?|casts?_by_rows|scales)\((?:\[(.*?)\])?", line)
        if call:
            count = len(call[2].split(", ")) if call[2] else 1
            direction = "backward" if "bwd" in line else "forward"
            if call[1] != "scales":
                found[direction].append(count)
            if direction == "backward" and (call[1] == "scales" or "by_rows" in call[1]):
                found["scales"].append(count)
    return found


def test_a_cast_makes_the_scale_where_the_rows_are_few(monkeypatch):
    assert fp8_casts.FEW_ROWS <= tensors.MOST_MAGNITUDES
    monkeypatch.setattr(fp8_casts, "FEW_ROWS", 64)
    x, model = matrix(64, 32, grad=False).requires_grad_(), Branches(48, 32, 16)
    few = around("lower", model, x, target="sm_90", policy=FP8).after
    many = around("lower", model, matrix(68, 32, grad=False).requires_grad_(), target="sm_90", policy=FP8).after
    for lines, launches in ((few, {"fp8_cast_by_rows": 3, "fp8_casts_by_rows": 1, "fp8_casts": 1}),
                            (many, {"fp8_scales": 4, "fp8_cast": 3, "fp8_casts": 2})):
        names = [call[1] for line in lines if (call := re.search(r"= (fp8_(?:cast|scales)\w*)\(", line))]
        assert {name: names.count(name) for name in names} == launches


def test_weights_and_the_gradients_of_one_x():
    found = casts(Branches(48, 32, 16))
    assert found == {"forward": [1, 4, 1], "backward": [1, 3], "scales": [1, 3]}


class Autocast(Branches):
    """fp32 weights, which each forward converts."""

    def __init__(self, *widths):
        super().__init__(*widths)
        self.float()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_weights_that_autocast_converts():
    assert casts(Autocast(48, 32, 16)) == {"forward": [1, 4, 1], "backward": [1, 3], "scales": [1, 3]}


def test_so_many_at_a_time(monkeypatch):
    monkeypatch.setattr(together, "TOGETHER", 2)
    found = casts(Branches(48, 32, 16))
    assert sorted(found["forward"]) == [1, 1, 2, 2] and sorted(found["backward"]) == [1, 1, 2]


def test_rows_that_fill_no_words_are_cast_alone():
    found = casts(Branches(48, 32, 16), rows=63)
    assert sorted(found["forward"]) == [1, 1, 4] and found["backward"] == [1, 1, 1, 1]


def test_weights_in_a_checkpointed_region_are_cast_alone():
    class Checkpointed(Branches):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    assert set(casts(Checkpointed(48, 32, 16))["forward"]) == {1}


def test_frozen_weights():
    """detach is a node of its own, which stands where the layer does."""
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(matrix(32, 32) for _ in range(3))

        def forward(self, x):
            for w in self.weights:
                x = nn.functional.linear(torch.tanh(x), w.detach())
            return x

    assert casts(Frozen()) == {"forward": [1, 3, 1, 1], "backward": [1, 1, 1], "scales": [1, 1, 1]}


def test_weights_that_backward_quantises_are_cast_there():
    """Forward would keep their codes otherwise."""
    operand = quartet.Operand(QuantSpec.parse("e4m3/tensor fp32 amax nearest"))
    back = quartet.Recipe("back", skip=(), dgrad=quartet.Gemm(operand, operand))
    found = casts(nn.Sequential(*(linear(32, 32) for _ in range(3))), policy=quartet.Policy(back).on("*", back))
    assert found["forward"] == [] and sorted(found["backward"]) == [1, 1, 1, 3]


class Crossing(nn.Module):
    """A gradient that meets two X, each of which meets another."""

    def __init__(self, *widths):
        super().__init__()
        self.both, self.other, self.one, self.on_other = (linear(32, 32) for _ in range(4))

    def forward(self, x):
        x, y = torch.sin(x), torch.cos(x)
        last, one = torch.tanh(self.on_other(y)), torch.exp(-self.one(x))
        return torch.cat([torch.tanh(self.both(x) + self.other(y)), one, last])


def test_a_gradient_that_meets_two_x_is_cast_once():
    assert casts(Crossing()) == {"forward": [1, 4, 1], "backward": [2, 1], "scales": [2, 1]}


def test_gradients_of_several_layers_that_read_one_x_do_not_wait_for_each_other():
    """The products of the layers between would, and with them all that they read."""
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.out = (nn.ModuleList(linear(32, 32) for _ in range(3)) for _ in range(2))

        def forward(self, x):
            read, x = torch.sin(x), torch.cos(x)
            for key, out in zip(self.keys, self.out, strict=True):
                x = x + out(torch.tanh(x) * torch.sigmoid(key(read)))
            return x

    assert casts(Attending())["backward"] == [1] * 6


def test_what_can_stand_beside_another():
    """Not a gradient that a product of the other's codes has made, nor one behind a product that would stay there."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first, free = graph.call_function(torch.sin, (x,)), graph.call_function(torch.cos, (x,))
    between = graph.call_function(torch.exp, (first,))
    made = graph.call_function(torch.tan, (between,))
    needed = graph.call_function(torch.ops.aten.mm.default, (x, x))
    behind = graph.call_function(torch.tan, (needed,))
    graph.call_function(torch.ops.aten.mm.default, (needed, x))
    last = graph.call_function(torch.tan, (needed,))
    assert together._at_hand(free, [first]) and together._at_hand(behind, [first, free])
    assert not together._at_hand(made, [first]) and not together._at_hand(last, [first])


def test_what_a_moved_node_needs_is_moved_with_it_in_its_order():
    """However deep."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    place = last = graph.call_function(torch.sin, (x,))
    made = []
    for _ in range(5000):
        last = graph.call_function(torch.tan, (x if last is place else last,))
        made.append(last)
    pull(last, place)
    assert list(graph.nodes) == [x, *made, place]


def gradients(model, x):
    def backend(gm, inputs):
        return compile_graph(gm, inputs, Options(policy=FP8, target=Target.named("sm_90")), Capture(),
                             say=lambda *_: None, remember=False)

    torch._dynamo.reset()
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    return out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(),
                                     [x, *model.parameters()])


@pytest.mark.parametrize("rows, kind", [(64, Branches), (62, Branches), (64, Autocast), (64, Crossing)])
def test_the_step_is_bit_for_bit_that_of_each_alone(rows, kind, monkeypatch):
    torch.manual_seed(3)
    model, x = kind(48, 32, 16), (matrix(rows, 32, grad=False) * 3).requires_grad_()
    found = [gradients(model, x)]
    monkeypatch.setattr(lower, "cast_together", lambda *_: set())
    found.append(gradients(model, x))
    monkeypatch.setattr(lower, "MOST_ROWS", 8)
    found.append(gradients(model, x))
    monkeypatch.setattr(lower, "magnitudes_of_rows", lambda *_: None)
    found.append(gradients(model, x))
    assert all(value.abs().max() > 0 for value in found[0])
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("most", [1 << 17, 63])
def test_magnitudes_are_those_of_rows_of_what_a_view_shows(most, monkeypatch):
    """And of so many rows that one program would be long at them, Inductor finds the largest."""
    monkeypatch.setattr(lower, "MOST_ROWS", most)
    model, x = nn.Sequential(nn.Tanh(), linear(32, 16)), matrix(64, 32, grad=False).view(4, 16, 32).requires_grad_()
    lines = around("lower", model, x, target="sm_90", policy=FP8).after
    of_rows = [line for line in lines if re.search(r"= amax\(%\d+, \[-1\]\)", line)]
    assert [re.search(r": (\S+\[.*?\])", line)[1] for line in of_rows] == [
        "bf16[4, 16]", "bf16[16]", "bf16[4, 16]"], lines  # X, W, and the gradient of the result
    one_program = sum("= fp8_cast_by_rows(" in line for line in lines)
    assert one_program == (3 if most > 64 else 1) and sum("= fp8_scale(" in line for line in lines) == 3 - one_program
