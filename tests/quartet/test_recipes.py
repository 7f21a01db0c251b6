"""The catalogue of recipes: what the built-in ones say, and what can be registered."""

import importlib
from dataclasses import replace

import pytest

from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.kernels.spec import QuantSpec
from quartet.lowering.recipe.types import OP_CLASSES, ROLES, Gemm, Operand, Recipe, Rotation
from quartet.recipes import PolicyError, recipes, reference, register, resolve

catalogue = importlib.import_module("quartet.recipes")
CEIL = QuantSpec.parse("e2m1/32 e8m0 ceil nearest")
MINE = Recipe("mine", fprop=Gemm(Operand(CEIL), Operand(CEIL)))


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(catalogue, "_registered", {})


def test_built_in_names_in_order():
    assert list(recipes())[:3] == ["quartet", "quartet-paper", "bf16"]
    assert all(name == recipe.name and recipe.summary for name, recipe in recipes().items())


def test_catalogue_is_read_only():
    with pytest.raises(TypeError):
        recipes()["quartet"] = MINE


@pytest.mark.parametrize("name, forward, signs", [
    ("quartet", QuantSpec("e2m1", 32, "e8m0", "even", "nearest", mask=False), FLAT_SIGNS),
    ("quartet-paper", QuantSpec("e2m1", 32, "e8m0", "quest", "nearest", "centred", "floor", True), "none"),
])
def test_quartet_is_what_the_paper_says_but_for_forward(name, forward, signs):
    recipe = recipes()[name]
    assert recipe.fprop == Gemm(Operand(forward), Operand(forward), Rotation(32, signs))
    gradient = QuantSpec("e2m1", 32, "e8m0", "headroom", "stochastic")
    for gemm in (recipe.dgrad, recipe.wgrad):
        assert gemm == Gemm(Operand(gradient), Operand(gradient, "saved"), Rotation(32, "random"))
    assert recipe.skip == tuple(c for c in OP_CLASSES if c != "linear")


def test_quartet_and_its_paper_version_differ_in_forward_only():
    ours, paper = recipes()["quartet"], recipes()["quartet-paper"]
    assert (ours.dgrad, ours.wgrad, ours.skip) == (paper.dgrad, paper.wgrad, paper.skip)
    assert ours.fprop.rotation != paper.fprop.rotation and ours.fprop.a.spec != paper.fprop.a.spec


def test_bf16_rewrites_nothing():
    assert [getattr(recipes()["bf16"], role) for role in ROLES] == [None] * 3


def test_register_makes_a_name_resolvable_after_the_built_ins():
    assert register(MINE) is MINE
    assert resolve("mine") is MINE and list(recipes())[-1] == "mine"


def test_register_twice_and_anew():
    register(MINE)
    register(replace(MINE))
    newer = register(replace(MINE, summary="newer"))
    assert resolve("mine") == newer


def test_register_an_equal_built_in_changes_nothing():
    register(replace(recipes()["quartet"]))
    assert catalogue._registered == {}


def test_register_refuses_to_override_a_built_in():
    with pytest.raises(PolicyError, match="'quartet' is built in.*name='my-quartet'"):
        register(replace(MINE, name="quartet"))


@pytest.mark.parametrize("name", ["", "  ", "none", "a.toml", "two\nlines", 7])
def test_register_refuses_a_name_that_cannot_be(name):
    with pytest.raises(PolicyError, match="name"):
        register(replace(MINE, name=name))


def test_register_checks_skip():
    with pytest.raises(PolicyError, match="op class in skip of recipe 'mine': 'lmhead'; did you mean 'lm_head'"):
        register(replace(MINE, skip=("lmhead",)))
    with pytest.raises(PolicyError, match="tuple of op classes, not str"):
        register(replace(MINE, skip="lm_head"))


def test_register_wants_a_recipe():
    with pytest.raises(PolicyError, match="expected a Recipe, got str"):
        register("quartet")


def test_resolve_passes_none_and_recipes_through():
    assert resolve(None) is None
    assert resolve(MINE) is MINE


def test_resolve_names_the_nearest():
    with pytest.raises(PolicyError, match="unknown recipe 'Quartte'; did you mean 'quartet'.* possible: quartet, qu"):
        resolve("Quartte")


def test_resolve_refuses_other_types():
    with pytest.raises(PolicyError, match="not int 4"):
        resolve(4)


def test_reference_stores_built_ins_by_name_and_others_whole():
    register(MINE)
    assert reference(recipes()["bf16"]) == "bf16"
    assert reference("mine") is MINE
    assert reference(None) is None
