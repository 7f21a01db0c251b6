"""Decide for every GEMM of every site: a quantiser pair from the policy, or a reason to leave it alone."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.spec import dtype_name
from quartet.lowering import registry
from quartet.lowering.cost import Layer, predict
from quartet.lowering.graph import aten, shape, val
from quartet.lowering.rates import rates_of
from quartet.lowering.recipe import ROLES
from quartet.lowering.resolution import Choice
from quartet.passes.layers import layers_of
from quartet.passes.sites import MatmulSite
from quartet.passes.state import State, recipe_of
from quartet.runtime.devices import Target

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
    layers = layers_of(site.fqn for site in state.sites)
    for site in state.sites:
        layer = layers.get(site.fqn)
        resolution = state.config.resolve(site.op_class, site.fqn, site.m, site.n, site.k, layer)
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
            if site.recipe.keep and layer is None:
                site.notes += (f"which layer this is does not show in its name, so the {site.recipe.keep[0]} are not "
                               "left alone",)
            key = (value_key(site.x[0]), site.x[1], str(site.batch), site.groups and site.groups.offs,
                   site.recipe.fprop, site.recipe.wgrad)
            site.x_group = groups.setdefault(key, site.index)
    if state.config.where_it_pays:
        _leave_slower(state)


def _leave_slower(state: State) -> None:
    """Take the layers out of the plan that the policy's default recipe would make slower."""
    sharing = Counter(site.x_group for site in state.planned())
    for site in state.planned():
        resolution, recipe = site.resolution, recipe_of(site)
        target = state.config.target_of(val(site.x[0]).device)
        rates = rates_of(target)
        if rates is None or resolution is None or any(resolution.choice(role).rule is not None for role in ROLES):
            continue
        if site.groups is not None:
            site.recipe = None
            site.reasons = dict.fromkeys(ROLES, "the cost model knows no groups: name it in a rule")
            continue
        recompute = (state.config.recompute or recipe.recompute) == "gemm" and len(site.products) > 1
        m, n, k = map(_known, (site.m, site.n, site.k))
        kernels = {role: _kernel(state, site, role, target) for role in site.products}
        cost = predict(recipe, Layer(kernels, m, n, k, sharing[site.x_group], recompute), rates)
        if cost is not None and not cost.pays:
            site.recipe = None
            site.reasons = dict.fromkeys(ROLES, f"would not pay: predicted {cost}, forward and backward")


def _known(size: Any) -> int:
    """A size, or what a symbolic one was when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint)


def _kernel(state: State, site: MatmulSite, role: str, target: Target) -> str:
    gemm = site.active(role)
    if gemm is None or gemm.a.spec is None or gemm.b.spec is None:
        return ""
    rotation = gemm.rotation.n if gemm.rotation is not None else 0
    specs = (gemm.a.spec, rotation), (gemm.b.spec, rotation)
    kernel, _ = registry.choose(target, site.dtype, specs, state.config.disable_kernels)
    return "" if kernel is None else kernel.name


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
