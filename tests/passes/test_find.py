"""``find_matmuls`` and ``find_grouped``: the products of a graph; the graph stays."""

import torch
import torch.nn.functional as F
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn

import quartet


class Products(nn.Module):
    """A layer, a product of activations, and one of weights."""

    def __init__(self):
        super().__init__()
        self.layer, self.left, self.right = linear(), linear(16, 64), linear(48, 16)

    def forward(self, x):
        y = self.layer(x)
        return y @ (self.left.weight @ self.right.weight), y @ y.t()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(matrix(4, 32, 64))

    def forward(self, x, ends):
        return F.grouped_mm(x, self.experts, offs=ends)


ENDS = torch.tensor([4, 4, 10, 16], dtype=torch.int32)


def test_each_product_has_its_gradients():
    change = around("find_matmuls", Products(), matrix(8, 32))
    assert not change.text
    assert_expected_inline(change.decisions, """\
layer linear fprop 8 x 64 x 32: quartet
layer linear dgrad 8 x 32 x 64: quartet
layer linear wgrad 64 x 32 x 8: quartet; k padded to 32
left linear fprop 8 x 48 x 64: quartet
left linear dgrad 8 x 64 x 48: quartet; k padded to 64
left linear wgrad 48 x 64 x 8: quartet; k padded to 32
- bmm fprop 8 x 8 x 64: recipe 'quartet' leaves bmm in high precision unless a rule names it
- bmm dgrad 8 x 64 x 8: recipe 'quartet' leaves bmm in high precision unless a rule names it
- bmm wgrad 8 x 64 x 8: recipe 'quartet' leaves bmm in high precision unless a rule names it
- bmm fprop 64 x 48 x 16: multiplies weights with weights
- bmm dgrad 16 x 48 x 64: belongs to no forward product of the graph, or to one of several that are as likely
- bmm dgrad 64 x 16 x 48: belongs to no forward product of the graph, or to one of several that are as likely""")


def test_no_gradient_of_what_is_not_trained():
    change = around("find_matmuls", linear(trained=False), matrix(8, 32))
    assert_expected_inline(change.decisions, """\
weight linear fprop 8 x 64 x 32: quartet
weight linear dgrad 8 x 32 x 64: quartet""")


def test_groups_of_tokens_with_a_matrix_each():
    change = around("find_grouped", Experts(), matrix(16, 32), ENDS, policy=quartet.Policy().on("grouped", "mxfp8"))
    assert not change.text
    assert_expected_inline(change.decisions, """\
experts grouped fprop 16 x 64 x 32: mxfp8; 4 groups, each padded to a multiple of 32 tokens
experts grouped dgrad 16 x 32 x 64: mxfp8; 4 groups, each padded to a multiple of 32 tokens
experts grouped wgrad 64 x 32 x 16: mxfp8; 4 groups, each padded to a multiple of 32 tokens""")


def test_groups_of_activations_are_none():
    class Activations(nn.Module):
        def forward(self, x, y, ends):
            return F.grouped_mm(x, y, offs=ends)

    change = around("find_grouped", Activations(), matrix(16, 32, grad=False), matrix(4, 32, 64, grad=False), ENDS)
    assert_expected_inline(change.decisions, """- grouped fprop 16 x 64 x 32: multiplies activations with activations; only expert weights are quantised""")


def test_nothing_in_a_model_without_products():
    assert not around("find_matmuls", nn.ReLU(), matrix(8, 32)).decisions
