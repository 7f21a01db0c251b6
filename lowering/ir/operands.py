"""Products of the quantised IR and their operands as values with names, see :mod:`quartet.lowering.ir.views`.

A product says itself how its operands were rotated and how they lie, in its metadata. So between a quantiser and the
product that reads it anything may stand that keeps rows, where the quantiser's spec is row-local: a collective that
gathers rows, a selection of them. What is :func:`quantizer_of` an operand is found through nodes that are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, arguments, maker, source_of, val
from quartet.lowering.ir.ops.grouped import SCALED_GROUPED_MM
from quartet.lowering.ir.views import Hadamard, Quantize, QuantizeGroups, call
from quartet.runtime.compat import OpOverload
from quartet.runtime.view_ops import COPIES, ORDERS, aten

SCALED = (*ir.PRODUCTS, SCALED_GROUPED_MM)
OPERANDS_KEY = "quartet_operands"  # node.meta key of a product: rotation and layout of each operand
ROWS, TRANSPOSED, TURNED = "rows", "transposed", "turned"
_FLIPS = ORDERS - {aten.transpose.int}
_SHOWS_ROWS = COPIES | _FLIPS | {aten.reshape.default}


@dataclass(frozen=True)
class Kind:
    """Which of the three a product is.

    Args:
        batch: how many matrices lie below each other in A, in B and in the result.
        ends: where each group ends along the tokens. over_tokens: whether tokens are contracted.
    """

    batch: Any = None
    ends: Node | None = None
    over_tokens: bool = False

    @property
    def single(self) -> bool:
        return self.batch is None and self.ends is None

    @property
    def op(self) -> OpOverload:
        """The operator of a product of operands in 4 or 8 bits."""
        return ir.SCALED_MM if self.single else SCALED_GROUPED_MM if self.batch is None else ir.SCALED_BMM


@dataclass(frozen=True)
class Operand:
    """One operand of a product.

    Args:
        codes: ``[rows, K]``, or packed ``[rows, K/2]``.
        scales: in the shapes of :func:`quartet.lowering.ir.scale_layout`.
        spec: what quantised it.
        amax: fp32 ``[1, 1]``, the largest magnitude of the tensor, where the spec is two-level.
        rotation: size of the Hadamard transform before the quantiser, 0 for none.
        layout: ``"rows"``, as the quantiser left it; ``"transposed"``; ``"turned"``: each of the matrices that lie
            below each other is transposed.

    ``rotation`` and ``layout`` are None of a product that does not say them where the graph does not show them.
    """

    codes: Node
    scales: Node
    spec: QuantSpec
    amax: Node | None = None
    rotation: int | None = 0
    layout: str | None = ROWS

    @staticmethod
    def quantized(codes: Node, scales: Node, amax: Node | None = None) -> Operand:
        """What a quantiser has just made.

        Raises:
            ValueError: the codes are not the results of one.
        """
        made = Quantizer.of(codes)
        spec = made.view.spec
        return Operand(codes, scales, spec, amax if spec.two_level else None, made.rotation, made.layout)

    @property
    def stored(self) -> tuple[Node, Node, str]:
        """What every op on packed codes takes first."""
        return self.codes, self.scales, str(self.spec)


@dataclass(frozen=True)
class Product:
    """``A · Bᵀ`` of quantised operands, in ``dtype``."""

    a: Operand
    b: Operand
    dtype: torch.dtype
    kind: Kind = Kind()

    @staticmethod
    def of(node: Node) -> Product:
        """Read a node.

        Raises:
            TypeError: it is no product of quantised operands.
        """
        if node.target not in SCALED:
            raise TypeError(f"{node.format_node()} is no product of quantised operands")
        given = arguments(node)
        said = node.meta.get(OPERANDS_KEY) or [_shown(given[side]) for side in "ab"]
        a, b = (Operand(given[side], given[f"{side}_scales"], QuantSpec.parse(given[f"{side}_spec"]),
                        given[f"{side}_amax"], *facts) for side, facts in zip("ab", said, strict=True))
        batch = given.get("batch")
        batch = val(batch) if isinstance(batch, Node) else batch
        kind = Kind(batch, given.get("ends"), given.get("over_tokens", False))
        return Product(a, b, given["dtype"], kind)

    def emit(self, build: Builder) -> Node:
        """The node, where ``build`` inserts."""
        given = {"a": self.a.codes, "a_scales": self.a.scales, "b": self.b.codes, "b_scales": self.b.scales,
                 "a_spec": self.a.spec, "b_spec": self.b.spec, "dtype": self.dtype, "batch": self.kind.batch,
                 "ends": self.kind.ends, "over_tokens": self.kind.over_tokens, "a_amax": self.a.amax,
                 "b_amax": self.b.amax}
        node = call(build, self.kind.op, given)
        node.meta[OPERANDS_KEY] = tuple((side.rotation, side.layout) for side in self.operands)
        return node

    @property
    def operands(self) -> tuple[Operand, Operand]:
        return self.a, self.b

    @property
    def gain(self) -> float:
        """Factor that the product carries for its operands."""
        return self.a.spec.gain * self.b.spec.gain


@dataclass(frozen=True)
class Quantizer:
    """What made an operand: the node, its view, and how the operand lies to its results."""

    node: Node
    view: Quantize | QuantizeGroups
    layout: str

    @staticmethod
    def of(operand: Node) -> Quantizer:
        """:func:`quantizer_of` what certainly has one.

        Raises:
            ValueError: it has none.
        """
        found = quantizer_of(operand)
        if found is None:
            raise ValueError(f"{operand.format_node()} is not known to come from a quantiser")
        return found

    @property
    def rotation(self) -> int:
        """Size of the Hadamard transform before it, 0 for none."""
        rotation = Hadamard.into(self.view.x)
        return 0 if rotation is None else rotation.n


def quantizer_of(operand: Node) -> Quantizer | None:
    """What made the codes or scales of an operand, through copies and transposes; None behind any other node."""
    flipped = stacked = False
    while operand.target in _SHOWS_ROWS:
        flipped = flipped != (operand.target in _FLIPS)
        stacked = stacked or operand.target is aten.reshape.default
        operand = source_of(operand)
    node = maker(operand)
    if node is None or node.target not in (ir.QUANTIZE, QuantizeGroups.op):
        return None
    view = Quantize.of(node) if node.target is ir.QUANTIZE else QuantizeGroups.of(node)
    return Quantizer(node, view, (TURNED if stacked else TRANSPOSED) if flipped else ROWS)


def given(operand: Node) -> bool:
    """Whether codes or scales are an input of the graph, through copies and transposes: they were quantised before."""
    while operand.target in _SHOWS_ROWS:
        operand = source_of(operand)
    return operand.op == "placeholder"


def readers(quantizer: Node) -> set[Node]:
    """The products that read a quantiser's results, through what :func:`quantizer_of` finds it."""
    waiting, found = list(quantizer.users), set[Node]()
    while waiting:
        for user in waiting.pop().users:
            if user.target in SCALED:
                found.add(user)
            elif user.target in _SHOWS_ROWS:
                waiting.append(user)
    return found


def _shown(codes: Node) -> tuple[int | None, str | None]:
    """Rotation and layout of an operand as the graph shows them."""
    found = quantizer_of(codes)
    return (None, None) if found is None else (found.rotation, found.layout)
