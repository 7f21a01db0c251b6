"""PyTorch's own tools around a compiled model: the gradient scaler, schedulers, checkpoints, profilers."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import quartet


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def step(model, optimizer, scale=1.0):
    torch.manual_seed(1)
    x = torch.randn(32, 64)
    loss = (model(x) - x).square().mean() * scale
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("policy", ["quartet", "fp8", "fp8-delayed"])
def test_a_gradient_scaler_skips_what_overflows_and_recovers(policy):
    model = quartet.compile(MLP(), policy)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    scaler, x = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000), torch.randn(32, 64)
    before, scales, losses = model.up.weight.detach().clone(), [], []
    for _ in range(16):
        loss = (model(x) - x).square().mean()
        scaler.scale(loss * 1e4).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        losses.append(loss.item())
        if len(scales) == 1:
            assert torch.equal(model.up.weight, before), "the first step overflows"
    assert scales[0] < 1e38 and torch.isfinite(model.up.weight).all()
    assert not torch.equal(model.up.weight, before), scales


def test_a_checkpoint_of_dcp_resumes_bit_for_bit(tmp_path):
    def make():
        torch._dynamo.reset()
        model = quartet.compile(MLP(), "fp8-delayed")
        return model, torch.optim.AdamW(model.parameters(), 1e-2)

    model, optimizer = make()
    for _ in range(2):
        step(model, optimizer)
    dcp.save({"model": model.state_dict(), "quartet": quartet.State(model)}, checkpoint_id=tmp_path / "a")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    goes_on = [step(model, optimizer) for _ in range(2)]
    model, optimizer = make()
    kept = model.state_dict()
    dcp.load({"model": kept, "quartet": quartet.State(model)}, checkpoint_id=tmp_path / "a")
    model.load_state_dict(kept)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert [step(model, optimizer) for _ in range(2)] == goes_on


def test_a_profiler_shows_our_kernels_by_name(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    model = quartet.compile(MLP(), "quartet")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, optimizer)
    with torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(str(tmp_path))) as profile:
        loss = step(model, optimizer)
    names = {event.key for event in profile.key_averages() if event.key.startswith("quartet::")}
    assert any("quantize" in name for name in names) and "quartet::seed" in names, names
    trace, = tmp_path.glob("*.pt.trace.json")
    assert names <= {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("loss", loss, 0)
