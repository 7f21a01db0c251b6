"""Quantised weights serve all forwards of an optimizer step, and never one too many."""

import copy
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import assert_same, compile_eager, step
from models import MLP
from torch.utils.checkpoint import checkpoint

from quartet import Policy, Rotation, recipes
from quartet.lowering.ir.ops import fused as cuda_ops
from quartet.lowering.targets.blackwell import ops as blackwell_ops
from quartet.lowering.targets.cpu import ops as cpu_ops
from quartet.runtime.slots import weights
from quartet.runtime.slots.storages import storage_number
from quartet.runtime.slots.weights import REUSED, ReusedWeights

WEIGHTS = {(96, 64), (64, 96)}


@pytest.fixture(autouse=True)
def watching():
    """As compiling has it."""
    REUSED.watch()


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
    return train_both("quartet")


def train_both(recipe):
    torch.manual_seed(0)
    models = [MLP()]
    models.append(copy.deepcopy(models[0]))
    runs = []
    for model, reuse in zip(models, (True, False), strict=True):
        compiled, _ = compile_eager(model, recipe, reuse_weights=reuse)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            train_step(model, compiled, optimizer)
        runs.append((model, compiled, optimizer))
    return runs


def kept(model):
    """(parameter, what for) → codes, scales and mask that this step keeps of it."""
    return {(name, key): made.kept for name, p in model.named_parameters()
            for key, made in REUSED._step.get(storage_number(p), {}).items() if made.kept is not None}


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


@pytest.mark.parametrize("recipe", ["quartet", "quartet-paper", "tetrajet"])
def test_a_weight_is_quantised_once_a_step(recipe, quantized):
    """Also the first layer's, whose codes no backward reads where there is no mask."""
    trained = train_both(recipe)
    quantized.clear()
    train_step(*trained[0], forwards=4)
    assert sorted(quantized) == sorted(WEIGHTS)
    train_step(*trained[1], forwards=4)
    assert len(quantized) == len(WEIGHTS) * 5
    same_next_step(trained)
    states = [model.state_dict() for model, _, _ in trained]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_weight_under_other_signs_is_another(trained):
    """One parameter in graphs whose recipes differ in the signs before the rotation and in nothing else."""
    ours = recipes()["quartet"]
    signs = [[1] * 32, [(-1) ** i for i in range(32)]]
    others = [replace(ours, name=f"signs-{i}", fprop=replace(ours.fprop, rotation=Rotation(32, tuple(s))))
              for i, s in enumerate(signs)]
    for _, compiled, _ in trained:
        for i in range(3):
            compiled(data(i)).square().mean().backward()
    for recipe in others:
        runs = [(model, compile_eager(model, Policy(recipe), reuse_weights=reuse)[0], None)
                for reuse, (model, *_) in zip((True, False), trained, strict=True)]
        same_next_step(runs)


def test_nothing_is_kept_without_accumulation(trained, quantized):
    for _ in range(3):
        train_step(*trained[0], forwards=1)
    assert len(quantized) == 3 * len(WEIGHTS)
    trained[0][1](data(0)).mean().backward()
    assert not kept(trained[0][0])


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


def test_a_step_that_fails_after_it_has_written_is_seen(trained):
    """The first group is written by a fused kernel, which leaves the version counter alone, before the last fails."""
    results = []
    for model, compiled, _ in trained:
        groups = [{"params": [p]} for p in model.parameters()]
        optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
        for _ in range(2):
            train_step(model, compiled, optimizer)
        for _ in range(2):  # from the second on codes are kept
            compiled(data(0)).square().mean().backward()
        optimizer.param_groups[-1]["betas"] = None
        with pytest.raises(TypeError):
            optimizer.step()
        results.append(step(compiled, model, [data(9)]))  # before another step drops what is kept
    assert_same(*results)


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
    return kept(inner(model))


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
    assert {stream for _, (*_, stream, _) in kept(model)} == {1, 2}
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
    made = kept(model)
    assert made
    for (name, (*_, what)), results in made.items():
        want = [t.clone() for t in results]
        for _ in range(2):
            got = REUSED.serve(model.get_parameter(name), what, True, None, lambda *codes: codes)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            for t in got:
                t.fill_(77)


@pytest.mark.parametrize("policy", ["tetrajet", Policy("bf16").on("*", "quartet", op="linear", role="fprop")],
                         ids=["requantised", "fprop only"])
