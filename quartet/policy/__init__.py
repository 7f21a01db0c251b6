"""Which matmul gets which recipe."""

from quartet.policy.rules import AUTO, Policy, Rule
from quartet.recipes import PolicyError

__all__ = ["AUTO", "Policy", "PolicyError", "Rule"]
