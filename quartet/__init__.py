"""Low-precision training as a compiler pass: ``torch.compile(model, backend="quartet")``."""

from quartet.compile import compile
from quartet.explain import explain
from quartet.extend import register_pass, unregister_pass
from quartet.kernels.spec import QuantSpec, SpecError
from quartet.lowering.recipe.types import Delayed, Gemm, Operand, Recipe, Rotation, Saved
from quartet.policy import Policy, Rule
from quartet.recipes import PolicyError, recipes, register
from quartet.runtime.slots.state import load_state_dict, state_dict
from quartet.runtime.slots.stateful import State
from quartet.statistics import statistics

__version__ = "0.1.0"
__all__ = ["Delayed", "Gemm", "Operand", "Policy", "PolicyError", "QuantSpec", "Recipe", "Rotation", "Rule", "Saved",
           "SpecError", "State", "compile", "explain", "load_state_dict", "recipes", "register", "register_pass",
           "state_dict", "statistics", "unregister_pass"]
