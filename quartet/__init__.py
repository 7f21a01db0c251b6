"""Low-precision training as a compiler pass: ``torch.compile(model, backend="quartet")``."""

from quartet.explain import explain
from quartet.kernels.spec import QuantSpec, SpecError
from quartet.lowering.recipe import Gemm, Operand, Recipe, Rotation
from quartet.policy import Policy, Rule
from quartet.recipes import PolicyError, recipes, register
from quartet.statistics import statistics

__version__ = "0.1.0"
__all__ = ["Gemm", "Operand", "Policy", "PolicyError", "QuantSpec", "Recipe", "Rotation", "Rule", "SpecError",
           "explain", "recipes", "register", "statistics"]
