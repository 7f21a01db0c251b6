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
  %10 = convert_element_type(%9, bf16) : bf16[8, 32] | bwd
- %0 = embedding(weight, x) : bf16[4, 32]
+ %12 = embedding(weight, x) : bf16[4, 32]
+ %13 = view(%12, [-1, 32]) : bf16[4, 32]
+ %14 = quantize(%13, 'e4m3/32 e8m0 ceil nearest', None, 0) : (f8e4m3[4, 32], u8[4, 1], u8[0])
+ %15 = %14[0] : f8e4m3[4, 32]
+ %16 = %14[1] : u8[4, 1]
+ %17 = dequantize(%15, %16, 'e4m3/32 e8m0 ceil nearest', bf16) : bf16[4, 32]
+ %18 = view(%17, [4, 32]) : bf16[4, 32]
- return [%0, %10, None]
+ return [%18, %10, None]""")


def test_a_scale_of_the_whole_table_is_made_of_its_maximum():
    assert_expected_inline(gathered("fp8").text, """\
  %10 = convert_element_type(%9, bf16) : bf16[8, 32] | bwd
- %0 = embedding(weight, x) : bf16[4, 32]
+ %12 = quantize(weight, 'e4m3/tensor fp32 amax nearest', None, 0) : (f8e4m3[8, 32], f32[1, 1], u8[0])
+ %13 = %12[0] : f8e4m3[8, 32]
+ %14 = %12[1] : f32[1, 1]
+ %15 = dequantize(%13, %14, 'e4m3/tensor fp32 amax nearest', bf16) : bf16[8, 32]
+ %16 = embedding(%15, x) : bf16[4, 32]
- return [%0, %10, None]
+ return [%16, %10, None]""")


def test_rows_are_rotated_there_and_back_and_what_was_clipped_has_no_gradient():
    assert_expected_inline(gathered("quartet-paper").text, """\
  %10 = convert_element_type(%9, bf16) : bf16[8, 32] | bwd
- %0 = embedding(weight, x) : bf16[4, 32]
- %1 = convert_element_type(g, f32) : f32[4, 32] | bwd
+ %12 = embedding(weight, x) : bf16[4, 32]
+ %13 = view(%12, [-1, 32]) : bf16[4, 32]
+ %14 = hadamard(%13, 32, None, False, f32) : f32[4, 32]
+ %15 = quantize(%14, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', None, 0) : (u8[4, 16], u8[4, 1], u8[4, 4])
+ %16 = %15[0] : u8[4, 16]
+ %17 = %15[1] : u8[4, 1]
+ %18 = dequantize(%16, %17, 'e2m1/32 e8m0 quest(centred,floor) nearest mask', f32) : f32[4, 32]
+ %19 = hadamard(%18, 32, None, True, bf16) : bf16[4, 32]
+ %20 = %15[2] : u8[4, 4]
+ %21 = view(%19, [4, 32]) : bf16[4, 32]
+ %22 = view(g, [-1, 32]) : bf16[4, 32] | bwd!
+ %23 = hadamard(%22, 32, None, False, f32) : f32[4, 32] | bwd!
+ %24 = apply_mask(%23, %20) : f32[4, 32] | bwd!
+ %25 = hadamard(%24, 32, None, True, bf16) : bf16[4, 32] | bwd!
+ %26 = view(%25, [4, 32]) : bf16[4, 32] | bwd!
+ %1 = convert_element_type(%26, f32) : f32[4, 32] | bwd
- return [%0, %10, None]
+ return [%21, %10, None]""")


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
