"""``plan``: a recipe for each product or the reason to leave it alone; the graph stays."""

import torch
from around import around, linear, matrix
from expecttest import assert_expected_inline
from torch import nn

import quartet


def planned(model, *inputs, **kwargs):
    change = around("plan", model, *inputs, **kwargs)
    assert not change.text
    return change.decisions


def test_the_last_rule_that_matches_decides_each_product():
    policy = quartet.Policy("mxfp8").on("0", "fp8").on("1", None, role="dgrad")
    model = nn.Sequential(linear(64, 64), linear(64, 64))
    assert_expected_inline(planned(model, matrix(64, 64), policy=policy), """\
0 linear fprop 64 x 64 x 64: fp8
0 linear dgrad 64 x 64 x 64: fp8
0 linear wgrad 64 x 64 x 64: fp8
1 linear fprop 64 x 64 x 64: mxfp8
1 linear dgrad 64 x 64 x 64: rule 1: on('1', None, role='dgrad')
1 linear wgrad 64 x 64 x 64: mxfp8""")


def test_what_the_default_leaves_alone_says_why():
    model = nn.Sequential(linear(64, 64), nn.ReLU(), linear(64, 8))
    assert_expected_inline(planned(model, matrix(64, 64), policy=quartet.Policy("mxfp8")), """\
0 linear fprop 64 x 64 x 64: mxfp8
0 linear dgrad 64 x 64 x 64: mxfp8
0 linear wgrad 64 x 64 x 64: mxfp8
2 lm_head fprop 64 x 8 x 64: recipe 'mxfp8' leaves lm_head in high precision unless a rule names it
2 lm_head dgrad 64 x 64 x 8: recipe 'mxfp8' leaves lm_head in high precision unless a rule names it
2 lm_head wgrad 8 x 64 x 64: recipe 'mxfp8' leaves lm_head in high precision unless a rule names it""")


def test_nothing_is_quantised_in_a_dtype_without_quantisers():
    model = nn.Linear(32, 64, bias=False, dtype=torch.float64)
    assert_expected_inline(planned(model, torch.randn(8, 32, dtype=torch.float64)), """\
weight linear fprop 8 x 64 x 32: operands are float64; quantisers take float32, bfloat16 or float16: cast the module or use autocast
weight linear wgrad 64 x 32 x 8: operands are float64; quantisers take float32, bfloat16 or float16: cast the module or use autocast""")


def test_where_nothing_is_planned_the_passes_after_it_do_not_run():
    assert around("rotate", linear(), matrix(8, 32), policy="bf16").after is None
    assert around("rotate", linear(), matrix(8, 32), policy="mxfp8").after is not None
