"""Quantised weights serve all forwards of an optimizer step, and never one too many."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import assert_same, compile_eager, step
from models import MLP
from torch.utils.checkpoint import checkpoint

from quartet import Policy
from quartet.lowering import cpu_ops
from quartet.runtime import weights
from quartet.runtime.weights import REUSED

WEIGHTS = {(96, 64), (40, 96)}


@pytest.fixture
def quantized(monkeypatch):
    """Shapes of the weights that were quantised, in order."""
    shapes, run = [], cpu_ops.cpu.rotate_quantize

    def count(x, **arguments):
        if tuple(x.shape) in WEIGHTS:
            shapes.append(tuple(x.shape))
        return run(x, **arguments)

    monkeypatch.setattr(cpu_ops.cpu, "rotate_quantize", count)
    return shapes


@pytest.fixture
def trained():
    """A compiled MLP whose optimizer has stepped with accumulated gradients, and one that never reuses."""
    torch.manual_seed(0)
    models = [MLP()]
    models.append(copy.deepcopy(models[0]))
    runs = []
    for model, reuse in zip(models, (True, False), strict=True):
        compiled, _ = compile_eager(model, reuse_weights=reuse)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            train_step(model, compiled, optimizer)
        runs.append((model, compiled, optimizer))
    return runs


def data(seed):
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))


def train_step(model, compiled, optimizer, forwards=3):
    for i in range(forwards):
        torch.manual_seed(i)
        compiled(data(i)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def same_next_step(runs):
    results = [step(compiled, model, [data(9)]) for model, compiled, _ in runs]
    assert_same(*results)


def test_a_weight_is_quantised_once_a_step(trained, quantized):
    train_step(*trained[0], forwards=4)
    assert sorted(quantized) == sorted(WEIGHTS)
    train_step(*trained[1], forwards=4)
    assert len(quantized) == len(WEIGHTS) * 5
    same_next_step(trained)
    states = [model.state_dict() for model, _, _ in trained]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_nothing_is_kept_without_accumulation(trained, quantized):
    for _ in range(3):
        train_step(*trained[0], forwards=1)
    assert len(quantized) == 3 * len(WEIGHTS)
    mine = {p.data_ptr() for p in trained[0][0].parameters()}
    assert not any(address in mine for address, _, _ in REUSED._kept)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "new data", "another tensor", "dtype and back"])
def test_a_changed_weight_is_quantised_again(trained, change):
    other = MLP().state_dict()
    for model, compiled, _ in trained:
        for i in range(2):
            compiled(data(i)).square().mean().backward()
        with torch.no_grad():
            if change == "in place":
                model.up.weight.mul_(-1.5)
            elif change == "load_state_dict":
                model.load_state_dict(other)
            elif change == "new data":
                model.up.weight.data = other["up.weight"].clone()
            elif change == "another tensor":
                model.up.weight = torch.nn.Parameter(other["up.weight"].clone())
            else:
                model.double()
                model.up.weight[0] += 1
                model.float()
    same_next_step(trained)


def test_an_optimizer_step_that_hides_its_writes_is_seen(trained):
    """What an optimizer writes through ``.data`` leaves the version counter alone."""

    class Hidden(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=0.5)

    for model, compiled, _ in trained:
        optimizer = Hidden(model.parameters(), lr=1.0)
        for _ in range(3):
            train_step(model, compiled, optimizer)
    same_next_step(trained)


def test_parameters_of_no_optimizer_are_quantised_in_every_forward(quantized):
    model = MLP()
    compiled, _ = compile_eager(model)
    for i in range(3):
        compiled(data(i)).mean().backward()
    assert len(quantized) == 3 * len(WEIGHTS)


def test_evaluation_neither_reuses_nor_keeps(trained, quantized):
    model, compiled, optimizer = trained[0]
    with torch.no_grad():
        compiled(data(0))
        compiled(data(0))
    assert len(quantized) == 2 * len(WEIGHTS)


def test_a_write_through_data_is_not_seen_before_the_next_step(trained):
    """As docs/policies.md says: PyTorch's version counter does not count it."""
    outputs = []
    for model, compiled, optimizer in trained:
        for i in range(2):
            compiled(data(i)).square().mean().backward()
        model.up.weight.data.mul_(-1.5)
        outputs.append(compiled(data(2)).detach())
        optimizer.zero_grad()
        optimizer.step()
    assert not torch.equal(*outputs)
    same_next_step(trained)


