"""Decide for every GEMM of every site: a quantiser pair from the policy, or a reason to leave it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quartet.kernels.spec import dtype_name
from quartet.lowering import registry
from quartet.lowering.ir.graph import val
from quartet.lowering.recipe.depth import Layer
from quartet.lowering.recipe.resolution import Choice, Resolution
from quartet.lowering.recipe.types import ROLES
from quartet.passes.classify.aside import quantised_all_the_same
from quartet.passes.classify.layers import layers_of
from quartet.passes.classify.others import OF_CODES
from quartet.passes.compilation import Decides
from quartet.passes.graph_pass import graph_pass
from quartet.passes.plan.decision import decide
from quartet.passes.plan.fastest import fastest
from quartet.passes.plan.sharing import group
from quartet.passes.sites import Decided, Found, Planned
from quartet.passes.state import State

DTYPES = registry.QUANTIZED


class UnsupportedMatmul(ValueError):
    """Under ``strict=True``: a matmul that the policy quantises and that cannot be."""


@graph_pass(reads=Found, writes=Planned,
            summary="the policy's decision for each of the three GEMMs and the kernel that takes it, or the reason to "
                    "leave it alone")
def plan(state: State) -> None:
    """Decide every site, and plan those that the policy quantises, with the kernel of each GEMM. Raises
    UnsupportedMatmul when strict."""
    config, found = state.config, state.sites
    layers = layers_of(site.fqn for site in found)
    candidates = config.policy.candidates() if config.where_it_pays else (config.policy,)

    def trials() -> list[State]:
        return [_trial(state, found, policy, layers, config.strict and policy is candidates[0])
                for policy in candidates]

    sites = fastest(trials, config) if config.where_it_pays else trials()[0].sites
    if config.strict:
        _refuse_what_has_no_site(state)
    state.advance(*sites)
    group(state)


def _trial(state: State, found: Sequence[Found], policy: Decides, layers: Mapping[str, Layer], strict: bool) -> State:
    """The sites of a graph as a policy decides them. Raises UnsupportedMatmul when strict."""
    trial = State(state.gm, state.config, state.flow)
    for site in found:
        layer = layers.get(site.fqn)
        wanted = policy.resolve(site.op_class, site.fqn, site.m, site.n, site.k, layer, site.aside)
        resolution = wanted.apart(site.masked)
        obstacle = _obstacle(site) or _ungenerated(state, site, resolution)
        if strict and (refused := obstacle or _refused(site, wanted, resolution)) and wanted.quantizes:
            raise UnsupportedMatmul(
                f"strict=True, and {site.fqn or 'a matmul'} (node {site.forward.node.name}, "
                f"m={site.m} n={site.n} k={site.k}, {site.dtype}) cannot be quantised: {refused}")
        if obstacle is not None and resolution.quantizes:
            trial.advance(Decided(**vars(site), resolution=resolution, reasons=dict.fromkeys(ROLES, obstacle)))
        else:
            trial.advance(_decided(state, site, resolution, layer))
    group(trial)
    return trial


def _decided(state: State, site: Found, resolution: Resolution, layer: Layer | None) -> Decided:
    choices = {role: resolution.choice(role) for role in ROLES}
    decided = Decided(**vars(site), resolution=resolution,
                      reasons={role: choice.reason for role, choice in choices.items() if choice.gemm is None},
                      remarks={role: choice.reason for role, choice in choices.items() if _altered(choice, role)})
    by_default = choices["wgrad"].gemm is not None and choices["wgrad"].rule is None
    if by_default and (why := quantised_all_the_same(site, state.config)):
        decided = decided.remark("wgrad", why)
    if not resolution.quantizes:
        return decided
    recipe = resolution.effective
    decisions = {role: decide(state.config, site, role, recipe) for role in ROLES}
    planned = Planned(**vars(decided), recipe=recipe, decisions=decisions, x_group=site.index)
    if planned.recipe.keep and layer is None:
        return planned.note(f"which layer this is does not show in its name, so the {planned.recipe.keep[0]} are not "
                            "left alone")
    return planned


def _refuse_what_has_no_site(state: State) -> None:
    """Raise for a product that the policy quantises and that the passes before have left alone."""
    for record in state.alone:
        if record.lowered:
            continue
        choice = state.config.resolve(record.op_class, record.fqn, record.m, record.n, record.k).choice(record.role)
        by_default = not state.config.where_it_pays and not record.reason.startswith(OF_CODES)
        if choice.gemm is not None and (choice.rule is not None or by_default):
            raise UnsupportedMatmul(
                f"strict=True, and {record.fqn or 'a product'} ({record.op_class}, {record.role}, m={record.m} "
                f"n={record.n} k={record.k}, {record.dtype}) cannot be quantised: {record.reason}")


def _altered(choice: Choice, role: str) -> bool:
    """Whether the policy had to change the recipe's GEMM, such as a saved operand that does not exist."""
    return choice.gemm is not None and choice.recipe is not None and choice.gemm != getattr(choice.recipe, role)


def _refused(site: Found, wanted: Resolution, resolution: Resolution) -> str | None:
    """Which products of a site the policy quantises and a mask keeps it from, and why."""
    return "; ".join(f"{role} {after.reason}" for role in site.products if wanted.choice(role).gemm is not None
                     and (after := resolution.choice(role)).gemm is None) or None


def _obstacle(site: Found) -> str | None:
    dtypes = {val(site.x[0]).dtype, val(site.w[0]).dtype}
    if not dtypes <= set(DTYPES):
        names = ", ".join(sorted(dtype_name(d) for d in dtypes))
        return f"operands are {names}; quantisers take float32, bfloat16 or float16: cast the module or use autocast"
    if any(isinstance(size, int) and size == 0 for size in (site.m, site.n, site.k)):
        return f"a size is zero (m={site.m}, n={site.n}, k={site.k})"
    return None


def _ungenerated(state: State, site: Found, resolution: Resolution) -> str | None:
    """Why a product that the policy quantises has no kernel on the site's device, and no code that Inductor makes."""
    target = state.config.target_of(val(site.x[0]).device)
    for role in site.products:
        gemm = resolution.choice(role).gemm
        if gemm is None or gemm.specs is None:
            continue
        reason = registry.not_generated(target, *gemm.specs)
        if reason is not None and decide(state.config, site, role, resolution.effective, ()).kernel is None:
            return reason
    return None
