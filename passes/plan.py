"""Decide for every GEMM of every site: a quantiser pair from the policy, or a reason to leave it alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.spec import dtype_name
from quartet.lowering.graph import aten, shape, val
from quartet.lowering.recipe import ROLES
from quartet.lowering.resolution import Choice
from quartet.passes.sites import MatmulSite
from quartet.passes.state import State

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VIEWS = (
    aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.t.default, aten.transpose.int,
    aten.squeeze.dim, aten.unsqueeze.default, aten.alias.default, aten.slice.Tensor, aten.select.int,
    torch.ops.prims.convert_element_type.default, operator.getitem,
)


class UnsupportedMatmul(ValueError):
    """Under ``strict=True``: a matmul that the policy quantises and that cannot be."""


def plan(state: State) -> None:
    """Set ``recipe``, ``reasons`` and ``x_group`` of every site. Raises UnsupportedMatmul when strict."""
    groups: dict[Any, int] = {}
    for site in state.sites:
        resolution = state.config.resolve(site.op_class, site.fqn, site.m, site.n, site.k)
        site.resolution = resolution
        obstacle = _obstacle(site)
        if obstacle is not None and resolution.quantizes:
            if state.config.strict:
                raise UnsupportedMatmul(
                    f"strict=True, and {site.fqn or 'a matmul'} (node {site.products['fprop'].node.name}, "
                    f"m={site.m} n={site.n} k={site.k}, {site.dtype}) cannot be quantised: {obstacle}")
            site.reasons = {role: obstacle for role in ROLES}
            continue
        choices = {role: resolution.choice(role) for role in ROLES}
        site.reasons = {role: choice.reason for role, choice in choices.items() if choice.gemm is None}
        site.remarks = {role: choice.reason for role, choice in choices.items() if _altered(choice, role)}
        site.recipe = resolution.effective if resolution.quantizes else None
        if site.recipe is not None:
            key = (value_key(site.x[0]), site.x[1], site.recipe.fprop, site.recipe.wgrad)
            site.x_group = groups.setdefault(key, site.index)


def _altered(choice: Choice, role: str) -> bool:
    """Whether the policy had to change the recipe's GEMM, such as a saved operand that does not exist."""
    return choice.gemm is not None and choice.recipe is not None and choice.gemm != getattr(choice.recipe, role)


def _obstacle(site: MatmulSite) -> str | None:
    dtypes = {val(site.x[0]).dtype, val(site.w[0]).dtype}
    if not dtypes <= set(DTYPES):
        names = ", ".join(sorted(dtype_name(d) for d in dtypes))
        return f"operands are {names}; quantisers take float32, bfloat16 or float16: cast the module or use autocast"
    if any(isinstance(size, int) and size == 0 for size in (site.m, site.n, site.k)):
        return f"a size is zero (m={site.m}, n={site.n}, k={site.k})"
    return None


def value_key(node: Node) -> Any:
    """Equal for nodes that are the same view or cast of the same node."""
    if node.op == "call_function" and node.target in VIEWS and isinstance(node.args[0], Node):
        size = str(shape(node)) if _tensor(node) else ""
        return (str(node.target), value_key(node.args[0]), str(node.args[1:]), size)
    return node


def _tensor(node: Node) -> bool:
    return hasattr(node.meta.get("val"), "shape")
