"""Decide what fprop leaves behind for backward.

Packed codes, scales and masks are results of opaque ops, which the partitioner never recomputes, and no
backward node reads the original X: so they are what is kept. With ``recompute="gemm"`` the output of a
GEMM is not kept either where backward has the codes of both operands anyway: it runs the product again.
"""

from __future__ import annotations

from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering import ir
from quartet.lowering.graph import is_backward
from quartet.passes.sites import SITE_KEY, MatmulSite
from quartet.passes.state import State, recipe_of


def save(state: State) -> None:
    """Tag the fprop GEMMs whose output backward should compute again."""
    if not any(is_backward(node) for node in state.gm.graph.nodes):
        return
    sites = {site.index: site for site in state.planned()}
    for node in state.gm.graph.find_nodes(op="call_function", target=ir.SCALED_MM):
        index, role = node.meta[SITE_KEY]
        site = sites[index]
        choice = state.config.recompute or recipe_of(site).recompute
        if role == "fprop" and choice == "gemm" and keeps_codes(site) and node.meta.get("recompute") is None:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def keeps_codes(site: MatmulSite) -> bool:
    """Whether backward reads the saved codes of both operands of fprop."""
    dgrad, wgrad = site.active("dgrad"), site.active("wgrad")
    return (dgrad is not None and wgrad is not None and dgrad.b.source == wgrad.b.source == "saved"
            and recipe_of(site).keep_weights)
