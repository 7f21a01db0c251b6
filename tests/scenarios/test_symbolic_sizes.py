"""Sizes that change from call to call and are written in two ways, and sizes that only the data decides."""

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, compile_eager, loss_of, plain_backend, step
from models import data
from torch import nn

import quartet
from quartet.runtime.sizes import hint

CHUNK = 16


class Chunked(nn.Module):
    """Tokens padded to whole chunks, centred in each, and cut to their length again, with a residual."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        chunks = F.pad(x, (0, 0, 0, -tokens % CHUNK)).reshape(batch, -1, CHUNK, width)
        return (chunks - chunks.mean(2, keepdim=True)).reshape(batch, -1, width)[:, :tokens]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.cut(x))


class Gated(Chunked):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.cut(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(x))


class Local(Chunked):
    """Attention inside of each chunk."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.pad(self.linear(x), (0, 0, 0, -x.shape[1] % CHUNK)).reshape(-1, CHUNK, x.shape[2])
        mixed = torch.softmax(h @ h.mT / 8, -1) @ h
        return x + mixed.reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]


ATTENTION = quartet.Policy("fp8").on("attention", "fp8")
SAVED = quartet.Policy("fp8").on("*", op="saved", recipe="e4m3/16")


@pytest.mark.parametrize(("kind", "policy"), [(Chunked, "quartet"), (Chunked, "fp8"), (Gated, "fp8-trillion"),
                                              (Gated, SAVED), (Local, ATTENTION)],
                         ids=["quartet", "fp8", "gated", "saved", "attention"])
def test_padded_and_chunked_lengths_that_change(kind, policy):
    model = kind()
    compiled, backend = compile_eager(model, policy, dynamic=True)
    plain = plain_backend()
    for tokens in (32, 40):
        inputs = data(2, tokens, 64, grad=True)()
        exact = step(torch.compile(model, backend=plain, dynamic=True), model, inputs)
        assert_close(step(compiled, model, inputs), exact)
    assert backend.calls == plain.calls, "no size was guarded on"
    assert any(isinstance(r.k, str) for r in backend.records if r.lowered)


class Selected(nn.Module):
    """The rows of positive first elements: how many there are, only the data tells."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(x[torch.nonzero(x[:, 0] > 0).squeeze(1)])).float().sum()


@pytest.fixture
def captured():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize(("policy", "target"), [("auto", None), (SAVED, None), ("auto", "sm_90"), ("quartet", "sm_90"),
                                                ("quartet", "sm_100a")], ids=lambda value: str(value)[:7])
def test_sizes_that_only_the_data_decides_are_explained(policy, target):
    rows = list(quartet.explain(Selected(), torch.randn(32, 64, dtype=torch.bfloat16), options={"policy": policy},
                                target=target))
    assert [r.role for r in rows] == ["fprop", "wgrad"]
    assert all(isinstance(r.m, str) for r in rows if r.role == "fprop")


@pytest.mark.usefixtures("captured")
def test_sizes_that_only_the_data_decides_are_trained_with():
    model = Selected()
    compiled, backend = compile_eager(model, "fp8")
    for _ in range(2):
        x = torch.randn(32, 64, dtype=torch.bfloat16)
        assert_close(step(compiled, model, (x,)), step(model, model, (x,)))
    assert backend.calls == 1


class SelectedMatrices(nn.Module):
    """A batch of one frozen weight's products, of as many matrices as the data tells."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(64, 64), nn.Parameter(torch.randn(96, 64) / 8, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.linear(x)[torch.nonzero(x[:, 0, 0] > 0).squeeze(1)]
        return torch.matmul(self.weight, chosen.transpose(1, 2)).sum()


@pytest.mark.usefixtures("captured")
def test_a_batch_whose_size_only_the_data_decides_shares_one_weight():
    model = SelectedMatrices()
    compiled, backend = compile_eager(model, "int8-all")
    for _ in range(2):
        x = torch.randn(8, 32, 64)
        assert_close(step(compiled, model, (x,)), step(model, model, (x,)))
    assert compiled(-x.abs()).item() == 0.0, "none is chosen"
    assert backend.calls == 1 and backend.lowered()["weight"] == {"fprop", "dgrad"}


@pytest.mark.usefixtures("captured")
def test_generated_code_multiplies_over_tokens_whose_number_only_the_data_decides():
    """wgrad of MXFP8 pads them to whole blocks, by which Inductor cannot sort strides."""
    torch._dynamo.reset()
    model = Selected()
    compiled = torch.compile(model, backend="quartet", fullgraph=True, options={"policy": "mxfp8"})
    for _ in range(2):
        x = torch.randn(32, 64, dtype=torch.bfloat16)
        assert_close(step(compiled, model, (x,)), step(model, model, (x,)))


def test_a_hint_is_of_every_symbol_that_has_one():
    seen = []

    def backend(gm, inputs):
        seen.extend(n.meta["example_value"].shape[0] for n in gm.graph.nodes if n.name == "doubled")
        return gm.forward

    def program(x):
        doubled = x[torch.nonzero(x[:, 0] > 0).squeeze(1)].repeat(x.shape[1], 1)
        return doubled * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        loss_of(torch.compile(program, backend=backend, dynamic=True, fullgraph=True)(torch.randn(8, 6)))
    (size,) = seen
    assert hint(size, 16) == 6 * 16
    assert hint(size) == 6 * torch._inductor.config.unbacked_symint_fallback
