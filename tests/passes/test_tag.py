"""``tag``: what runs in backward, where a custom Function has computed it."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn


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


def test_what_a_custom_function_computes_is_backward():
    assert_expected_inline(around("tag", ByHand(), matrix(8, 32)).text, """\
- %1 = mul(weight, 2) : bf16[32, 64] | ?
- %2 = permute(%1, [1, 0]) : bf16[64, 32] | ?
- %3 = mm(g, %2) : bf16[8, 32] | ?
+ %1 = mul(weight, 2) : bf16[32, 64] | bwd
+ %2 = permute(%1, [1, 0]) : bf16[64, 32] | bwd
+ %3 = mm(g, %2) : bf16[8, 32] | bwd""")


def test_nothing_where_autograd_has_tagged_all():
    assert not around("tag", linear(), matrix(8, 32)).text


def test_nothing_in_a_graph_without_backward():
    with torch.no_grad():
        assert not around("tag", ByHand(), matrix(8, 32)).text
