"""What the passes know of a matmul, phase by phase: found, decided, planned, rotated, quantised.

Each phase is a frozen record that has what the one before it has and more. A pass takes sites of one phase and leaves
new ones; ``quartet.passes.state.State`` keeps the latest of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering.cost import Cost
from quartet.lowering.ir.operands import Kind
from quartet.lowering.ir.ops.grouped import TOKENS
from quartet.lowering.recipe.resolution import Resolution
from quartet.lowering.recipe.types import ROLES, Gemm, Recipe
from quartet.lowering.registry import Kernel
from quartet.passes.matrices import Operand

SITE_KEY = "quartet_site"  # node.meta key of a lowered GEMM: (site index, role)
OP_CLASS_KEY = "quartet_op_class"  # of a forward product that a pass has written: its op class
RECOMPUTED_KEY = "quartet_recomputed"  # of an X that a pass has tagged to be made again in backward
MADE_KEY = "quartet_made"  # of what a pass has made of an operand before it is quantised: how, in a word
NOTES_KEY = "quartet_notes"  # of the same: remarks for its record


@dataclass(frozen=True)
class Product:
    """A product of the graph: in normal orientation, or its transpose when ``flipped``."""

    node: Node
    flipped: bool


@dataclass(frozen=True)
class Gradient(Product):
    """dgrad or wgrad of a site.

    Attributes:
        e: node of E and whether it is stored transposed; ``[tokens, out]`` in normal orientation.
        dtype: what the product results in.
    """

    e: Operand
    dtype: torch.dtype


@dataclass(frozen=True)
class Groups:
    """How the tokens of a grouped product are divided among ``count`` matrices W ``[E, out, in]``; ``offs``: where each
    group ends."""

    offs: Node
    count: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """A forward matmul, and its dgrad and wgrad where they exist. W is a weight, or another activation.

    Attributes:
        index: number of the site in the graph; names its random bits.
        x: node of X and whether it is stored transposed; ``[tokens, in]`` in normal orientation.
        w: node of W likewise; ``[out, in]`` in normal orientation.
        m, n, k: tokens, out, in; ints or SymInts.
        dtype: what the forward product results in.
        forward: that product. gradients: role → the backward products that there are.
        batch: how many matrices X, W and E are stacked of along a leading axis; None of a matrix each.
        groups: of a product of tokens in groups, each with a W of its own.
        masked: which of ``"x"``, ``"w"`` and ``"y"`` a mask has thinned out (``quartet.passes.classify.masks``).
        aside: role → why it is left alone unless a rule of the policy names the op class or the module.
        notes: what a reader should know of all three products.
    """

    index: int
    fqn: str
    op_class: str
    x: Operand
    w: Operand
    m: Any
    n: Any
    k: Any
    dtype: torch.dtype
    forward: Product
    gradients: Mapping[str, Gradient] = field(default_factory=dict)
    batch: Any = None
    groups: Groups | None = None
    masked: frozenset[str] = frozenset()
    aside: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def products(self) -> Mapping[str, Product]:
        """Role → product."""
        return {"fprop": self.forward, **self.gradients}

    @property
    def kind(self) -> Kind:
        """What the forward product is."""
        return Kind(self.batch, None if self.groups is None else self.groups.offs)

    @property
    def recomputes_x(self) -> bool:
        """Whether X is made again in backward rather than kept."""
        return self.x[0].meta.get(RECOMPUTED_KEY, False)

    def dtype_of(self, role: str) -> torch.dtype:
        """What the product of a role results in."""
        return self.gradients[role].dtype if role in self.gradients else self.dtype

    def dims(self, role: str) -> tuple[Any, Any, Any]:
        """(M, N, K) of a role's GEMM; K is what it contracts."""
        return {"fprop": (self.m, self.n, self.k), "dgrad": (self.m, self.k, self.n),
                "wgrad": (self.n, self.k, self.m)}[role]

    def note(self, text: str) -> Self:
        """The site with a note more."""
        return replace(self, notes=(*self.notes, text))

    def with_gradient(self, role: str, gradient: Gradient) -> Self:
        """The site with another backward product."""
        return replace(self, gradients={**self.gradients, role: gradient})

    def with_product(self, role: str, node: Node, flipped: bool = False) -> Self:
        """The site whose product of a role is ``node``."""
        if role == "fprop":
            return replace(self, forward=Product(node, flipped))
        return self.with_gradient(role, replace(self.gradients[role], node=node, flipped=flipped))


