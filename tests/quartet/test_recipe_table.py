"""docs/recipes.md is what the code says, and what it says is possible is what a policy takes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quartet import Policy, explain, recipes
from quartet.cli.recipe_table import TARGETS, kernels_of, markdown
from quartet.kernels.cpu import ops as cpu
from quartet.lowering.recipe.types import OP_CLASSES
from quartet.policy.possible import obstacle
from quartet.recipes import PolicyError
from quartet.runtime.devices import Target

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the page names the C++ kernels, and no compiler builds them")
def test_the_page_is_generated():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: make docs"


@pytest.mark.parametrize("op", OP_CLASSES)
def test_a_policy_takes_what_is_possible_and_names_it_otherwise(op):
    for name, recipe in recipes().items():
        reason = obstacle(recipe, op)
        if reason is None:
            assert Policy(None).on(op, name).rules[0].op == op
        else:
            with pytest.raises(PolicyError, match="possible") as error:
                Policy(None).on(op, name)
            assert repr(name) in str(error.value)


@pytest.mark.parametrize(("op", "others"), [
    ("embedding", {"fp8-delayed", "fp8-trillion"}), ("grouped", set()), ("bmm", set()), ("attention_qk", set()),
    ("attention_pv", set()),
])
def test_recipes_that_do_something_to_one_weight_are_refused_where_there_is_none(op, others):
    refused = {name for name, recipe in recipes().items() if recipe.quantizes and obstacle(recipe, op) is not None}
    assert refused == {"fp4-dge", "tetrajet-ema"} | others


@pytest.mark.parametrize("op", ["linear", "lm_head", "router", "conv"])
def test_one_weight_takes_all(op):
    assert all(obstacle(recipe, op) is None for recipe in recipes().values() if recipe.quantizes)


def test_what_only_forward_has_does_not_bar_the_other_roles():
    policy = Policy(None).on("attention_qk", "fp4-dge", role=("dgrad", "wgrad"))
    assert policy.rules[0].roles == ("dgrad", "wgrad")
    with pytest.raises(PolicyError, match="multiplies the outliers of X apart and takes the gradient of W by the slope "
                                          "of its quantiser, of which a product of two activations has nothing"):
        Policy(None).on("attention_qk", "fp4-dge", role=("fprop", "wgrad"))


@pytest.mark.parametrize("recipe", ["fp4-dge", "tetrajet-ema"])
def test_a_group_of_op_classes_takes_what_all_of_it_take(recipe):
    with pytest.raises(PolicyError, match="possible on op class 'attention_qk': quartet, .*tetrajet, "):
        Policy(None).on("attention", recipe)


@pytest.mark.parametrize("role", ["dgrad", ("dgrad", "wgrad")])
def test_an_embedding_is_quantised_in_forward_only(role):
    with pytest.raises(PolicyError, match="an embedding is quantised in forward only, and role='dgrad'.*give role="):
        Policy(None).on("embedding", "mxfp8", role=role)
    assert Policy(None).on("embedding", None, role=role) and Policy(None).on("embedding", "mxfp8", role="forward")


def test_every_recipe_is_possible_somewhere_and_every_class_has_one():
    assert all(any(obstacle(recipe, op) is None for op in OP_CLASSES) for recipe in recipes().values())
    assert all(any(obstacle(recipe, op) is None for recipe in recipes().values() if recipe.name != "bf16")
               for op in OP_CLASSES)


class Every(nn.Module):
    """A product of every op class, and something to save."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.up = nn.Embedding(128, 64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.experts, self.gate = nn.Parameter(torch.randn(4, 64, 64) / 8), nn.Linear(64, 4, bias=False)
        self.conv, self.lm_head = nn.Conv1d(64, 64, 3, padding=1), nn.Linear(64, 128, bias=False)

    def forward(self, tokens, ends):
        x = self.up(F.gelu(self.embed(tokens))).sin()
        q, k, v = self.qkv(x).chunk(3, -1)
        x = (q @ k.mT * 0.1).softmax(-1) @ v + q * k @ v.mT @ v
        weights, chosen = self.gate(x).softmax(-1).topk(1, -1)
        x = F.grouped_mm(x.flatten(0, 1), self.experts, offs=ends).view_as(x) * weights + chosen
        return F.cross_entropy(self.lm_head(self.conv(x.mT).mT).flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize("name, target", [
    *(("quartet", target) for target in TARGETS), ("fp8", "sm_80"), ("fp8", "sm_90"), ("int8", "cpu"),
    ("fp8-block", "sm_90"),
])
def test_the_kernels_of_the_page_are_those_of_a_compile(name, target):
    pytest.importorskip("triton")
    policy = Policy(None)
    for op in OP_CLASSES[:-1]:
        policy = policy.on(op=op, recipe=name)
    model = Every().bfloat16()
    tokens = torch.arange(128).view(2, 64)
    ends = torch.tensor([32, 64, 96, 128], dtype=torch.int32)
    policy = policy.on(op="saved", recipe="e4m3/16")
    report = explain(model, tokens, ends, options={"policy": policy}, target=target)
    found = {}
    for r in report.records:
        if r.recipe == name or r.kernel is None:
            found.setdefault(r.op_class, {})[r.role] = r.kernel
    for op in OP_CLASSES[:-1]:
        page = kernels_of(recipes()[name], op, Target.named(target))
        if None in page.values():
            page = dict.fromkeys(page)  # then the layer is left alone whole
        assert {role: found[op][role] for role in page} == page, op
    encoded = {r.saved for r in report.saved if r.saved == "e4m3/16 nearest"}
    assert bool(encoded) is (kernels_of(recipes()["e4m3/16"], "saved", Target.named(target))["saved"] is not None)
