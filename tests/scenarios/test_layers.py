"""Rules and recipes that are about some layers of a stack."""

import pytest
import torch
from harness import compile_eager, step
from torch import nn

from quartet import Policy, QuantSpec, Recipe, explain, recipes
from quartet.kernels.spec import SpecError
from quartet.lowering.recipe.depth import is_within, normalise_depth
from quartet.passes.classify.layers import layers_of
from quartet.recipes import PolicyError


class Stack(nn.Module):
    def __init__(self, depth):
        super().__init__()
        layers = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(depth))
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def quantised_layers(depth, policy):
    report = explain(Stack(depth), torch.randn(8, 32), options={"policy": policy})
    return {int(r.fqn.split(".")[1]) for r in report if r.lowered}, report


@pytest.mark.parametrize("text, chosen", (("first 1", {0}), ("last 2", {5, 6}), ("last 15%", {5, 6}), ("last 10%", {6}),
                                          ("first 100%", set(range(7))), ("last 9", set(range(7)))))
def test_which_layers_a_text_means(text, chosen):
    assert {i for i in range(7) if is_within((i, 7), normalise_depth(text))} == chosen


@pytest.mark.parametrize("text", ("", "last", "last 0", "last 101%", "middle 2", "last 2 layers", 3, None))
def test_what_is_not_possible(text):
    with pytest.raises(SpecError, match="write 'first 2', 'last 1'"):
        normalise_depth(text)
    if text is not None:
        with pytest.raises(PolicyError, match="write 'first 2'"):
            Policy("fp8").on("linear", None, layers=text)
    with pytest.raises(SpecError):
        Recipe("mine", keep=(text,))
    with pytest.raises(SpecError, match="keep is a tuple"):
        Recipe("mine", keep="last 1")


def test_layers_are_the_first_numbers_of_names():
    names = ("model.layers.0.q", "model.layers.11.experts.3.up", "lm_head", "vision.blocks.2.fc", "vision.blocks.0.fc")
    assert layers_of(names) == {
        "model.layers.0.q": (0, 12), "model.layers.11.experts.3.up": (11, 12), "vision.blocks.2.fc": (2, 3),
        "vision.blocks.0.fc": (0, 3)}
    assert layers_of(("layers.4.q", "layers.4.k")) == {}


def test_a_rule_about_layers():
    policy = Policy("fp8").on(None, None, layers="first 2").on("*.0", "mxfp8", layers="last 1")
    taken, report = quantised_layers(6, policy)
    assert taken == {2, 3, 4, 5}
    assert {r.recipe for r in report if r.fqn == "layers.5.0"} == {"mxfp8"}
    assert {r.reason for r in report if r.fqn == "layers.0.2"} == {"rule 0: on(recipe=None, layers='first 2')"}
    assert eval(repr(policy), {"Policy": Policy}) == policy == Policy.from_toml(policy.to_toml())
    assert policy.digest() != Policy("fp8").on(None, None).on("*.0", "mxfp8").digest()


def test_nvfp4_keeps_its_last_layers_unless_a_rule_names_them():
    assert recipes()["nvfp4"].keep == ("last 15%",)
    taken, report = quantised_layers(8, "nvfp4")
    assert taken == set(range(6))
    assert {r.reason for r in report if r.fqn.startswith("layers.7")} == {
        "recipe 'nvfp4' keeps the last 15% of the layers in high precision unless a rule names them; "
        "this is layer 7 of 8"}
    assert quantised_layers(8, Policy("nvfp4").on("linear", "nvfp4"))[0] == set(range(8))


def test_a_rule_that_matches_no_layer_says_so():
    with pytest.warns(UserWarning, match="matches no matmul"):
        compiled, _ = compile_eager(Stack(3), Policy("fp8").on("*.norm", None, layers="last 1"))
        compiled(torch.randn(8, 32))


def test_a_block_compiled_by_itself_does_not_know_its_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(32, 32)

        def forward(self, x):
            return self.up(x)

    model = Block()
    compiled, backend = compile_eager(model, "nvfp4")
    step(compiled, model, (torch.randn(40, 32),))
    assert all(r.lowered and "which layer this is" in r.notes[0] for r in backend.records)


def test_a_recipe_of_ones_own_keeps_layers_through_toml():
    spec = QuantSpec.parse("e4m3/tensor fp32 amax nearest")
    from quartet import Gemm, Operand

    recipe = Recipe("mine", fprop=Gemm(Operand(spec), Operand(spec)), keep=("first 1", "last 1"))
    policy = Policy(recipe)
    assert Policy.from_toml(policy.to_toml()) == policy
    assert quantised_layers(4, policy)[0] == {1, 2}
