"""The types of a recipe: what happens to each operand of the three GEMMs of a linear layer.

    fprop   Y  = X · Wᵀ      a = X,  b = W    contracts `in`
    dgrad   gX = E · W       a = E,  b = W    contracts `out`
    wgrad   gW = Eᵀ · X      a = E,  b = X    contracts `tokens`

with X [tokens, in], W [out, in], E = ∂L/∂Y [tokens, out]. A recipe is plain data: the passes read it,
nothing in the spine knows a recipe by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from quartet.kernels.reference.estimator import ESTIMATORS
from quartet.kernels.reference.formats.saved import ROW, SAVED_ELEMENTS
from quartet.kernels.reference.hadamard import SIZES
from quartet.kernels.reference.products.outliers import tail_parts
from quartet.kernels.reference.products.smooth import FORMS
from quartet.kernels.spec import QuantSpec, SpecError
from quartet.lowering.recipe.depth import normalise_depth

ROLES = ("fprop", "dgrad", "wgrad")
OP_CLASSES = ("linear", "lm_head", "router", "embedding", "attention_qk", "attention_pv", "bmm", "grouped", "conv",
              "saved")
WEIGHED = ("grouped",)  # a default that quantises only what pays covers these, though its recipe skips them


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
        if isinstance(self.spec, str):
            object.__setattr__(self, "spec", QuantSpec.parse(self.spec))
        elif self.spec is not None and not isinstance(self.spec, QuantSpec):
            raise SpecError(f"an operand has a QuantSpec, its text or None, not {type(self.spec).__name__} "
                            f"{self.spec!r}")
        if self.source not in ("original", "saved"):
            raise SpecError(f"operand source {self.source!r} does not exist; possible: 'original', 'saved'")


@dataclass(frozen=True)
class Gemm:
    """One matrix product.

    Args:
        a: its first operand, None as its quantiser for a product in the model's dtype.
        b: its second. Saved and without a quantiser, it is the dequantised one of fprop: the straight-through gradient
            of what fprop quantised.
        rotation: block Hadamard transform of both along the axis that they contract, which cancels in the product.
        outer: block Hadamard transform of operand a along its rows, undone on the product (HALO, arXiv 2501.02625).
    """

    a: Operand
    b: Operand
    rotation: Rotation | None = None
    outer: Rotation | None = None

    @property
    def specs(self) -> tuple[QuantSpec, QuantSpec] | None:
        """The quantisers of both operands; None of a product in the model's dtype."""
        return None if self.a.spec is None or self.b.spec is None else (self.a.spec, self.b.spec)

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            if not isinstance(getattr(self, name), Operand):
                object.__setattr__(self, name, Operand(getattr(self, name)))
        if (self.a.spec is None) != (self.b.spec is None):
            raise SpecError("either both operands of a GEMM are quantised or neither: "
                            f"a={self.a.spec}, b={self.b.spec}")
        if self.outer is not None and self.outer.signs != "none":
            raise SpecError(f"an outer rotation is a plain Hadamard transform; signs={self.outer.signs!r} is not "
                            "possible there, use signs='none'")


@dataclass(frozen=True)
class Delayed:
    """What the rule ``delayed`` scales by: the largest of the magnitudes that an operand had in earlier steps.

    Args:
        length: how many steps the history keeps, 1 to 65536.
        algorithm: ``"max"`` of the history, or the ``"most_recent"`` entry.
        margin: the scale leaves room for 2^margin times that magnitude.
    """

    length: int = 1024
    algorithm: str = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or not 1 <= self.length <= 65536:
            raise SpecError(f"an amax history of length {self.length!r} is not possible; use 1 to 65536 steps")
        if self.algorithm not in ("max", "most_recent"):
            raise SpecError(f"amax algorithm {self.algorithm!r} does not exist; possible: 'max', 'most_recent'")
        if not isinstance(self.margin, int) or not -16 <= self.margin <= 16:
            raise SpecError(f"an amax margin of {self.margin!r} is not possible; use an integer from -16 to 16")

    @property
    def entries(self) -> int:
        """How many entries of the history decide."""
        return self.length if self.algorithm == "max" else 1

    def __str__(self) -> str:
        return f"{self.algorithm} of {self.length}, margin {self.margin}"

    @classmethod
    def parse(cls, text: str) -> Delayed:
        """The inverse of ``str``. Raises SpecError."""
        found = re.fullmatch(r"(\w+) of (\d+)(?:, margin (-?\d+))?", text)
        if found is None:
            raise SpecError(f"cannot read amax history {text!r}; expected 'max of 1024, margin 0'")
        return cls(int(found[2]), found[1], int(found[3] or 0))


