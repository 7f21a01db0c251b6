"""What the passes know of a matmul: its operands, its backward products, its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.grouped import SCALED_GROUPED_MM
from quartet.lowering.recipe.resolution import Resolution
from quartet.lowering.recipe.types import Gemm, Recipe
from quartet.runtime.compat import OpOverload

SITE_KEY = "quartet_site"  # node.meta key of a lowered GEMM: (site index, role)
OP_CLASS_KEY = "quartet_op_class"  # of a forward product that a pass has written: its op class
RECOMPUTED_KEY = "quartet_recomputed"  # of an X that a pass has tagged to be made again in backward
MADE_KEY = "quartet_made"  # of what a pass has made of an operand before it is quantised: how, in a word
NOTES_KEY = "quartet_notes"  # of the same: remarks for its record


@dataclass
class Product:
    """One of the three GEMMs of a site, as ``A · Bᵀ``.

    ``node`` is the matmul that autograd wrote: the product in normal orientation, or its transpose when
    ``flipped``. After rotation ``a`` and ``b`` are its 2-D operands with the contraction axis last, ``mm``
    their product in the model's dtype, and ``source`` the operand of fprop that ``b`` was made from, by ``reader``.
    ``gradient`` and ``dtype``: an E and a dtype of its own, where a program takes others than the site's.
    """

    node: Node
    flipped: bool = False
    a: Node | None = None
    b: Node | None = None
    mm: Node | None = None
    source: Node | None = None
    reader: Node | None = None
    gradient: tuple[Node, bool] | None = None
    dtype: torch.dtype | None = None


@dataclass
class Quantized:
    """Results of a quantise node: codes, scales and the packed clip mask (None when the spec has none), and the amax
    that it was given (None when the spec takes none)."""

    codes: Node
    scales: Node
    mask: Node | None
    spec: QuantSpec
    amax: Node | None = None


@dataclass
class Groups:
    """How the tokens of a grouped product are divided among ``count`` matrices W ``[E, out, in]``.

    Attributes:
        offs: where each group ends; ends: where it ends in the padded layout; place: each token's row there.
        x, e: X and E in the padded layout.
    """

    offs: Node
    count: Any
    ends: Node | None = None
    place: Node | None = None
    x: Node | None = None
    e: Node | None = None


@dataclass
class MatmulSite:
    """A forward matmul, and its dgrad and wgrad where they exist. W is a weight, or another activation.

    Attributes:
        index: number of the site in the graph; names its random bits.
        x: node of X and whether it is stored transposed; ``[tokens, in]`` in normal orientation.
        w: node of W likewise; ``[out, in]`` in normal orientation.
        m, n, k: tokens, out, in; ints or SymInts.
        batch: how many matrices X, W and E are stacked of along a leading axis; None of a matrix each.
        gradient: node of E and whether it is stored transposed; ``[tokens, out]`` in normal orientation.
        resolution: what the policy decided; recipe: the effective recipe, None when left alone.
        aside: role → why it is left alone unless a rule of the policy names the op class or the module.
        reasons: role → why it is left alone.
        remarks: role → how its GEMM differs from the recipe's; notes: what a reader should know of all three.
        groups: of a product of tokens in groups, each with a W of its own.
        masked: which of ``"x"``, ``"w"`` and ``"y"`` a mask has thinned out (``quartet.passes.classify.masks``).
        x_group: first site that quantises the same X; the group shares the bits of wgrad's operand b.
    """

    index: int
    fqn: str
    op_class: str
    x: tuple[Node, bool]
    w: tuple[Node, bool]
    m: Any
    n: Any
    k: Any
    dtype: torch.dtype
    products: dict[str, Product] = field(default_factory=dict)
    gradient: tuple[Node, bool] | None = None
    aside: Mapping[str, str] = field(default_factory=dict)
    resolution: Resolution | None = None
    recipe: Recipe | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    x_group: int = -1
    quantized: dict[str, Quantized] = field(default_factory=dict)
    saved_bytes: int | None = None
    batch: Any = None
    groups: Groups | None = None
    masked: frozenset[str] = frozenset()

    @property
    def scaled(self) -> OpOverload:
        """The op of the IR that a quantised product becomes."""
        return SCALED_GROUPED_MM if self.groups is not None else ir.SCALED_MM if self.batch is None else ir.SCALED_BMM

    def dtype_of(self, role: str) -> torch.dtype:
        """What the product of a role results in."""
        return self.products[role].dtype or self.dtype

    def gradient_of(self, role: str) -> tuple[Node, bool]:
        """E of dgrad or wgrad."""
        operand = self.products[role].gradient or self.gradient
        assert operand is not None
        return operand

    def remark(self, role: str, text: str) -> None:
        """Add a remark on the GEMM of a role."""
        self.remarks[role] = "; ".join(filter(None, (self.remarks.get(role), text)))

    def dims(self, role: str) -> tuple[Any, Any, Any]:
        """(M, N, K) of a role's GEMM; K is what it contracts."""
        return {"fprop": (self.m, self.n, self.k), "dgrad": (self.m, self.k, self.n),
                "wgrad": (self.n, self.k, self.m)}[role]

    @property
    def recomputes_x(self) -> bool:
        """Whether X is made again in backward rather than kept."""
        return self.x[0].meta.get(RECOMPUTED_KEY, False)

    def active(self, role: str) -> Gemm | None:
        """The GEMM to quantise in this role, where both the graph and the recipe have one."""
        return getattr(self.recipe, role) if self.recipe is not None and role in self.products else None
