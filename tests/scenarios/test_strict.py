"""strict=True refuses whatever the policy quantises and cannot be, also what is no matmul of the graph."""

import pytest
import torch
import torch.nn.functional as F
from harness import compile_eager
from torch import nn

import quartet


class Program(nn.Module):
    """A function of one input and one weight."""

    def __init__(self, function, *size, dtype=torch.float32):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(size).to(dtype))

    def forward(self, x):
        return self.function(x, self.w)


def attention(x, w):
    q, k, v = (x @ w).view(2, 32, 3, 4, 16).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)


def convolution(x, w):
    return F.conv1d(x, w, groups=x.shape[1] // w.shape[1])


CASES = {
    "attention": (Program(attention, 64, 192), (2, 32, 64), "open_attention=True"),
    "conv": (Program(convolution, 32, 1, 3), (2, 32, 40), "32 groups"),
    "conv computed": (Program(lambda x, w: F.conv1d(w, x), 2, 32, 40), (32, 32, 3), "no parameter"),
    "float64": (Program(F.linear, 64, 64, dtype=torch.float64), (32, 64), "float64"),
    "complex": (Program(F.linear, 64, 64, dtype=torch.complex64), (32, 64), "complex64"),
    "integers": (Program(lambda x, w: (x.long() @ x.long().t()) * w, 1), (32, 64), "int64"),
    "embedding": (Program(lambda x, w: F.embedding_bag((x > 0).long(), w), 64, 64), (8, 64), "bag"),
    "addbmm": (Program(lambda x, w: torch.addbmm(x[0] @ w[0], x, w), 4, 64, 64), (4, 32, 64), "adds up a batch"),
    "vector": (Program(lambda x, w: torch.mv(w, x), 64, 64), (64,), "with a vector"),
    "weights": (Program(lambda x, w: F.linear(x, w @ w), 64, 64), (32, 64), "weights with weights"),
}
EVERYTHING = (quartet.Policy("fp8").on("attention", "fp8").on("conv", "fp8").on("bmm", "fp8").on("grouped", "fp8")
              .on("embedding", "mxfp8"))


@pytest.mark.parametrize("name", CASES)
def test_what_a_rule_wants_and_cannot_be_is_refused_with_its_reason(name):
    model, size, reason = CASES[name]
    x = torch.randn(size).to(model.w.dtype)
    alone = [r for r in quartet.explain(model, x, options={"policy": EVERYTHING}) if reason in r.reason]
    assert alone and not any(r.lowered for r in alone)
    with pytest.raises(Exception, match="strict=True, and .* cannot be quantised: ") as error:
        quartet.explain(model, x, options={"policy": EVERYTHING, "strict": True})
    assert reason in str(error.value) and f"k={alone[0].k}" in str(error.value)


@pytest.mark.parametrize("name", ["attention", "conv", "embedding", "weights"])
def test_what_no_rule_wants_is_not_refused(name):
    model, size, _ = CASES[name]
    assert len(quartet.explain(model, torch.randn(size), options={"policy": "quartet", "strict": True}))


PRODUCTS = {
    "row": (lambda x, w: F.linear(x, w), (64,), ("linear", 1, 96, 64, 1)),
    "row and bias": (lambda x, w: F.linear(x, w, x.new_ones(96)), (64,), ("linear", 1, 96, 64, 1)),
    "mv": (lambda x, w: torch.mv(w, x), (64,), ("linear", 1, 96, 64, 1)),
    "addmv": (lambda x, w: torch.addmv(x.new_ones(96), w, x), (64,), ("linear", 1, 96, 64, 1)),
    "batches": (lambda x, w: torch.matmul(x, w.t()), (2, 3, 8, 64), ("linear", 48, 96, 64, 1)),
    "baddbmm": (lambda x, w: torch.baddbmm(x.new_ones(4, 8, 96), x, w.t().expand(4, 64, 96), beta=.5, alpha=2),
                (4, 8, 64), ("grouped", 8, 96, 64, 4)),
    "addbmm": (lambda x, w: torch.addbmm(x.new_ones(8, 96), x, w.t().expand(4, 64, 96)), (4, 8, 64),
               ("grouped", 8, 96, 64, 4)),
    "bmm": (lambda x, w: torch.bmm(x, x.mT) * w.sum(), (4, 8, 64), ("bmm", 8, 8, 64, 4)),
    "dot": (lambda x, w: torch.dot(x, x) * w.sum(), (64,), ("bmm", 1, 1, 64, 1)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_has_a_forward_row_with_its_sizes_and_its_batch(name):
    function, size, expected = PRODUCTS[name]
    (row,) = (r for r in quartet.explain(Program(function, 96, 64), torch.randn(size)) if r.role == "fprop")
    assert (row.op_class, row.m, row.n, row.k, row.batch) == expected


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2.0), (0, 1.5)])
def test_a_scaled_product_that_is_added_is_quantised(beta, alpha):
    model = Program(lambda x, w: torch.addmm(x.new_full((96,), 3.0), x, w.t(), beta=beta, alpha=alpha), 96, 64)
    compiled, backend = compile_eager(model, "fp8")
    x = torch.randn(32, 64, requires_grad=True)
    out = compiled(x)
    out.square().mean().backward()
    torch.testing.assert_close(out, model(x), rtol=0.1, atol=2.0)
    assert backend.lowered() == {"w": frozenset({"fprop", "dgrad", "wgrad"})}
