"""Which kernel computes each GEMM of a site. It is asked here, once; what comes after reads the answer.

A kernel is asked about what will stand in the graph: the dtype of the product, and each operand's quantiser with the
Hadamard transform that it follows at once.
"""

from __future__ import annotations

from quartet.lowering import registry
from quartet.lowering.ir.graph import val
from quartet.lowering.recipe.types import Gemm, Recipe
from quartet.passes.compilation import Compilation
from quartet.passes.sites import Decision, Found


def decide(config: Compilation, site: Found, role: str, recipe: Recipe,
           disabled: tuple[str, ...] | None = None) -> Decision:
    """The kernel for a role of a site under a recipe.

    ``disabled``: kernels that do not count, those of the compilation unless given.
    """
    gemm: Gemm | None = getattr(recipe, role)
    if gemm is None or gemm.specs is None:
        return Decision()
    (a, b), (before_a, before_b) = gemm.specs, _follows(site, role, recipe)
    kernel, reasons = registry.choose(
        config.target_of(val(site.x[0]).device), site.dtype_of(role), ((a, before_a), (b, before_b)),
        config.disable_kernels if disabled is None else disabled, site.kind.op)
    return Decision(kernel, "" if kernel else "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _follows(site: Found, role: str, recipe: Recipe) -> tuple[int, int]:
    """Sizes of the Hadamard transforms that the quantisers of A and B follow at once, 0 for none."""
    gemm: Gemm = getattr(recipe, role)
    assert gemm.a.spec is not None and gemm.b.spec is not None
    if gemm.rotation is not None:
        return gemm.rotation.n, gemm.rotation.n
    turned = gemm.a.spec.commutes_with_transpose and site.batch is None  # then A is quantised along its rows
    a = gemm.outer.n if gemm.outer is not None and turned else 0
    if gemm.b.source == "original" or recipe.fprop is None:
        return a, 0
    kept = recipe.fprop.b if role == "dgrad" else recipe.fprop.a
    as_it_is = (kept.spec == gemm.b.spec and gemm.b.spec.commutes_with_transpose
                and gemm.a.spec.multiple <= gemm.b.spec.multiple)
    return a, _follows(site, "fprop", recipe)[role == "dgrad"] if as_it_is else 0
