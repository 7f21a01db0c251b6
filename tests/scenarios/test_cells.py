"""Every cell of docs/recipes.md that says a recipe can be put on an op class, run forward and backward."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from harness import ALL, assert_close, compile_eager, cosine, count, step
from torch import nn

from quartet import Policy, recipes
from quartet.lowering.recipe.types import OP_CLASSES
from quartet.policy.possible import obstacle

CELLS = [(op, name) for op in OP_CLASSES for name, recipe in recipes().items() if obstacle(recipe, op) is None]
LOSSES = {"bitnet"}  # ternary weights train, but the loss of an untrained model is far from that of its own weights
LEAST = {"quartet-paper": 0.65, "fp4-dge": 0.6, "bitnet": 0.7}  # cosine of the gradients


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 40)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Head(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens, targets):
        return F.cross_entropy(self.lm_head(F.rms_norm(self.embed(tokens), (64,))).flatten(0, 1), targets.flatten())


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 8, bias=False), nn.Linear(64, 8)

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        return (self.experts(x).gather(-1, chosen) * weights).sum(-1)


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 64), nn.Linear(64, 32)

    def forward(self, tokens):
        return self.out(self.table(tokens))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(((q @ k.mT / 4.0).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Pair(nn.Module):
    def forward(self, a, b):
        return torch.bmm(a, b)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter((torch.randn(4, 64, 48) / 8).bfloat16())

    def forward(self, x, ends):
        return F.grouped_mm(x, self.weight, offs=ends)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x.sin())))).sin()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def tokens(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(6))


CLASSES = {
    "linear": (Linear, lambda: [draw(2, 20, 64)]),
    "lm_head": (Head, lambda: [tokens(3, 12), tokens(3, 12).flip(1)]),
    "lm_head, tied": (lambda: Head(tied=True), lambda: [tokens(3, 12), tokens(3, 12).flip(1)]),
    "router": (Router, lambda: [draw(2, 40, 64)]),
    "embedding": (Rows, lambda: [tokens(3, 9)]),
    "attention_qk": (Attention, lambda: [draw(2, 32, 64)]),
    "attention_pv": (Attention, lambda: [draw(2, 32, 64)]),
    "bmm": (Pair, lambda: [draw(3, 24, 40), draw(3, 40, 16)]),
    "grouped": (Experts, lambda: [draw(60, 64).bfloat16(), torch.tensor([10, 10, 43, 60], dtype=torch.int32)]),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1)),
             lambda: [draw(4, 4, 9, 9)]),
    "saved": (Norms, lambda: [draw(96, 128)]),
}


@cache
def exact(case):
    """(model, inputs, a step of it in its own dtype)"""
    torch.manual_seed(0)
    make, inputs = CLASSES[case]
    model, values = make(), [x.requires_grad_(x.is_floating_point()) for x in inputs()]
    return model, values, step(model, model, values)


def quantised(name):
    """Roles that a recipe multiplies quantised operands in."""
    return {role for role in ALL if (gemm := getattr(recipes()[name], role)) is not None and gemm.a.spec is not None}


def run(case, name):
    """A second step, the first one having begun histories and averages; and the records of the op class."""
    model, inputs, want = exact(case)
    op = case.split(",")[0]
    compiled, backend = compile_eager(model, Policy(None).on(op=op, recipe=name))
    step(compiled, model, inputs)
    got = step(compiled, model, inputs)
    return got, want, [r for r in backend.records if r.op_class == op], backend


@pytest.mark.parametrize("case, name", [
    (case, name) for case in CLASSES for op, name in CELLS
    if case.split(",")[0] == op != "saved" and recipes()[name].quantizes])
def test_a_quantised_cell(case, name):
    got, want, records, _ = run(case, name)
    op = case.split(",")[0]
    roles = {"fprop"} if op == "embedding" else quantised(name)
    assert {r.role for r in records if r.lowered} == roles and {r.recipe for r in records if r.lowered} == {name}
    least = 0.6 if op == "router" else LEAST.get(name, 0.8)  # another expert has another gradient
    assert_close((want[0] if name in LOSSES else got[0], got[1]), want, least)
    assert not torch.equal(got[0], want[0]) and torch.isfinite(got[0])
    assert any(cosine(grad, want[1][key]) < 1 - 1e-9 for key, grad in got[1].items())


@pytest.mark.parametrize("name", [name for op, name in CELLS if op == "saved" and recipes()[name].saved is not None])
def test_a_cell_of_saved_activations(name):
    got, want, _, backend = run("saved", name)
    assert count(backend.forwards()[0], "encode_saved") >= 2 and torch.allclose(got[0], want[0], rtol=1e-6)
    assert_close(got, want, 0.99)
    assert any(cosine(grad, want[1][key]) < 1 - 1e-9 for key, grad in got[1].items())


@pytest.mark.parametrize("case", CLASSES)
def test_a_cell_of_bf16_changes_nothing(case):
    got, want, records, backend = run(case, "bf16")
    assert not any(r.lowered for r in records) and backend.count("quantize") == backend.count("encode_saved") == 0
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_no_cell_is_left_out():
    tested = {(case.split(",")[0], name) for case in CLASSES for name in recipes()}
    assert set(CELLS) <= tested and len(CELLS) > 150
    kinds = [(op, recipes()[name]) for op, name in CELLS]
    assert all(r.quantizes if op != "saved" else r.saved is not None for op, r in kinds if r.name != "bf16")
