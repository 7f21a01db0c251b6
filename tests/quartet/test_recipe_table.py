"""docs/recipes.md is what the code says, and what it says is possible is what a policy takes."""

from pathlib import Path

import pytest

from quartet import Policy, recipes
from quartet.kernels.cpu import ops as cpu
from quartet.lowering.recipe import OP_CLASSES
from quartet.possible import obstacle
from quartet.recipe_table import markdown
from quartet.recipes import PolicyError

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


def test_every_recipe_is_possible_somewhere_and_every_class_has_one():
    assert all(any(obstacle(recipe, op) is None for op in OP_CLASSES) for recipe in recipes().values())
    assert all(any(obstacle(recipe, op) is None for recipe in recipes().values() if recipe.name != "bf16")
               for op in OP_CLASSES)
