"""``check="finite"`` in the loops that people train with: each names the module, the product and the step."""

import math

import pytest
import torch
from harness import compile_eager, eager_backend
from torch import nn
from torch.nn.functional import relu
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from quartet.inspect import Inspector, NotFinite, finite


class MLP(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.up, self.mid, self.down = (nn.Linear(32, 32) for _ in range(3))
        self.checkpointed = checkpointed

    def hidden(self, x):
        return relu(self.mid(relu(self.up(x))))

    def forward(self, x):
        return self.down(checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointed else self.hidden(x))


def inputs(count, bad=None):
    x = torch.randn(count, 48, 32)
    if bad is not None:
        x[bad, 5, 7] = math.inf
    return x


def compiled_of(model, policy="fp8", **options):
    return compile_eager(model, policy, check="finite", **options)[0]


def train(compiled, model, batches, micro=1, backward=lambda loss: loss.backward()):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for number, x in enumerate(batches, 1):
        backward(compiled(x).float().square().mean())
        if number % micro == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_under_autocast():
    model = MLP()
    compiled = compiled_of(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotFinite, match="step 1: fprop of up .* finite: X$"):
        train(compiled, model, inputs(3, bad=1))


@pytest.mark.parametrize("name, product", [("mid", "fprop of mid .*: W$"), (None, "[dw]grad of down .*: E$")])
def test_under_checkpointing(name, product):
    """Of a module that runs again in backward the first run is named; a gradient comes after all of forward."""
    model = MLP(checkpointed=True)
    compiled = compiled_of(model, "quartet")
    if name:
        with torch.no_grad():
            model.get_submodule(name).weight[3, 4] = math.nan
    with pytest.raises(NotFinite, match=f"step 0: {product}"):
        train(compiled, model, inputs(1), backward=lambda loss: (loss * (1.0 if name else math.inf)).backward())


@pytest.mark.parametrize("bad, step", [(1, 0), (5, 1)])
def test_micro_batches_belong_to_the_step_that_they_lead_to(bad, step):
    model, inspector = MLP(), Inspector(1)
    compiled = compiled_of(model, inspect=inspector)
    train(compiled, model, inputs(3), micro=3)
    inspector.clear()
    with pytest.raises(NotFinite, match=f"step {step}: fprop of up .*: X$" if step else "fprop of up .*: X$"):
        train(compiled, model, inputs(6, bad=bad), micro=3)
    names = [(r.step, r.kind, r.name) for r in inspector.statistics()]
    assert len(names) == len(set(names)), "the first micro-batch alone is recorded"


class Scaler(torch.amp.GradScaler):
    """One whose first scale is far too large."""

    def __init__(self):
        super().__init__("cpu", init_scale=2.0**126, backoff_factor=2.0**-60)
        self.skipped = 0

    def train(self, compiled, model, batches, factors):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        for x, factor in zip(batches, factors, strict=True):
            optimizer.zero_grad()
            scale = self.get_scale()
            self.scale((compiled(x) * factor).square().mean()).backward()
            self.step(optimizer)
            self.update()
            self.skipped += self.get_scale() < scale


def test_overflows_that_a_scaler_skips_are_no_error():
    model, scaler = MLP(), Scaler()
    compiled = compiled_of(model)
    scaler.train(compiled, model, inputs(6), [1e6, 1e6, 1.0, 1.0, 1e30, 1.0])
    assert 2 <= scaler.skipped < 6, "in the first step, and in one later"
    batches = inputs(4, bad=2)
    with pytest.raises(NotFinite, match="fprop of up .*: X$"):
        scaler.train(compiled, model, batches, [1.0] * 4)
    finite()


def test_gradients_that_an_optimizer_would_use_are_an_error_under_a_scaler_too():
    model, scaler = MLP(), Scaler()
    compiled = compiled_of(model)
    scaler.train(compiled, model, inputs(1), [1e6])
    with pytest.raises(NotFinite, match="[dw]grad of down .*: E$"):
        train(compiled, model, inputs(1), backward=lambda loss: (loss * math.nan).backward())


def test_a_whole_step_that_is_compiled():
    model = MLP()
    backend = eager_backend("fp8", check="finite")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    @torch.compile(backend=backend)
    def train_step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for x in inputs(2):
        train_step(x)
    finite()
    train_step(inputs(1, bad=0)[0])
    with pytest.raises(NotFinite, match="step 2: fprop of .*up.*: X$"):
        train_step(inputs(1)[0])


def test_evaluation_between_steps():
    model = MLP()
    compiled = compiled_of(model)
    train(compiled, model, inputs(2))
    with torch.no_grad():
        compiled(inputs(1, bad=0)[0])
    with pytest.raises(NotFinite, match="step 2: fprop of up .*: X$"):
        train(compiled, model, inputs(1))
    with torch.no_grad():
        compiled(inputs(1)[0])
    finite()


def test_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = MLP()
        parallel = DistributedDataParallel(model)
        with pytest.raises(NotFinite, match="step 1: fprop of up .*: X$"):
            train(torch.compile(parallel, backend=eager_backend("fp8", check="finite")), model, inputs(3, bad=1))
    finally:
        torch.distributed.destroy_process_group()


def test_a_forward_that_is_not_finite_by_the_gradients_before_names_these():
    """Weights that no optimizer of ``torch.optim``'s kind steps."""
    model = MLP()
    compiled = compiled_of(model)
    (compiled(inputs(1)[0]).mean() * math.nan).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    compiled(inputs(1)[0])
    with pytest.raises(NotFinite, match="step 0: [dw]grad of down .*: E$"):
        compiled(inputs(1)[0])
