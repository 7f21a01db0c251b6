"""``embed``: the rows that a lookup gathers, quantised where a rule names it."""

import pytest
import torch
from around import around
from expecttest import assert_expected_inline
from torch import nn

import quartet

TOKENS = torch.tensor([3, 1, 4, 1])


def table(**kwargs):
    return nn.Embedding(8, 32, dtype=torch.bfloat16, **kwargs)


def gathered(recipe, model=None):
    return around("embed", model or table(), TOKENS, policy=quartet.Policy(None).on("embedding", recipe))


def test_rows_with_scales_of_their_own_are_quantised_as_gathered():
    assert_expected_inline(gathered("mxfp8").text, """\
  %0 = convert_element_type(%1, bf16) : bf16[8, 32] | bwd
- %2 = embedding(weight, x) : bf16[4, 32]
+ %3 = embedding(weight, x) : bf16[4, 32]
+ %4 = view(%3, [-1, 32]) : bf16[4, 32]
+ %5 = quantize(%4, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[4, 32], u8[4, 1], u8[0])
+ %6 = %5[0] : f8e4m3[4, 32]
+ %7 = %5[1] : u8[4, 1]
+ %8 = dequantize(%6, %7, 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[4, 32]
+ %9 = view(%8, [4, 32]) : bf16[4, 32]
- return [%2, %0, None]
+ return [%9, %0, None]""")


def test_a_scale_of_the_whole_table_is_made_of_its_maximum():
    assert_expected_inline(gathered("fp8").text, """\
  %0 = convert_element_type(%1, bf16) : bf16[8, 32] | bwd
- %2 = embedding(weight, x) : bf16[4, 32]
+ %3 = quantize(weight, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[8, 32], f32[1, 1], u8[0])
+ %4 = %3[0] : f8e4m3[8, 32]
+ %5 = %3[1] : f32[1, 1]
+ %6 = dequantize(%4, %5, 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 32]
+ %7 = embedding(%6, x) : bf16[4, 32]
- return [%2, %0, None]
+ return [%7, %0, None]""")


def test_rows_are_rotated_there_and_back_and_what_was_clipped_has_no_gradient():
    assert_expected_inline(gathered("quartet-paper").text, """\
  %0 = convert_element_type(%1, bf16) : bf16[8, 32] | bwd
- %2 = embedding(weight, x) : bf16[4, 32]
- %3 = convert_element_type(g, f32) : f32[4, 32] | bwd
+ %4 = embedding(weight, x) : bf16[4, 32]
+ %5 = view(%4, [-1, 32]) : bf16[4, 32]
+ %6 = hadamard(%5, 32, None, False, f32) : f32[4, 32]
+ %7 = quantize(%6, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', None, 0) : (u8[4, 16], u8[4, 1], u8[4, 4])
+ %8 = %7[0] : u8[4, 16]
+ %9 = %7[1] : u8[4, 1]
+ %10 = dequantize(%8, %9, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', f32) : f32[4, 32]
+ %11 = hadamard(%10, 32, None, True, bf16) : bf16[4, 32]
+ %12 = %7[2] : u8[4, 4]
+ %13 = view(%11, [4, 32]) : bf16[4, 32]
+ %14 = view(g, [-1, 32]) : bf16[4, 32] | bwd!
+ %15 = hadamard(%14, 32, None, False, f32) : f32[4, 32] | bwd!
+ %16 = apply_mask(%15, %12) : f32[4, 32] | bwd!
+ %17 = hadamard(%16, 32, None, True, bf16) : bf16[4, 32] | bwd!
+ %18 = view(%17, [4, 32]) : bf16[4, 32] | bwd!
+ %3 = convert_element_type(%18, f32) : f32[4, 32] | bwd
- return [%2, %0, None]
+ return [%13, %0, None]""")


def test_nothing_without_a_rule():
    change = around("embed", table(), TOKENS, policy="auto")
    assert not change.text
    assert_expected_inline(change.decisions, """weight embedding fprop 4 x 32 x 8: recipe 'quartet' leaves embedding in high precision unless a rule names it""")


@pytest.mark.parametrize("model, reason", [
    (nn.EmbeddingBag(8, 32), "a bag sums rows as it gathers them; only single rows are quantised"),
    (table(sparse=True), "its gradient is sparse; only dense ones are supported: sparse=False")])
def test_nothing_to_sums_of_rows_and_sparse_gradients(model, reason):
    change = around("embed", model, TOKENS[None], policy=quartet.Policy(None).on("embedding", "mxfp8"))
    assert not change.text and change.records[0].reason == reason
