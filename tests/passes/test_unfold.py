"""``unfold``: convolutions that a rule names, written as products of matrices."""

from around import around, matrix
from expecttest import assert_expected_inline
from torch import nn

import quartet

CONV = quartet.Policy().on("conv", "mxfp8")


def conv(*args, **kwargs):
    return nn.Conv1d(*args, **kwargs).bfloat16()


def test_a_kernel_of_one_is_a_product_as_it_lies():
    change = around("unfold", conv(32, 48, 1), matrix(2, 32, 8, grad=False), policy=CONV)
    assert_expected_inline(change.text, """\
- %0 = convolution(x, weight, bias, [1], [0], [1], False, [0], 1) : bf16[2, 48, 8]
- %1 = convolution_backward(g, x, weight, [48], [1], [0], [1], False, [0], 1, [False, True, True]) : (None, bf16[48, 32, 1], bf16[48]) | bwd
- %2 = %1[1] : bf16[48, 32, 1] | bwd
- %3 = %1[2] : bf16[48] | bwd
- return [%0, %2, %3, None]
+ %4 = permute(x, [0, 2, 1]) : bf16[2, 8, 32]
+ %5 = clone(%4, memory_format=torch.contiguous_format) : bf16[2, 8, 32]
+ %6 = view(%5, [-1, 32]) : bf16[16, 32]
+ %7 = view(weight, [48, 32]) : bf16[48, 32]
+ %8 = permute(%7, [1, 0]) : bf16[32, 48]
+ %9 = mm(%6, %8) : bf16[16, 48]
+ %10 = add(%9, bias) : bf16[16, 48]
+ %11 = view(%10, [-1, 8, 48]) : bf16[2, 8, 48]
+ %12 = permute(%11, [0, 2, 1]) : bf16[2, 48, 8]
+ %13 = clone(%12, memory_format=torch.contiguous_format) : bf16[2, 48, 8]
+ %14 = permute(g, [0, 2, 1]) : bf16[2, 8, 48] | bwd!
+ %15 = clone(%14, memory_format=torch.contiguous_format) : bf16[2, 8, 48] | bwd!
+ %16 = view(%15, [-1, 48]) : bf16[16, 48] | bwd!
+ %17 = permute(%16, [1, 0]) : bf16[48, 16] | bwd!
+ %18 = mm(%17, %6) : bf16[48, 32] | bwd!
+ %19 = view(%18, [48, 32, 1]) : bf16[48, 32, 1] | bwd!
+ %20 = sum(%16, [0]) : bf16[48] | bwd!
+ return [%13, %19, %20, None]""")


def test_taps_are_unfolded_and_the_gradient_is_folded():
    model = conv(16, 48, 2, bias=False).requires_grad_(False)
    assert_expected_inline(around("unfold", model, matrix(2, 16, 9), policy=CONV).text, """\
- %0 = convolution(x, weight, None, [1], [0], [1], False, [0], 1) : bf16[2, 48, 8]
- %1 = convolution_backward(g, x, weight, [0], [1], [0], [1], False, [0], 1, [True, False, False]) : (bf16[2, 16, 9], None, None) | bwd
- %2 = %1[0] : bf16[2, 16, 9] | bwd
- return [%0, None, %2]
+ %3 = unfold(x, 2, 2, 1) : bf16[2, 16, 8, 2] | prefer_recompute
+ %4 = permute(%3, [0, 2, 1, 3]) : bf16[2, 8, 16, 2] | prefer_recompute
+ %5 = clone(%4, memory_format=torch.contiguous_format) : bf16[2, 8, 16, 2] | prefer_recompute
+ %6 = view(%5, [-1, 32]) : bf16[16, 32] | prefer_recompute
+ %7 = view(weight, [48, 32]) : bf16[48, 32]
+ %8 = permute(%7, [1, 0]) : bf16[32, 48]
+ %9 = mm(%6, %8) : bf16[16, 48]
+ %10 = view(%9, [-1, 8, 48]) : bf16[2, 8, 48]
+ %11 = permute(%10, [0, 2, 1]) : bf16[2, 48, 8]
+ %12 = clone(%11, memory_format=torch.contiguous_format) : bf16[2, 48, 8]
+ %13 = permute(g, [0, 2, 1]) : bf16[2, 8, 48] | bwd!
+ %14 = clone(%13, memory_format=torch.contiguous_format) : bf16[2, 8, 48] | bwd!
+ %15 = view(%14, [-1, 48]) : bf16[16, 48] | bwd!
+ %16 = mm(%15, %7) : bf16[16, 32] | bwd!
+ %17 = view(%16, [-1, 8, 16, 2]) : bf16[2, 8, 16, 2] | bwd!
+ %18 = permute(%17, [0, 2, 1, 3]) : bf16[2, 16, 8, 2] | bwd!
+ %19 = convert_element_type(%18, f32) : f32[2, 16, 8, 2] | bwd!
+ %20 = select(%19, -1, 0) : f32[2, 16, 8] | bwd!
+ %21 = constant_pad_nd(%20, [0, 1]) : f32[2, 16, 9] | bwd!
+ %22 = select(%19, -1, 1) : f32[2, 16, 8] | bwd!
+ %23 = constant_pad_nd(%22, [1, 0]) : f32[2, 16, 9] | bwd!
+ %24 = add(%21, %23) : f32[2, 16, 9] | bwd!
+ %25 = convert_element_type(%24, bf16) : bf16[2, 16, 9] | bwd!
+ return [%12, None, %25]""")


def test_nothing_where_no_rule_names_it():
    change = around("unfold", conv(32, 48, 1), matrix(2, 32, 8, grad=False), policy="auto")
    assert not change.text
    assert_expected_inline(change.decisions, """\
weight conv fprop 16 x 48 x 32: recipe 'quartet' leaves conv in high precision unless a rule names it
weight conv wgrad 48 x 32 x 16: recipe 'quartet' leaves conv in high precision unless a rule names it""")


def test_nothing_to_what_is_no_product_of_matrices():
    model = nn.Sequential(conv(32, 32, 2, groups=2), nn.ConvTranspose1d(32, 32, 2).bfloat16())
    change = around("unfold", model, matrix(2, 32, 9, grad=False), policy=CONV)
    assert not change.text
    assert_expected_inline(change.decisions, """\
0 conv fprop 16 x 32 x 32: 2 groups, each a product of its own; only convolutions of one group are unfolded
0 conv wgrad 32 x 32 x 16: 2 groups, each a product of its own; only convolutions of one group are unfolded
1 conv fprop 18 x 32 x 64: a transposed convolution; only forward ones are unfolded
1 conv dgrad 18 x 64 x 32: a transposed convolution; only forward ones are unfolded
1 conv wgrad 32 x 64 x 18: a transposed convolution; only forward ones are unfolded""")