def test_codes_that_backward_does_not_ask_for_are_kept_all_the_same(quantized, policy):
    runs = []
    for reuse in (True, False):
        torch.manual_seed(0)
        model = MLP()
        compiled, _ = compile_eager(model, policy, reuse_weights=reuse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            train_step(model, compiled, optimizer)
        quantized.clear()
        train_step(model, compiled, optimizer, forwards=4)
        if policy != "tetrajet":  # which quantises the weight once more in each backward
            assert len(quantized) == len(WEIGHTS) * (1 if reuse else 4)
        runs.append((model, compiled, optimizer))
    same_next_step(runs)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))


def test_results_are_those_that_were_asked_for():
    """Of one weight one graph may want the codes, another only its values."""
    weight, spec = torch.nn.Parameter(torch.randn(32, 64)), "e2m1/32 e8m0 quest(rms,nearest) nearest mask"
    optimizer = torch.optim.SGD([weight], 0.0)

    def step():
        wanted = (False, torch.float32), (True, None), (False, torch.float32), (True, torch.bfloat16), (True, None)
        made = [cpu_ops.QUANTIZE(weight.detach(), 32, None, spec, None, 0, packed, values, weight.detach())
                for packed, values in wanted]
        weight.grad = torch.zeros_like(weight)
        found = REUSED.find(weight, weights.described(weight, 32, None, spec))
        optimizer.step()
        return made, found

    want, found = step()
    assert found is None
    for _ in range(2):
        got, found = step()
        assert found is not None
        for a, b in zip(got, want, strict=True):
            assert all(torch.equal(x, y) and x.dtype is y.dtype for x, y in zip(a, b, strict=True))


def test_operands_of_tensor_cores_are_folded_from_kept_codes(monkeypatch):
    """As on a GPU, with kernels that only count: an operand alone is asked for, and codes are kept."""
    weight, calls = torch.nn.Parameter(torch.randn(32, 64)), []
    optimizer = torch.optim.SGD([weight], 0.0)

    def quantize(x, chain, *, packed, folded):
        calls.append(packed)
        codes = torch.full((4 * packed,), 7, dtype=torch.uint8)
        return codes, codes.clone(), codes.clone(), *(fold(torch.full((4,), 7), None, None))

    def fold(codes, scales, spec, ends=None):
        assert codes.numel() == 4
        return codes.float(), codes.float()

    monkeypatch.setattr(cuda_ops, "_kernels", lambda: SimpleNamespace(quantize=quantize, fold=fold, Chain=lambda *a:
                                                                      SimpleNamespace(spec=a[0])))
    spec = "e2m1/32 e8m0 quest(rms,nearest) nearest"
    for _ in range(3):
        calls.clear()
        for _ in range(4):
            *codes, values, scales = cuda_ops._quantize(weight.detach(), 32, None, spec, None, 0, None, False, True,
                                                        weight.detach())
            assert [(t.numel(), t.dtype) for t in codes] == [(0, torch.uint8)] * 3
            assert torch.equal(values, torch.full((4,), 7.0)) and torch.equal(values, scales)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert calls == [True]


def test_kernels_whose_codes_differ_share_none(monkeypatch):
    """Blackwell's quantisers swizzle scales, and may round by instructions of its own."""
    weight, spec = torch.nn.Parameter(torch.randn(32, 64)), "e2m1/32 e8m0 quest(rms,nearest) nearest"
    optimizer = torch.optim.SGD([weight], 0.0)
    monkeypatch.setattr(cuda_ops, "_kernels", lambda: SimpleNamespace(
        Chain=lambda *a: SimpleNamespace(spec=a[0]), quantize=lambda *a, **k: [torch.full((4,), 1.0)] * 5))
    monkeypatch.setattr(blackwell_ops, "_kernels", lambda: SimpleNamespace(
        quantize=lambda *a, hardware: [torch.full((4,), 2.0 + hardware)] * 3))
    arguments = weight.detach(), 32, None, spec, None, 0, None
    for again in (False, True, True):
        for _ in range(3):
            assert cuda_ops._quantize(*arguments, True, False, weight)[0][0] == 1
            for hardware in (False, True):
                assert blackwell_ops._quantize(*arguments, weight, hardware=hardware)[0][0] == 2 + hardware
        keys = {key for key, made in REUSED._step.get(storage_number(weight), {}).items() if made.kept}
        assert len(keys) == (3 if again else 0)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("form", ["double", "load_state_dict", "swap_tensors"])
