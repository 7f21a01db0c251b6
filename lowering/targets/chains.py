"""The chains of semantic ops that a fused kernel replaces: what leads to a quantise, and what follows a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.lowering.ir import two_level
from quartet.lowering.ir.graph import (
    RECOMPUTED,
    Builder,
    aten,
    is_backward,
    maker,
    pull,
    source,
    val,
)
from quartet.lowering.ir.operands import readers
from quartet.lowering.ir.ops import fused as cuda_ops
from quartet.lowering.ir.products import unturned
from quartet.lowering.ir.views import Dequantize, FixedSigns, Hadamard, Quantize
from quartet.runtime.compat import OpOverload

REUSABLE = "quartet_parameter"  # node.meta key of a quantise: see Source.parameter
Accepts = Callable[[QuantSpec, int, torch.dtype], bool]


@dataclass(frozen=True)
class Source:
    """hadamard → quantize, or quantize alone.

    Args:
        x: what is rotated and quantised. rotation: Hadamard size, 0 for none. signs: its signs' node, or None.
        spec, seed, site: the quantiser's own arguments.
        amax: the tensor's largest magnitude, for two-level scales. encode: the multiplier that follows from it, from
            :func:`ready` on.
        parameter: the weight that x is a view or a cast of, if the result may serve several forwards, else None.
    """

    x: Node
    rotation: int
    signs: Node | None
    spec: QuantSpec
    seed: Node | None
    site: int
    amax: Node | None = None
    encode: Node | None = None
    parameter: Node | None = None

    @staticmethod
    def of(quantizer: Node) -> Source:
        made = Quantize.of(quantizer)
        x, rotation, signs = made.x, 0, None
        # the rule eden sums over groups that several threads have: a Hadamard before it is a kernel of its own
        if (rotated := Hadamard.into(x)) is not None and made.spec.rule != "eden":
            x, rotation, signs = rotated.x, rotated.n, rotated.signs
        return Source(x, rotation, signs, made.spec, made.seed, made.site, made.amax if made.spec.two_level else None,
                      parameter=quantizer.meta.get(REUSABLE))

    @property
    def tail(self) -> tuple[Any, ...]:
        """The arguments that every fused quantiser takes after its input."""
        return self.rotation, self.signs, str(self.spec), self.seed, self.site

    @property
    def chain(self) -> tuple[Any, ...]:
        """:attr:`tail`, and what those on a GPU take besides."""
        return *self.tail, self.encode

    @property
    def fixed_basis(self) -> bool:
        """Whether the rotation is the same in every step."""
        return self.signs is None or self.signs.target is ir.FIXED_SIGNS

    @property
    def reuse(self) -> tuple[Node | None, Any]:
        """What a quantiser may serve its results again by: the parameter, and what the signs hold."""
        if self.parameter is None:
            return None, None
        return self.parameter, None if self.signs is None else FixedSigns.of(self.signs).signs

    @property
    def stored(self) -> Dequantize | None:
        """The dequantize behind a transpose: its packed codes can be read directly."""
        return None if self.transposed is None else _readable(self.transposed)

    @property
    def stack(self) -> tuple[Dequantize, Any] | None:
        """The same of matrices below each other, each of them transposed, and how many."""
        found = unturned(self.x)
        stored = None if found is None else _readable(found[0])
        return None if found is None or stored is None else (stored, found[1])

    @property
    def transposed(self) -> Node | None:
        """What ``x`` is the transpose of, if it is one."""
        return source(self.x) if self.x.target is aten.permute.default else None


def _readable(node: Node) -> Dequantize | None:
    """What a node dequantises, where the kernels that requantise read that."""
    stored = Dequantize.of(node) if node.target is ir.DEQUANTIZE else None
    return stored if stored is not None and stored.spec.packed and stored.spec.scale == "e8m0" else None


def accepted(graph: Graph, gemms: list[Node], accepts: Accepts) -> list[Node]:
    """The quantise nodes, in order, whose chains a kernel family takes and that no other family's product reads."""
    nodes, chosen, device = [], set(gemms), val(gemms[0]).device
    for node in graph.find_nodes(op="call_function", target=ir.QUANTIZE):
        chain = Source.of(node)
        x = val(chain.x)
        if x.device == device and readers(node) <= chosen and accepts(chain.spec, chain.rotation, x.dtype):
            nodes.append(node)
    return nodes