@dataclass(frozen=True)
class Saved:
    """What autograd keeps for other purposes than products, in eight bits an element or fewer.

    Args:
        element: ``"e4m3"`` (symmetric, one bfloat16 scale a group) or ``"uint8"``, ``"uint6"`` or ``"uint4"``
            (asymmetric, fp32 scale and minimum).
        group: elements along the last axis that share a scale, a multiple of 16 up to 256; of E4M3 also ``ROW``, 0,
            all of it.
        rounding: ``"nearest"``; integers also ``"stochastic"``.
        attention: also q, k, v and the output that a fused attention keeps; its statistics stay exact.
    """

    element: str
    group: int
    rounding: str = "nearest"
    attention: bool = False

    def __post_init__(self) -> None:
        if self.element not in SAVED_ELEMENTS:
            raise SpecError(f"saved activations have no element {self.element!r}; possible: "
                            f"{', '.join(SAVED_ELEMENTS)}")
        rows = self.element == "e4m3" and self.group == ROW
        if not rows and (not isinstance(self.group, int) or self.group % 16 or not 16 <= self.group <= 256):
            raise SpecError(f"a group of {self.group!r} saved elements is not possible; use a multiple of 16 from 16 "
                            "to 256")
        legal = ("nearest",) if self.element == "e4m3" else ("nearest", "stochastic")
        if self.rounding not in legal:
            raise SpecError(f"saved {self.element} is not rounded {self.rounding!r}; possible: {', '.join(legal)}")
        if not isinstance(self.attention, bool):
            raise SpecError(f"attention of saved activations is True or False, not {self.attention!r}")

    def __str__(self) -> str:
        return f"{self.element}/{self.group or 'row'} {self.rounding}{' attention' if self.attention else ''}"

    @classmethod
    def parse(cls, text: str) -> Saved:
        """The inverse of ``str``. Raises SpecError."""
        found = re.fullmatch(r"(\w+)/(\d+|row)(?: (nearest|stochastic))?( attention)?", text)
        if found is None:
            raise SpecError(f"cannot read {text!r}; expected saved activations like 'e4m3/16 nearest' or "
                            "'uint8/64 stochastic attention'")
        return cls(found[1], ROW if found[2] == "row" else int(found[2]), found[3] or "nearest", found[4] is not None)


