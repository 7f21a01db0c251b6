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


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 256, 192) / 16)

    def forward(self, x, ends):
        return F.grouped_mm(x, self.weight, offs=ends)


class Attention(nn.Module):
    def forward(self, q, k, v):
        return (q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v


class Pair(nn.Module):
    def forward(self, a, b):
        return torch.bmm(a, b)


class Stack(nn.Module):
    """A batch of experts that are all of one size."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 128, 96) / 16)

    def forward(self, x):
        return torch.bmm(x, self.weight)


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
CASES["stack"] = (lambda: Stack().to(BF16), lambda: [draw(8, 64, 128, dtype=BF16)])


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


@pytest.mark.parametrize("name, recipe, kernels", [  # on Hopper
    ("grouped", "fp8", "fp8-grouped"), ("grouped", "fp8-rowwise", "fp8-grouped"), ("grouped", "quartet", "triton-fp8"),
    ("grouped", "tetrajet", "triton-fp8"), ("grouped", "nvfp4", "triton"), ("grouped", "mxfp8", "grouped-mm"),
    ("grouped", "fp8-delayed", "fp8-grouped, grouped-mm"), ("stack", "fp8", "fp8-grouped"),
    ("stack", "fp8-rowwise", "fp8-grouped"), ("stack", "quartet", "triton-fp8"), ("conv", "fp8", "cublaslt"),
    ("conv", "quartet", "triton-fp8"), ("attention", "fp8", "inductor"), ("attention", "quartet", "triton"),
    ("bmm", "fp8", "fp8-grouped"), ("bmm", "quartet", "triton-fp8"), ("bmm", "mxfp8", "inductor"),
    ("bmm", "nvfp4", "triton"), ("embedding", "fp8", "reference"), ("embedding", "quartet", "reference"),
    ("saved", "e4m3/16", ""), ("saved", "mesa8", ""),
])
def test_a_step_is_the_references(name, recipe, kernels):
    torch.manual_seed(3)
    make, inputs = CASES[name]
    op = {"stack": "grouped"}.get(name, name)
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
    for what, want in reference.items():
        assert torch.isfinite(ours[what]).all() and ours[what].shape == want.shape, what
        assert distance(ours[what], want) < 1e-2, f"{what}: {distance(ours[what], want):.1e}"
        assert distance(ours[what], exact[what]) < 0.6, f"{what}: {distance(ours[what], exact[what]):.1e}"
    assert any(distance(ours[what], exact[what]) > 1e-4 for what in ours if op != "saved" or what != "y")
    if op == "saved":
        assert any(r.saved is not None for r in saved) and distance(ours["y"], exact["y"]) < 1e-5
    else:
        assert {r.kernel for r in records if r.op_class.startswith(op)} <= set(registry.NAMES) | {"reference"}
        if torch.cuda.get_device_capability() == (9, 0):
            assert {r.kernel for r in records if r.op_class.startswith(op)} == set(kernels.split(", "))


def test_an_expert_with_gradients_far_below_the_others():
    """Its part of a row over tokens is folded with a scale of its own."""
    torch.manual_seed(3)
    model, x = Experts().to(DEVICE, BF16), draw(256, 256, dtype=BF16)
    gradient, found = draw(256, 192, dtype=BF16), []
    gradient[200:] *= 2.0**-24
    for reference in (False, True):
        torch._dynamo.reset()
        model.zero_grad()
        torch.manual_seed(7)
        policy = Policy(None).on(op="grouped", recipe="quartet")
        run = torch.compile(model, backend=backend(policy, [], [], reference), fullgraph=True, dynamic=False)
        run(x, ends()).backward(gradient)
        found.append(model.weight.grad)
    for expert, (ours, wanted) in enumerate(zip(*found, strict=True)):
        assert wanted.any() == (expert != 1)  # which has no tokens
        assert expert == 1 or distance(ours, wanted) < 1e-2, f"{expert}: {distance(ours, wanted):.1e}"
