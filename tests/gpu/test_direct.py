"""Direct quantised training on a GPU: the integer product, the same bits as on the CPU, compiled steps."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("direct", "kernels")]

import lowbit_cases as cases  # noqa: E402
from direct_models import BITS, net, stored, task, wrapped  # noqa: E402

from quartet import direct, optim  # noqa: E402
from quartet.kernels.reference.optim import lowbit  # noqa: E402
from quartet.kernels.reference.optim.lowbit import GRIDS, Draw  # noqa: E402
from quartet.runtime.direct import rounding  # noqa: E402
from quartet.runtime.direct.linear import int_product  # noqa: E402

pytestmark = pytest.mark.gpu


def loss_on(model, device, run=None):
    x, y = (t.to(device) for t in task())
    return nn.functional.cross_entropy((model if run is None else run)(x), y)


@pytest.mark.parametrize("m, n, k", [(1, 3, 5), (16, 64, 64), (17, 8, 8), (33, 130, 70), (256, 512, 128)])
def test_the_integer_product_is_exact_in_any_shape(m, n, k, device):
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    assert torch.equal(int_product(a.to(device), b.to(device)).cpu().long(), a.long() @ b.long().t())


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_the_update_has_the_bits_of_the_cpu(bits, paper, device):
    after = []
    for where in (torch.device("cpu"), device):
        model = net(bits, paper=paper).to(where)
        optimizer = wrapped(model, torch.optim.SGD, lr=0.5, rescale="rare", rescale_every=2)
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            for p in model.parameters():
                p.grad = (1e-2 * torch.randn(p.shape, generator=generator)).to(where)
            optimizer.step()
        after.append({k: v.cpu() for k, v in stored(model).items()})
    for name, value in after[0].items():
        if value.dtype.is_floating_point:
            assert torch.allclose(value, after[1][name], rtol=1e-5)
        else:  # a fused multiply-add of the inner step may move a code in a thousand
            assert (value != after[1][name]).float().mean() < 2e-3, name


@pytest.mark.parametrize("name", cases.cases())
def test_kernels_have_the_bits_of_the_reference(name, device):
    assert not cases.differences(cases.cases()[name], device)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [2048, 8192, 5632, 4099])
@pytest.mark.parametrize("feedback", [False, True])
def test_large_weights_have_the_bits_of_the_reference(bits, cols, feedback, device):
    case = cases.Case(str(bits), 257, cols, radial_split=True, rescale=True, feedback=feedback, drift=1.6)
    assert not cases.differences(case, device)


def test_the_reference_has_the_same_bits_on_the_device(device):
    for name in ("8 radial", "ternary radial feedback ragged", "4 paper", "8 grows", "8 1x4100"):
        case = cases.cases()[name]
        grid, here = GRIDS[case.bits], cases.made(case)
        there = here.to(device)
        for w in (here, there):
            lowbit.absorb(w.packed, w.scale, w.new, w.residual, grid, case.draw, paper=case.paper,
                          radial_split=case.radial_split, rescale=case.rescale)
        for part, value in here.parts().items():
            assert torch.equal(there.parts()[part].cpu(), value), (name, part)


def test_rows_beyond_two_to_the_31_elements(device):
    from quartet.kernels.triton.lowbit import ops as kernels

    grid, rows, cols, last = GRIDS["ternary"], (1 << 20) + 3, 2052, 5
    packed = torch.randint(0, 256, (rows, grid.columns(cols)), device=device, dtype=torch.uint8) & 0x55
    scale = torch.rand(rows, device=device) + 0.5
    end = [packed[-last:].cpu(), scale[-last:].cpu()]
    new = kernels.dequantize(packed, scale, grid, cols, False)
    assert torch.equal(new[-last:].cpu(), lowbit.values(lowbit.unpack(end[0], grid, cols), end[1], False))
    new.mul_(1.3).add_(0.2)
    options = {"paper": False, "radial_split": True, "rescale": True}
    tail = new[-last:].cpu()
    kernels.absorb(packed, scale, new, None, grid, Draw(cases.SEED, 1, 2), **options)
    lowbit.absorb(*end, tail, None, grid, Draw(cases.SEED, 1, 2, rows - last), **options)
    assert torch.equal(packed[-last:].cpu(), end[0]) and torch.equal(scale[-last:].cpu(), end[1])


@pytest.mark.parametrize("options", [{}, {"feedback": True}, {"rescale": "rare"}])
@pytest.mark.parametrize("bits", BITS)
def test_training_with_kernels_and_with_the_reference_is_the_same(bits, options, device, monkeypatch):
    ends = []
    for reference in (False, True):
        if reference:
            monkeypatch.setattr(rounding, "kernels_for", lambda weight: None)
        model = net(bits).to(device)
        assert reference or rounding.kernels_for(model.up.weight) is not None
        optimizer = wrapped(model, lr=0.1, rescale_every=2, **options)
        generator = torch.Generator(device).manual_seed(3)
        flips = []
        for _ in range(4):
            for p in model.parameters():
                p.grad = 1e-2 * torch.randn(p.shape, generator=generator, device=device)
            optimizer.step()
            flips.append(optimizer.flipped())
        ends.append((stored(model), flips))
    assert ends[0][1] == ends[1][1] and max(ends[0][1]) > 0
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name


def test_random_words_are_the_cpus(device):
    cpu = lowbit.random_words(5, 1, 2, 3, 4, 37, torch.device("cpu"))
    assert torch.equal(lowbit.random_words(5, 1, 2, 3, 4, 37, device).cpu(), cpu)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_the_cpus(bits, dtype, device):
    model = net(bits).to(dtype)
    twin = copy.deepcopy(model).to(device)
    x, _ = task()
    for m, where in ((model, "cpu"), (twin, device)):
        m.up(x.to(where, dtype)).square().mean().backward()
    a, b = model.up.weight.grad.float(), twin.up.weight.grad.float().cpu()
    assert (a - b).norm() <= (1e-4 if dtype is torch.float32 else 2e-2) * a.norm()


@pytest.mark.parametrize("compiler", ["inductor", "quartet"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_follows_eager(compiler, autocast, device):
    from quartet.backend import quartet

    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model = net(8, skip=()).to(device)
        backend = quartet if compiler == "quartet" else compiler
        run = torch.compile(model, backend=backend) if compiled else model
        optimizer = wrapped(model)
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = loss_on(model, device, run)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(loss.item())
    assert abs(ends[0] - ends[1]) < 0.05 * ends[0]


@pytest.mark.parametrize("bits", BITS)
def test_training_with_fp8_states_resumes_bit_for_bit(bits, device):
    def inner(p, lr):
        return optim.AdamW(p, lr=lr, min_quantized=0)

    def steps(model, optimizer, n):
        for _ in range(n):
            loss_on(model, device).backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss_on(model, device).item()

    model = net(bits).to(device)
    optimizer = wrapped(model, inner)
    first = steps(model, optimizer, 3)
    other, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    again = wrapped(other, inner, seed=4)
    again.load_state_dict(state)
    assert steps(model, optimizer, 5) == steps(other, again, 5) < first


def test_numbers_are_not_kept(device):
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    empty = torch.cuda.memory_allocated()
    direct.convert(model, "ternary").to(device)
    assert torch.cuda.memory_allocated() - empty < 0.27 * 16 * (1 << 20)
    optimizer = direct.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=0)
    for layer in model:
        layer.weight.grad = torch.ones(1024, 1024, device=device, dtype=torch.float32)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert torch.cuda.max_memory_allocated() - before < 160 << 20


def test_a_model_trains_on_the_device(device):
    model = net("ternary").to(device)
    optimizer = wrapped(model)
    first = loss_on(model, device).item()
    for _ in range(60):
        loss_on(model, device).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_on(model, device).item() < 0.6 * first


@pytest.mark.parametrize("paper", [False, True])
def test_a_gradient_that_is_not_finite_shows(paper, device):
    model = net(8, paper=paper).to(device)
    optimizer = wrapped(model)
    loss_on(model, device).backward()
    model.up.weight.grad[3, 5] = float("nan")
    optimizer.step()
    bad = model.up.weight.scale.isnan()
    assert bad.all() if paper else bad.nonzero().flatten().tolist() == [3]
    assert not torch.isfinite(loss_on(model, device))


def test_a_step_between_forward_and_backward_is_noticed(device):
    model = net(8).to(device)
    optimizer = wrapped(model)
    loss_on(model, device).backward()
    loss = loss_on(model, device)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