@dataclass(frozen=True)
class Recipe:
    """The three GEMMs of a linear layer, or fewer: a GEMM that is None stays in the model's dtype.

    Args:
        name: what a policy calls it; summary and paper are for the reader.
        skip: op classes that the recipe leaves alone unless a rule names them.
        keep_weights: True keeps the packed weight for backward, False quantises it again there.
        recompute: ``"gemm"`` runs the fprop GEMM again in backward where its output is needed and the codes of
            both operands are kept anyway; ``"none"`` keeps that output.
        smooth: Smooth-SwiGLU for an X that is a gated activation: ``"none"``, ``"channel"`` (arXiv 2409.12517) or
            ``"token"`` (its released code).
        history: what quantisers with the rule ``delayed`` scale by.
        saved: what is kept between forward and backward for other purposes than products; None leaves it exact.
        keep: layers that the recipe leaves in high precision unless a rule names them, ``("last 15%",)``; see
            ``quartet.lowering.recipe.depth``.
        estimator: gradient of the weights: ``"straight-through"``, or ``"dge"``: times the slope of a softened
            quantiser (arXiv 2501.17116).
        outliers: X of fprop is clipped to the quantiles (1 − q, q) of its elements, and what was cut off is multiplied
            in high precision (arXiv 2501.17116); a quantile q between 0.5 and 1, such as 0.99, in steps of 0.0001.
        average: decay of a moving average of W; W of fprop is rounded to whichever of its two neighbours is nearer to
            that (Q-EMA, arXiv 2502.20853).
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
    smooth: str = "none"
    history: Delayed = Delayed()
    saved: Saved | None = None
    keep: tuple[str, ...] = ()
    estimator: str = ESTIMATORS[0]
    outliers: float | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (*((role, Gemm) for role in ROLES), ("saved", Saved), ("history", Delayed)):
            given = getattr(self, name)
            if not (isinstance(given, kind) or given is None and name != "history"):
                raise SpecError(f"recipe {self.name!r}: {name} is a {kind.__name__}"
                                f"{'' if name == 'history' else ' or None'}, not {type(given).__name__} {given!r}")
        self._check_weight_options()
        if not isinstance(self.keep, tuple):
            raise SpecError(f"recipe {self.name!r}: keep is a tuple such as ('last 15%',), not {self.keep!r}")
        for layers in self.keep:
            normalise_depth(layers)
        if self.smooth not in ("none", *FORMS):
            raise SpecError(f"smooth {self.smooth!r} does not exist; possible: 'none', 'channel', 'token'")
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

    def _check_weight_options(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise SpecError(f"gradient estimator {self.estimator!r} does not exist; possible: {', '.join(ESTIMATORS)}")
        if self.outliers is not None and not (isinstance(self.outliers, float) and 0.5 < self.outliers < 1
                                              and tail_parts(self.outliers) > 0):
            raise SpecError(f"outliers beyond the quantile {self.outliers!r} are not possible; use a float above 0.5, "
                            "up to 0.9999, such as 0.99")
        if self.average is not None and not (isinstance(self.average, float) and 0 <= self.average < 1):
            raise SpecError(f"a moving average that decays by {self.average!r} is not possible; use a float from 0 to "
                            "less than 1, such as 0.998")
        if self.fprop is None or self.fprop.b.spec is None:
            return
        spec = self.fprop.b.spec
        for field, wanted, fits, remedy in (
            ("estimator", self.estimator == "dge", spec.scale != "e4m3", "E8M0 or fp32 scales"),
            ("average", self.average is not None, spec.rule in ("floor", "ceil"), "E8M0 scales by 'floor' or 'ceil'"),
        ):
            if wanted and not (spec.element == "e2m1" and not spec.stochastic and fits):
                raise SpecError(f"recipe {self.name!r}: {field}={getattr(self, field)!r} needs W of fprop in e2m1, to "
                                f"nearest, with {remedy}; it is '{spec}'")
            if wanted and field == "average" and self.smooth != "none":
                raise SpecError(f"recipe {self.name!r}: average is of the weight itself, and smooth={self.smooth!r} "
                                "quantises another one every step; use one of the two")
            if wanted and self.fprop.rotation is not None:
                raise SpecError(f"recipe {self.name!r}: {field}={getattr(self, field)!r} is about the weight itself, "
                                "but fprop quantises a rotation of it; leave out the rotation of fprop")

    def only(self, roles: frozenset[str] | set[str]) -> Recipe:
        """The same recipe with the other roles left in the model's dtype."""
        left_alone: dict[str, Any] = {role: None for role in ROLES if role not in roles}
        return replace(self, **left_alone)

    @property
    def remembers(self) -> bool:
        """Whether any operand is scaled, or rounded, by what it was in earlier steps."""
        if self.average is not None and self.fprop is not None:
            return True
        gemms = [gemm for role in ROLES if (gemm := getattr(self, role)) is not None]
        return any(operand.spec is not None and operand.spec.rule == "delayed"
                   for gemm in gemms for operand in (gemm.a, gemm.b))

    @property
    def bits(self) -> int:
        """The fewest bits that an element of any operand has; 0 where none is quantised."""
        specs = [spec for role in self.roles for spec in getattr(self, role).specs or ()]
        return min((spec.bits for spec in specs), default=0)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the GEMMs that it has."""
        return tuple(role for role in ROLES if getattr(self, role) is not None)

    @property
    def quantizes(self) -> bool:
        return bool(self.roles)
