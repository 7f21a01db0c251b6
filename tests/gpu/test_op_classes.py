"""One step of every op class on a GPU: Inductor's code against the reference, op by op, from the same random bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quartet import Policy
from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.options import Options
from quartet.passes import pipeline
from quartet.runtime.capture import Capture

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 256, 192) / 16)

    def forward(self, x, ends):
        return F.grouped_mm(x, self.weight, offs=ends)


class Attention(nn.Module):
    def forward(self, q, k, v):
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        return (q @ k.mT / q.shape[-1]**0.5).masked_fill(future, float("-inf")).softmax(-1) @ v


class Pair(nn.Module):
    def forward(self, a, b):
        return torch.bmm(a, b)


class Elementwise(nn.Module):
    """Norms and activations between products, whose results are kept."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x.sin())))).sin()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def ends():
    return torch.tensor([64, 64, 200, 256], dtype=torch.int32, device=DEVICE)


BF16 = torch.bfloat16
CASES = {  # fp32 where another op's rounding would reach a quantiser
    "grouped": (lambda: Experts().to(BF16), lambda: [draw(256, 256, dtype=BF16), ends()]),
    "conv": (lambda: nn.Conv2d(64, 96, 3, padding=1, bias=False, dtype=BF16),
             lambda: [draw(4, 64, 16, 16, dtype=BF16)]),
    "attention": (Attention, lambda: [draw(8, 64, 64) for _ in range(3)]),
    "bmm": (Pair, lambda: [draw(8, 64, 128, dtype=BF16), draw(8, 128, 96, dtype=BF16)]),
    "embedding": (lambda: nn.Embedding(512, 256, dtype=BF16), lambda: [torch.arange(300, device=DEVICE) * 7 % 512]),
    "saved": (Elementwise, lambda: [draw(256, 256)]),
}
KERNELS = {"grouped": "grouped-mm", "attention": "inductor", "bmm": "inductor", "embedding": "reference"}


def backend(policy, records, saved, reference):
    """Ours; ``reference``: without kernels and without generated code."""
    options = Options.parse(None, {"policy": policy, "disable_kernels": registry.NAMES if reference else ()},
                            passes=pipeline.OPTIONAL, kernels=registry.NAMES)
    inner = {"inner_compile": Capture()} if reference else {}
    return lambda gm, inputs: compile_graph(gm, inputs, options, collect=records.extend, collect_saved=saved.extend,
                                            **inner)


def step(run, model, inputs):
    """name → output and gradients of one step."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    model.zero_grad()
    torch.manual_seed(7)
    y = run(*inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y))
    found = {"y": y.detach()} | {f"input{i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    return found | {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("op, recipe", [
    ("grouped", "fp8"), ("grouped", "nvfp4"), ("conv", "fp8"), ("conv", "quartet"), ("attention", "fp8"),
    ("attention", "quartet"), ("bmm", "mxfp8"), ("bmm", "nvfp4"), ("embedding", "fp8"), ("embedding", "quartet"),
    ("saved", "e4m3/16"), ("saved", "mesa8"),
])
def test_a_step_is_the_references(op, recipe):
    torch.manual_seed(3)
    make, inputs = CASES[op]
    model, policy = make().to(DEVICE), Policy(None).on(op=op, recipe=recipe)
    values = inputs()
    exact = step(model, model, values)
    records, saved, results = [], [], []
    for reference in (False, True):
        torch._dynamo.reset()
        run = torch.compile(model, backend=backend(policy, records if not reference else [], saved, reference),
                            fullgraph=True, dynamic=False)
        results.append(step(run, model, values))
    ours, reference = results
    assert ours.keys() == reference.keys() == exact.keys()
    for name, want in reference.items():
        assert torch.isfinite(ours[name]).all() and ours[name].shape == want.shape, name
        assert distance(ours[name], want) < 1e-2, f"{name}: {distance(ours[name], want):.1e}"
        assert distance(ours[name], exact[name]) < 0.6, f"{name}: {distance(ours[name], exact[name]):.1e}"
    assert any(distance(ours[name], exact[name]) > 1e-4 for name in ours if op != "saved" or name != "y")
    if op == "saved":
        assert any(r.saved is not None for r in saved) and distance(ours["y"], exact["y"]) < 1e-5
    else:
        expected = KERNELS.get(op) or {"fp8": "cublaslt", "quartet": "triton-fp8"}[recipe]
        assert {r.kernel for r in records if r.op_class.startswith(op)} == {expected}
