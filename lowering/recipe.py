"""The types of a recipe: what happens to each operand of the three GEMMs of a linear layer.

    fprop   Y  = X · Wᵀ      a = X,  b = W    contracts `in`
    dgrad   gX = E · W       a = E,  b = W    contracts `out`
    wgrad   gW = Eᵀ · X      a = E,  b = X    contracts `tokens`

with X [tokens, in], W [out, in], E = ∂L/∂Y [tokens, out]. A recipe is plain data: the passes read it,
nothing in the spine knows a recipe by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quartet.kernels.reference.hadamard import SIZES
from quartet.kernels.spec import QuantSpec, SpecError

ROLES = ("fprop", "dgrad", "wgrad")
OP_CLASSES = ("linear", "lm_head", "router", "embedding", "attention_qk", "attention_pv", "bmm", "grouped", "conv")


@dataclass(frozen=True)
class Rotation:
    """Block Hadamard transform of both operands of a GEMM along its contraction axis.

    Args:
        n: block size, 16, 32, 64 or 128.
        signs: ``"none"``; ``"random"`` (a fresh sign vector every step); or a fixed tuple of n ±1.
    """

    n: int = 32
    signs: str | tuple[int, ...] = "none"

    def __post_init__(self) -> None:
        if self.n not in SIZES:
            raise SpecError(f"Hadamard size {self.n} is not possible; use one of {SIZES}")
        if isinstance(self.signs, str):
            if self.signs not in ("none", "random"):
                raise SpecError(f"rotation signs {self.signs!r} do not exist; "
                                "possible: 'none', 'random' or a tuple of ±1")
        elif len(self.signs) != self.n or any(s not in (1, -1) for s in self.signs):
            raise SpecError(f"fixed rotation signs must be {self.n} values of ±1, got {len(self.signs)}")


@dataclass(frozen=True)
class Operand:
    """One operand of a GEMM.

    Args:
        spec: its quantiser, or None to leave it in the model's dtype.
        source: for W in dgrad and X in wgrad: ``"saved"`` starts from what fprop quantised (the codes
            are what is kept for backward), ``"original"`` from the tensor itself.
    """

    spec: QuantSpec | None
    source: str = "original"

    def __post_init__(self) -> None:
        if self.source not in ("original", "saved"):
            raise SpecError(f"operand source {self.source!r} does not exist; possible: 'original', 'saved'")


@dataclass(frozen=True)
class Gemm:
    """One matrix product: two operands and the rotation they share."""

    a: Operand
    b: Operand
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if (self.a.spec is None) != (self.b.spec is None):
            raise SpecError("either both operands of a GEMM are quantised or neither: "
                            f"a={self.a.spec}, b={self.b.spec}")


@dataclass(frozen=True)
class Recipe:
    """The three GEMMs of a linear layer, or fewer: a GEMM that is None stays in the model's dtype.

    Args:
        name: what a policy calls it; summary and paper are for the reader.
        skip: op classes that the recipe leaves alone unless a rule names them.
        keep_weights: True keeps the packed weight for backward, False quantises it again there.
        recompute: ``"gemm"`` runs the fprop GEMM again in backward where its output is needed and the codes of
            both operands are kept anyway; ``"none"`` keeps that output.
    """

    name: str
    summary: str = ""
    paper: str = ""
    fprop: Gemm | None = None
    dgrad: Gemm | None = None
    wgrad: Gemm | None = None
    skip: tuple[str, ...] = tuple(c for c in OP_CLASSES if c != "linear")
    keep_weights: bool = True
    recompute: str = "none"

    def __post_init__(self) -> None:
        if self.recompute not in ("none", "gemm"):
            raise SpecError(f"recompute {self.recompute!r} does not exist; possible: 'none', 'gemm'")
        for role in ("dgrad", "wgrad"):
            gemm: Gemm | None = getattr(self, role)
            if gemm is not None and gemm.b.source == "saved" and self.fprop is None:
                raise SpecError(f"recipe {self.name!r}: {role} reads the saved codes of fprop, but fprop is not "
                                "quantised; quantise fprop too or set source='original'")
        for role in ROLES:
            gemm = getattr(self, role)
            if gemm is not None and gemm.a.source == "saved":
                raise SpecError(f"recipe {self.name!r}: operand a of {role} is a live tensor; only operand b of dgrad "
                                "and wgrad can be 'saved'")

    def only(self, roles: frozenset[str] | set[str]) -> Recipe:
        """The same recipe with the other roles left in the model's dtype."""
        left_alone: dict[str, Any] = {role: None for role in ROLES if role not in roles}
        return replace(self, **left_alone)

    @property
    def quantizes(self) -> bool:
        return any(getattr(self, role) is not None for role in ROLES)
