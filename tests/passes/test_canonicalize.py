"""``tag`` and ``canonicalize``: the direction of each node, and one form for each product."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn


class Batched(nn.Module):
    def __init__(self, batch=1):
        super().__init__()
        self.weight = nn.Parameter(matrix(batch, 32, 64))

    def forward(self, x):
        return torch.bmm(x, self.weight)


class TwiceByHand(torch.autograd.Function):
    """tanh(x · w), of which backward multiplies x · w again."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.tanh(x @ weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return (gradient * torch.tanh(x @ weight)) @ weight.t(), None


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(matrix(32, 64, grad=False), requires_grad=False)

    def forward(self, x):
        return TwiceByHand.apply(x, self.weight)


def test_a_batch_of_one_is_a_product_of_matrices():
    change = around("canonicalize", Batched(), matrix(1, 8, 32, grad=False))
    assert_expected_inline(change.text, """\
  %0 = permute(x, [0, 2, 1]) : bf16[1, 32, 8] | bwd
- %1 = bmm(x, weight) : bf16[1, 8, 64]
+ %2 = squeeze(x, 0) : bf16[8, 32]
+ %3 = squeeze(weight, 0) : bf16[32, 64]
+ %4 = mm(%2, %3) : bf16[8, 64]
+ %5 = unsqueeze(%4, 0) : bf16[1, 8, 64]
- %6 = bmm(%0, g) : bf16[1, 32, 64] | bwd
- return [%1, %6, None]
+ %7 = squeeze(%0, 0) : bf16[32, 8] | bwd
+ %8 = squeeze(g, 0) : bf16[8, 64] | bwd
+ %9 = mm(%7, %8) : bf16[32, 64] | bwd
+ %10 = unsqueeze(%9, 0) : bf16[1, 32, 64] | bwd
+ return [%5, %10, None]""")


def test_what_backward_multiplies_again_is_forwards_product():
    assert_expected_inline(around("canonicalize", Twice(), matrix(8, 32)).text, """\
  %0 = mm(x, weight) : bf16[8, 64]
- %1 = mm(x, weight) : bf16[8, 64] | bwd
- %2 = tanh(%1) : bf16[8, 64] | bwd
+ %2 = tanh(%0) : bf16[8, 64] | bwd""")


def test_nothing_where_products_have_that_form():
    assert not around("canonicalize", linear(), matrix(8, 32)).text


def test_nothing_to_a_batch_of_two():
    assert not around("canonicalize", Batched(2), matrix(2, 8, 32)).text


class Double(torch.autograd.Function):
    """A product whose backward is written by hand and reads a constant that no gradient reaches."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient @ (weight * 2).t(), None


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(matrix(32, 64, grad=False), requires_grad=False)

    def forward(self, x):
        return Double.apply(x, self.weight)


def test_tag_what_a_custom_function_computes_is_backward():
    assert_expected_inline(around("tag", ByHand(), matrix(8, 32)).text, """\
- %0 = mul(weight, 2) : bf16[32, 64] | ?
- %1 = permute(%0, [1, 0]) : bf16[64, 32] | ?
- %2 = mm(g, %1) : bf16[8, 32] | ?
+ %0 = mul(weight, 2) : bf16[32, 64] | bwd
+ %1 = permute(%0, [1, 0]) : bf16[64, 32] | bwd
+ %2 = mm(g, %1) : bf16[8, 32] | bwd""")


def test_tag_does_nothing_where_autograd_has_tagged_all():
    assert not around("tag", linear(), matrix(8, 32)).text


def test_tag_does_nothing_in_a_graph_without_backward():
    with torch.no_grad():
        assert not around("tag", ByHand(), matrix(8, 32)).text