def direct(codes: Node, gemm: Node) -> Node | None:
    """The quantiser that can hand its values straight to ``gemm``; None when it must read stored codes."""
    quantizer = maker(codes)
    if quantizer is None:
        return None
    again = gemm.meta.get("recompute") in RECOMPUTED and quantizer.meta.get("recompute") not in RECOMPUTED
    if is_backward(quantizer) != is_backward(gemm) or again:
        return None
    return quantizer


def is_stored(quantizer: Node, gemms: set[Node]) -> bool:
    """Whether anything but a product of the same direction reads the quantiser's results."""
    return any(direct(item, user) is None if user in gemms else True for item in quantizer.users for user in item.users)


def operand_dtype(gemm: Node) -> torch.dtype:
    """dtype of the dequantised operands: the model's, but fp32 for fp16, whose range is shorter than E8M0's."""
    dtype = val(gemm).dtype
    return torch.float32 if dtype is torch.float16 else dtype


def both_axes(quantizers: list[Node]) -> list[tuple[Node, Node]]:
    """Pairs of a quantiser of a tensor and one of its transpose, in the same direction; each is in one pair at most."""
    along_rows: dict[tuple[Node, bool], list[Node]] = {}
    for node in filter(_pairs, reversed(quantizers)):
        along_rows.setdefault((Source.of(node).x, is_backward(node)), []).append(node)
    pairs = []
    for node in filter(_pairs, quantizers):
        chain = Source.of(node)
        of = chain.transposed
        if of is not None and chain.stored is None and along_rows.get((of, is_backward(node))):
            pairs.append((along_rows[of, is_backward(node)].pop(), node))
    return pairs


def quantize_both(graph: Graph, op: OpOverload, rows: Node, columns: Node, *further: Any) -> tuple[Builder, Node]:
    """``op`` in place of a pair of :func:`both_axes`, where the first of the two is; its results are not wired up.

    ``further``: its arguments behind those of the two chains.
    """
    first = min(rows, columns)
    build = Builder(graph, like=first, before=first, backward=is_backward(first))
    sources = [ready(build, Source.of(node)) for node in (rows, columns)]
    return build, build(op, sources[0].x, *sources[0].chain, *sources[1].chain, *further)


def _pairs(quantizer: Node) -> bool:
    """Whether a kernel quantises along both axes at once by this spec."""
    spec = Quantize.of(quantizer).spec
    return not spec.tile and spec.rule != "eden"


def ready(build: Builder, chain: Source) -> Source:
    """``chain`` with signs and largest magnitude that are there where ``build`` inserts, and the multiplier that
    follows from the latter. A magnitude of rotated values is found by a kernel that rotates, and that keeps them where
    the quantiser cannot rotate."""
    amax = chain.amax
    if chain.signs is not None:
        pull(chain.signs, build.before)
    if amax is None:
        return chain
    if chain.rotation and amax.target is ir.AMAX:
        pull(chain.x, build.before)
        old, amax = amax, build(cuda_ops.ROTATED_AMAX, chain.x, chain.rotation, chain.signs)
        _replace(old, amax)
    if (rotation := Hadamard.into(chain.x)) is not None and amax.target is ir.AMAX:
        for node in filter(None, (rotation.x, rotation.signs)):
            pull(node, build.before)
        rotated = build(cuda_ops.ROTATE, rotation.x, rotation.n, rotation.signs)
        old, values, amax = amax, build.item(rotated, 0), build.item(rotated, 1)
        _replace(old, amax)
        _replace(chain.x, values)
        chain = replace(chain, x=values)
    pull(amax, build.before)
    return replace(chain, amax=amax, encode=two_level.encode(build, amax, chain.spec))


def _replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
