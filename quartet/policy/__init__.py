"""Which matmul gets which recipe."""

from quartet.policy.policy import AUTO, Policy
from quartet.policy.rules import Rule
from quartet.recipes import PolicyError

__all__ = ["AUTO", "Policy", "PolicyError", "Rule"]