@pytest.mark.parametrize("asked", [True, False], ids=["kept", "never seen"])
def test_parameters_can_be_swapped(swapping, asked, form):
    """``torch.utils.swap_tensors`` refuses tensors that anything refers to weakly."""
    layer, spec = torch.nn.Linear(64, 32), "e2m1/32 e8m0 quest(rms,nearest) nearest mask"
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)

    def codes(parameter):
        return cpu_ops.QUANTIZE(layer.weight.detach(), 32, None, spec, None, 0, True, None, parameter)

    for _ in range(2):
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(2 * asked):
            codes(layer.weight)
    assert bool(kept(layer)) is asked
    if form == "double":
        layer.double().float()
    elif form == "load_state_dict":
        layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()})
    else:
        torch.utils.swap_tensors(layer.weight, torch.nn.Parameter(layer.weight.detach() + 1))
    assert all(torch.equal(a, b) for a, b in zip(codes(layer.weight), codes(None), strict=True))


def test_a_dropped_model_takes_its_codes_along(trained):
    model, compiled, _ = trained[0]
    for i in range(2):
        compiled(data(i)).mean().backward()
    codes, = [weakref.ref(made[0]) for (name, _), made in kept(model).items() if name == "up.weight"]
    known = len(REUSED._known)
    trained.clear()
    torch._dynamo.reset()
    del model, compiled, _
    gc.collect()
    assert codes() is None and len(REUSED._known) < known


def test_a_compiled_step_is_seen_and_frees_what_was_kept(trained):
    """It moves the version counter; the hooks of an optimizer are compiled with it."""
    for model, compiled, optimizer in trained:
        step = torch.compile(optimizer.step, backend="aot_eager")
        for _ in range(3):
            for i in range(3):
                torch.manual_seed(i)
                compiled(data(i)).square().mean().backward()
            step()
            assert not kept(model)
            optimizer.zero_grad()
    same_next_step(trained)


def test_nothing_is_kept_of_what_a_captured_step_changes(trained, quantized, monkeypatch):
    """Its replays tell nobody: no hook runs and no version counter moves."""
    model, compiled, optimizer = trained[0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    compiled(data(0)).mean().backward()
    optimizer.step()
    monkeypatch.undo()
    for eager in (False, True):  # nor after the optimizer has stepped once more where it can be seen
        for i in range(3):
            compiled(data(i)).mean().backward()
        assert not kept(model)
        if eager:
            optimizer.step()


def test_an_optimizer_of_other_parameters_costs_nothing(trained):
    """Its parameters are looked at once, and again when any are added or others are asked for."""
    class Watched(list):
        looked = 0

        def __iter__(self):
            self.looked += 1
            return super().__iter__()

    group = {"params": Watched([torch.nn.Parameter(torch.zeros(2))])}
    stranger = torch.optim.SGD(group["params"], 0.1)
    stranger.param_groups = [group]
    looked = group["params"].looked
    for _ in range(3):
        REUSED._after_step(stranger)
    assert group["params"].looked == looked + 1
    group["params"].append(trained[0][0].up.weight)
    for _ in range(3):
        REUSED._after_step(stranger)
    assert group["params"].looked == looked + 4


def test_a_sparse_parameter_may_be_stepped(trained):
    sparse = torch.nn.Parameter(torch.eye(3).to_sparse())
    optimizer = torch.optim.SGD([sparse], 0.1)
    REUSED._after_step(optimizer)


def test_parts_of_one_storage_are_told_apart():
    flat = torch.randn(2, 32, 64)
    parts = [torch.nn.Parameter(flat[i]) for i in range(2)]
    reused = ReusedWeights()
    optimizer = torch.optim.SGD(parts[:1], 0.1)
    for _ in range(3):
        for part in parts:
            for _ in range(2):
                reused.serve(part, "codes", True, lambda packed, part=part: (part.detach().clone(),) * 3,
                             lambda *codes: codes)
        found = [reused.find(part, "codes") for part in parts]
        reused._after_step(optimizer)
    assert torch.equal(found[0][0], parts[0]) and found[1] is None  # no optimizer's


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
        if tuple(x.shape) == (3 * 64, 64) and arguments["spec"].rounding == "nearest":  # not dgrad's
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
