"""``share``: equal nodes become one."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet

BOTH = quartet.Policy("mxfp8").on("*", "mxfp8")


class Pair(nn.Module):
    """Two layers that read the same X."""

    def __init__(self, wrap=lambda layer, x: layer(x)):
        super().__init__()
        self.left, self.right, self.wrap = linear(), linear(), wrap

    def forward(self, x):
        return self.wrap(self.left, x), self.wrap(self.right, x)


def test_two_layers_read_one_quantised_x():
    with torch.no_grad():
        assert_expected_inline(around("share", Pair(), matrix(8, 32), policy=BOTH).text, """\
  %0 = %1[0] : f8e4m3[8, 32]
  %2 = %1[1] : u8[8, 1]
  %3 = %4[0] : f8e4m3[64, 32]
  %5 = %4[1] : u8[64, 1]
- %6 = quantize(x, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[8, 32], u8[8, 1], u8[0])
- %7 = %6[0] : f8e4m3[8, 32]
- %8 = %6[1] : u8[8, 1]
- %9 = scaled_mm(%7, %8, %3, %5, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]
+ %9 = scaled_mm(%0, %2, %3, %5, 'e4m3/32 e8m0 ceil nearest', 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[8, 64]""")


def test_both_gradients_read_one_quantised_e():
    assert_expected_inline(around("share", linear(), matrix(8, 32), policy="fp8").text, """\
  %0 = %1[1] : f32[1, 1]
  %2 = %3[0] : f8e4m3[8, 64] | bwd!
  %4 = %3[1] : f32[1, 1] | bwd!
  %5 = permute(%6, [1, 0]) : f8e4m3[32, 64] | bwd!
- %7 = quantize(g, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[8, 64], f32[1, 1], u8[0]) | bwd!
- %8 = %7[0] : f8e4m3[8, 64] | bwd!
- %9 = %7[1] : f32[1, 1] | bwd!
- %10 = scaled_mm(%8, %9, %5, %0, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 32] | bwd!
+ %10 = scaled_mm(%2, %4, %5, %0, 'e4m3/tensor fp32 amax nearest', 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 32] | bwd!""")


def test_nothing_where_both_draw_bits_of_their_own():
    assert not around("share", linear(), matrix(8, 32), policy="tetrajet").text


def test_nothing_across_checkpointed_regions():
    model = Pair(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    change = around("share", model, matrix(8, 32, grad=False), policy=BOTH)
    assert sum("quantize(x, " in line for line in change.after) == 2
