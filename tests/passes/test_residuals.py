"""``unchanged`` and ``save``: what forward leaves for backward."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 64, bias=False)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)


def test_a_weight_that_dgrad_would_read_is_tied_to_backward():
    assert_expected_inline(around("unchanged", linear(), matrix(8, 32)).text, """+ %0 = _assert_tensor_metadata(weight) : None | bwd!""")


def test_nothing_to_tie_where_no_gradient_reads_it():
    assert not around("unchanged", linear(), matrix(8, 32, grad=False)).text


def test_nothing_to_tie_where_autograd_reads_a_cast_of_it():
    assert not around("unchanged", Autocast(), torch.randn(8, 32, requires_grad=True)).text


def test_a_product_whose_codes_are_kept_is_multiplied_again():
    assert_expected_inline(around("save", linear(), matrix(8, 32)).text, """\
  %0 = %1[0] : u8[8, 16]
  %2 = %1[1] : u8[8, 1]
  %3 = %4[0] : u8[64, 16]
  %5 = %4[1] : u8[64, 1]
- %6 = scaled_mm(%0, %2, %3, %5, 'e2m1/32 e8m0 even nearest', 'e2m1/32 e8m0 even nearest', bf16) : bf16[8, 64]
+ %6 = scaled_mm(%0, %2, %3, %5, 'e2m1/32 e8m0 even nearest', 'e2m1/32 e8m0 even nearest', bf16) : bf16[8, 64] | prefer_recompute""")


def test_nothing_is_multiplied_again_where_the_recipe_or_the_option_says_so():
    assert not around("save", linear(), matrix(8, 32), policy="fp8").text
    assert not around("save", linear(), matrix(8, 32), recompute="none").text
    assert around("save", linear(), matrix(8, 32), policy="fp8", recompute="gemm").text


def test_nothing_is_multiplied_again_whose_codes_backward_does_not_have():
    assert not around("save", linear(), matrix(8, 32, grad=False)).text  # no dgrad: the codes of W are not kept
    assert not around("save", linear(), matrix(8, 32), policy="mxfp8", recompute="gemm").text  # from the tensors


def test_nothing_without_backward():
    with torch.no_grad():
        assert not around("save", linear(), matrix(8, 32)).text