@dataclass(frozen=True, kw_only=True, eq=False)
class Decided(Found):
    """A site that the policy was asked about; one that is in no later phase is left alone.

    Attributes:
        resolution: what the policy decided.
        reasons: role → why it is left alone.
        remarks: role → how its GEMM differs from the recipe's.
    """

    resolution: Resolution
    reasons: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

    def remark(self, role: str, text: str) -> Self:
        """The site with a remark more on the GEMM of a role."""
        told = "; ".join(filter(None, (self.remarks.get(role), text)))
        return replace(self, remarks={**self.remarks, role: told})


@dataclass(frozen=True)
class Decision:
    """What computes one GEMM.

    Attributes:
        kernel: the family that does; None where none takes it, or it stays in the model's dtype.
        reason: why no kernel takes it, one after the other; else empty.
        price: what the whole layer was predicted to cost as it is planned; None where that did not decide.
    """

    kernel: Kernel | None = None
    reason: str = ""
    price: Cost | None = None

    @property
    def group_align(self) -> int:
        """What the tokens of a group have to be a multiple of where they are contracted."""
        return TOKENS if self.kernel is None else self.kernel.group_align


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned(Decided):
    """A site with at least one GEMM to quantise.

    Attributes:
        recipe: the three decisions in one.
        decisions: role → the kernel of its GEMM, also where the graph has none of that role.
        x_group: first site that quantises the same X; the group shares the bits of wgrad's operand b.
    """

    recipe: Recipe
    decisions: Mapping[str, Decision]
    x_group: int

    def active(self, role: str) -> Gemm | None:
        """The GEMM to quantise in this role, where both the graph and the plan have one."""
        return getattr(self.recipe, role) if role in self.products else None

    def without(self, reasons: Mapping[str, str]) -> Decided:
        """The site with some roles left alone after all, for these reasons."""
        recipe = self.recipe.only({role for role in ROLES if role not in reasons})
        known = {**{f.name: getattr(self, f.name) for f in fields(Decided)}, "reasons": {**self.reasons, **reasons},
                 "remarks": {role: text for role, text in self.remarks.items() if role not in reasons}}
        if not recipe.quantizes:
            return Decided(**known)
        return Planned(**known, recipe=recipe, decisions=self.decisions, x_group=self.x_group)

    def at_price(self, cost: Cost) -> Self:
        """The site with what it is predicted to cost."""
        decisions = {role: replace(decision, price=cost) for role, decision in self.decisions.items()}
        return replace(self, decisions=decisions)


@dataclass(frozen=True)
class Start:
    """What fprop quantises and operand b of a gradient is made from, and the node that reads it for that."""

    source: Node
    reader: Node


@dataclass(frozen=True)
class RotatedGemm:
    """A GEMM as ``A · Bᵀ`` in the rotated basis.

    Attributes:
        gemm: how it is to be quantised.
        a, b: 2-D operands with the contraction axis last. mm: their product in the model's dtype. kind: what it is.
        start: where b starts from what fprop quantises.
    """

    gemm: Gemm
    a: Node
    b: Node
    mm: Node
    kind: Kind
    start: Start | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotated(Planned):
    """A site whose planned GEMMs are written as ``A · Bᵀ``.

    Attributes:
        gemms: role → GEMM.
    """

    gemms: Mapping[str, RotatedGemm]


@dataclass(frozen=True)
class QuantizedOperand:
    """Results of a quantise node: codes, scales and the packed clip mask (None when the spec has none), and the amax
    that it was given (None when the spec takes none)."""

    codes: Node
    scales: Node
    mask: Node | None
    spec: QuantSpec
    amax: Node | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized(Rotated):
    """A site whose GEMMs multiply codes.

    Attributes:
        operands: ``"x"`` and ``"w"`` as fprop quantised them; empty where it did not.
        saved_bytes: of them, what backward reads; None when that is not known.
        kernels: role → what computes its product: ``"reference"`` until a family of kernels has taken it.
    """

    operands: Mapping[str, QuantizedOperand] = field(default_factory=dict)
    saved_bytes: int | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)

    def computed(self, role: str, kernel: str) -> Self:
        """The site with what computes the product of a role."""
        return replace(self, kernels={**self.kernels, role: kernel})