@pytest.mark.parametrize("policy", ["fp8", "int8"])
def test_weights_of_eight_bit_recipes_are_not_kept(policy):
    assert not kept_of(MLP(), lambda model: model, policy)


def test_weights_of_checkpointed_regions_are_not_kept():
    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MLP()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    assert not kept_of(Checkpointed(), lambda model: model.inner, "quartet")
    assert kept_of(MLP(), lambda model: model, "quartet")


def kept_of(model, inner, policy):
    """What is kept of the weights after a step of accumulated gradients, before the next one ends."""
    compiled, _ = compile_eager(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        train_step(model, compiled, optimizer)
    for i in range(3):
        compiled(data(i)).square().mean().backward()
    mine = {p.data_ptr() for p in inner(model).parameters()}
    return [key for key in REUSED._kept if key[0] in mine]


def test_streams_share_nothing(trained, quantized, monkeypatch):
    """What one stream has made may not be there yet when another one reads it."""
    model, compiled, _ = trained[0]
    current, read = [0], []
    find = REUSED.find
    monkeypatch.setattr(weights, "_stream", lambda parameter: current[0])
    monkeypatch.setattr(REUSED, "find", lambda *key: read.append((current[0], find(*key))) or read[-1][1])
    for stream in (1, 2, 1, 2, 1, 2):
        current[0] = stream
        compiled(data(0)).mean().backward()
    streams = {stream for address, stream, _ in REUSED._kept if address == model.up.weight.data_ptr()}
    assert streams == {1, 2}
    assert len(quantized) == 4 * len(WEIGHTS)  # the first two forwards on each: that it repeats shows in the second
    assert [stream for stream, kept in read if kept is not None] == [1] * len(WEIGHTS) + [2] * len(WEIGHTS)


def test_the_stream_is_the_current_one_of_the_parameters_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: asked.append(device) or
                        SimpleNamespace(cuda_stream=77))
    assert weights._stream(SimpleNamespace(is_cuda=True, device="cuda:1")) == 77 and asked == ["cuda:1"]
    assert weights._stream(torch.zeros(1)) == 0


def test_kept_codes_survive_being_overwritten(trained):
    """Compiled code may reuse the memory of what an op gave it."""
    model, compiled, _ = trained[0]
    compiled(data(0)).mean().backward()
    kept = {key: [t.clone() for t in made] for key, (_, made) in REUSED._kept.items()}
    assert kept
    for (address, _, what), made in kept.items():
        parameter = next((p for p in model.parameters() if p.data_ptr() == address), None)
        if parameter is not None:
            for t in REUSED.find(parameter, what):
                t.fill_(77)
            assert all(torch.equal(a, b) for a, b in zip(REUSED.find(parameter, what), made, strict=True))


class Experts(torch.nn.Module):
    """Square experts, read as they lie, or every matrix transposed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1)) / 8)
        self.ends = torch.tensor([2, 2, 8], dtype=torch.int32)

    def forward(self, x):
        y = F.grouped_mm(x.bfloat16(), self.weight.bfloat16().transpose(1, 2), offs=self.ends)
        return F.grouped_mm(y, self.weight.bfloat16(), offs=self.ends)


def test_experts_are_quantised_once_a_step(monkeypatch):
    """The same parameter transposed is another tensor, of the same shape and strides: it is quantised each time."""
    made, run = [], cpu_ops.cpu.rotate_quantize

    def count(x, **arguments):
        if tuple(x.shape) == (3 * 64, 64) and arguments["spec"].rule == "quest":  # not dgrad's
            made.append(x.clone())
        return run(x, **arguments)

    monkeypatch.setattr(cpu_ops.cpu, "rotate_quantize", count)
    runs = []
    for reuse in (True, False):
        model = Experts()
        compiled, backend = compile_eager(model, Policy(None).on("grouped", "quartet"), reuse_weights=reuse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            train_step(model, compiled, optimizer)
        assert {record.kernel for record in backend.records} == {"cpp"}
        made.clear()
        train_step(model, compiled, optimizer, forwards=4)
        assert len(made) == (1 + 4 if reuse else 4 + 4)  # as they lie, and transposed
        runs.append((model, compiled, optimizer))
    same_next_step(runs)
