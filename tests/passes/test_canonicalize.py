"""``tag`` and ``canonicalize``: the direction of each node, and one form for each product."""

import pytest
import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn

from quartet import Policy


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


class Channels(nn.Module):
    """A 1×1 convolution as matmul writes it, which does not fold the batch where the weight is frozen."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(matrix(64, 32, grad=False), requires_grad=False)

    def forward(self, x):
        return torch.matmul(self.weight, x)


class Expanded(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(matrix(64, 32))

    def forward(self, x):
        return torch.bmm(x, self.weight.expand(len(x), -1, -1).transpose(1, 2))


def test_one_frozen_weight_for_a_batch_is_a_product_of_matrices():
    assert_expected_inline(around("canonicalize", Channels(), matrix(2, 32, 8)).text, """\
  %0 = view(%1, [2, 32, 8]) : bf16[2, 32, 8]
  %2 = view(g, [2, 64, 8]) : bf16[2, 64, 8] | bwd
- %3 = expand(weight, [2, 64, 32]) : bf16[2, 64, 32]
- %4 = view(%3, [2, 64, 32]) : bf16[2, 64, 32]
- %5 = bmm(%4, %0) : bf16[2, 64, 8]
- %6 = view(%5, [2, 64, 8]) : bf16[2, 64, 8]
+ %7 = permute(%0, [0, 2, 1]) : bf16[2, 8, 32]
+ %8 = clone(%7, memory_format=torch.contiguous_format) : bf16[2, 8, 32]
+ %9 = view(%8, [-1, 32]) : bf16[16, 32]
+ %10 = permute(weight, [1, 0]) : bf16[32, 64]
+ %11 = mm(%9, %10) : bf16[16, 64]
+ %12 = view(%11, [2, 8, 64]) : bf16[2, 8, 64]
+ %13 = permute(%12, [0, 2, 1]) : bf16[2, 64, 8]
+ %14 = clone(%13, memory_format=torch.contiguous_format) : bf16[2, 64, 8]
+ %6 = view(%14, [2, 64, 8]) : bf16[2, 64, 8]
- %15 = permute(%4, [0, 2, 1]) : bf16[2, 32, 64] | bwd
- %16 = bmm(%15, %2) : bf16[2, 32, 8] | bwd
- %17 = view(%16, [2, 32, 8]) : bf16[2, 32, 8] | bwd
+ %18 = permute(%2, [0, 2, 1]) : bf16[2, 8, 64] | bwd
+ %19 = clone(%18, memory_format=torch.contiguous_format) : bf16[2, 8, 64] | bwd
+ %20 = view(%19, [-1, 64]) : bf16[16, 64] | bwd
+ %21 = permute(weight, [1, 0]) : bf16[32, 64] | bwd
+ %22 = permute(%21, [1, 0]) : bf16[64, 32] | bwd
+ %23 = mm(%20, %22) : bf16[16, 32] | bwd
+ %24 = view(%23, [2, 8, 32]) : bf16[2, 8, 32] | bwd
+ %25 = permute(%24, [0, 2, 1]) : bf16[2, 32, 8] | bwd
+ %26 = clone(%25, memory_format=torch.contiguous_format) : bf16[2, 32, 8] | bwd
+ %17 = view(%26, [2, 32, 8]) : bf16[2, 32, 8] | bwd""")


def test_the_gradient_of_one_weight_for_a_batch_is_a_product_of_matrices():
    assert_expected_inline(around("canonicalize", Expanded(), matrix(2, 8, 32, grad=False)).text, """\
  %0 = permute(x, [0, 2, 1]) : bf16[2, 32, 8] | bwd
- %1 = expand(weight, [2, -1, -1]) : bf16[2, 64, 32]
- %2 = permute(%1, [0, 2, 1]) : bf16[2, 32, 64]
- %3 = bmm(x, %2) : bf16[2, 8, 64]
+ %4 = view(x, [-1, 32]) : bf16[16, 32]
+ %5 = permute(weight, [1, 0]) : bf16[32, 64]
+ %6 = mm(%4, %5) : bf16[16, 64]
+ %7 = view(%6, [2, 8, 64]) : bf16[2, 8, 64]
- %8 = bmm(%0, g) : bf16[2, 32, 64] | bwd
- %9 = permute(%8, [0, 2, 1]) : bf16[2, 64, 32] | bwd
- %10 = sum(%9, [0], True) : bf16[1, 64, 32] | bwd
- %11 = view(%10, [64, 32]) : bf16[64, 32] | bwd
- return [%3, %11, None]
+ %12 = permute(%0, [0, 2, 1]) : bf16[2, 8, 32] | bwd
+ %13 = view(%12, [-1, 32]) : bf16[16, 32] | bwd
+ %14 = permute(%13, [1, 0]) : bf16[32, 16] | bwd
+ %15 = view(g, [-1, 64]) : bf16[16, 64] | bwd
+ %16 = mm(%14, %15) : bf16[32, 64] | bwd
+ %17 = permute(%16, [1, 0]) : bf16[64, 32] | bwd
+ %18 = unsqueeze(%17, 0) : bf16[1, 64, 32] | bwd
+ %11 = view(%18, [64, 32]) : bf16[64, 32] | bwd
+ return [%7, %11, None]""")


@pytest.mark.parametrize("policy", ["auto", Policy("quartet").on("*", None)], ids=["auto", "none"])
def test_one_weight_for_a_batch_stays_where_no_rule_wants_it(policy):
    assert not around("canonicalize", Channels(), matrix(2, 32, 8), policy=policy, target="h200").text


class SummedByHand(torch.autograd.Function):
    """x · w of each matrix, of which backward sums the gradients of w in fp32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return torch.bmm(x, weight.expand(len(x), -1, -1))

    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        return None, torch.bmm(x.transpose(1, 2), gradient).sum(0, dtype=torch.float32)


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(matrix(32, 64))

    def forward(self, x):
        return SummedByHand.apply(x, self.weight)


def test_a_sum_in_another_dtype_stays_one():
    text = around("canonicalize", Summed(), matrix(2, 8, 32, grad=False)).text
    assert "+ %" in text and "- %" in text and "sum" not in text, "the product of the rows, but not the sum, is another"
