"""The optimizers on a GPU: the bits of the reference, CUDA graphs, scalers, and the same weights as on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))

import adam_cases as cases  # noqa: E402

from quartet import optim  # noqa: E402

pytestmark = pytest.mark.gpu
FORMATS = (("e4m3", "e5m2"), "e4m3/256", "dynamic", "coat", "bf16", "fp32")


def model(device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 300), nn.GELU(), nn.Linear(300, 512)).to(device, dtype)


def gradients(net, seed, scale=1e-2):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        g = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def weights(net):
    return [p.detach().cpu().clone() for p in net.parameters()]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", cases.cases())
def test_triton_equals_the_reference(name, device):
    found = cases.differences(cases.cases()[name], cases.triton_runner, device)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("form", FORMATS)
def test_large_tensors_equal_the_reference(form, device):
    formats = form if isinstance(form, tuple) else (form, form)
    kind = cases.adam(formats, stochastic=True)
    layouts = (cases.Layout(1000, 2048, kind.tile), cases.Layout(64, 1000, kind.tile))
    for layout in layouts:
        found = cases.differences(cases.Case(kind, (layout,)), cases.triton_runner, device)
        assert not found, "\n".join(found)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("make", [optim.AdamW, optim.Adam])
def test_gpu_and_cpu_train_the_same_weights(make, form, device):
    trained = []
    for where in ("cpu", device):
        net = model(where)
        optimizer = make(net.parameters(), 1e-3, state_format=form, stochastic_rounding=True,
                         generator=torch.Generator().manual_seed(1))
        for i in range(4):
            gradients(net, i)
            optimizer.step()
        trained.append(weights(net))
    assert_equal(*trained)


@pytest.mark.parametrize("make", [optim.AdamW, optim.Lion, optim.SGD])
@pytest.mark.parametrize("form", ["e4m3", "e4m3/256"])
def test_a_captured_step_replays(make, form, device):
    def trained(captured):
        net = model(device)
        rate = torch.tensor(1e-3, device=device)
        optimizer = make(net.parameters(), rate, state_format=form, stochastic_rounding=True,
                         generator=torch.Generator().manual_seed(1))
        gradients(net, 0)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for i in range(1, 4):
            gradients(net, i)
            rate.fill_(1e-3 / i)
            if captured:
                graph.replay()
            else:
                optimizer.step()
        torch.cuda.synchronize()
        return weights(net)

    assert_equal(trained(True), trained(False))


def test_gradients_at_new_addresses_are_seen(device):
    trained = []
    for fresh in (False, True):
        net, kept = model(device), []
        optimizer = optim.AdamW(net.parameters())
        for i in range(3):
            if fresh:
                kept += [p.grad for p in net.parameters()]
                optimizer.zero_grad(set_to_none=True)
            gradients(net, i)
            optimizer.step()
        trained.append(weights(net))
    assert_equal(*trained)


def test_a_step_does_not_wait_for_the_gpu(device):
    net = model(device)
    optimizer = optim.AdamW(net.parameters())
    gradients(net, 0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMATS)
def test_a_grad_scaler_skips_infinities(form, device):
    net = model(device, torch.float32)
    optimizer = optim.AdamW(net.parameters(), state_format=form)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = weights(net)
    for scale, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        loss = net(torch.ones(4, 512, device=device)).square().mean() * scale
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (not torch.equal(before[0], weights(net)[0])) is moves
    assert optimizer.state[net[0].weight]["step"].item() == 1


def test_checkpoints_move_between_gpu_and_cpu(device):
    net, other = model(device), model("cpu")
    optimizer = optim.AdamW(net.parameters(), stochastic_rounding=True)
    gradients(net, 0)
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(other.parameters(), net.parameters(), strict=True):
            p.copy_(q)
    second = optim.AdamW(other.parameters())
    second.load_state_dict(optimizer.state_dict())
    for n, o in ((net, optimizer), (other, second)):
        gradients(n, 1)
        o.step()
    assert_equal(weights(net), weights(other))


@pytest.mark.parametrize("how", ["data", "checkpoint"])
@pytest.mark.parametrize("form", FORMATS)
def test_another_shape_is_refused_before_a_launch(form, how, device):
    p, q = (nn.Parameter(torch.ones(rows, 512, device=device)) for rows in (64, 96))
    optimizers = [optim.AdamW([x], state_format=form) for x in (p, q)]
    for x, optimizer in zip((p, q), optimizers, strict=True):
        x.grad = torch.ones_like(x)
        optimizer.step()
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"(?s)parameter 0 of group 0.*512.*512"):
        if how == "data":
            p.grad, p.data = None, q.data
            p.grad = torch.ones_like(p)
            optimizers[0].step()
        else:
            optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert how == "data" or torch.equal(p, before)


def test_states_on_another_device_are_named(device):
    p = nn.Parameter(torch.ones(8, 8))
    optimizer = optim.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad, p.data = None, p.data.to(device)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="is on cpu, the parameter itself on cuda"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
