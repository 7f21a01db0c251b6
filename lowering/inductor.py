"""How Inductor lowers a semantic op that no kernel took: the reference, traced and inlined into its IR.

What is inlined fuses with its neighbours. Each (op, constants, shapes) is traced once a process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir
from quartet.runtime import compat

_traced: dict[Any, GraphModule] = {}


def unrolled_hadamard(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
    """The reference butterfly with its n columns as separate tensors: the same sums in the same order.

    Inductor makes one loop of it. Measured on 1024×1536 fp32, 2 cores: 2.5 ms, against 49 ms for the
    reference's stages and 1.1 ms for a matmul, whose sums have another order.
    """
    x = reference.pad_last(x.to(torch.float32), n)
    rows, cols = x.shape
    blocks = x.reshape(rows, cols // n, n)
    if signs is not None and not inverse:
        blocks = blocks * signs
    v = list(blocks.unbind(-1))
    stride = n // 2
    while stride >= 1:
        w = list(v)
        for i in range(n):
            if not i & stride:
                w[i], w[i + stride] = v[i] + v[i + stride], v[i] - v[i + stride]
        v = w
        stride //= 2
    y = torch.stack(v, dim=-1) * (1.0 / n**0.5)
    if signs is not None and inverse:
        y = y * signs
    return y.reshape(rows, cols).to(dtype)


def _quantize(x: Tensor, spec: str, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor, Tensor]:
    """The reference with its random bytes from an op of their own: Philox inlined would be computed 16 times over."""
    q = QuantSpec.parse(spec)
    bits = None
    if seed is not None:
        bits = torch.ops.quartet.random_bytes(seed, site, x.shape[0], ir.ceil_to(x.shape[1], q.block)).to(torch.int64)
    return reference.quantize(x, q, seed, site, bits)


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    ir.HADAMARD: unrolled_hadamard,
    ir.QUANTIZE: _quantize,
    ir.DEQUANTIZE: ir._dequantize,
    ir.APPLY_MASK: ir._apply_mask,
    ir.SCALED_MM: ir._scaled_mm,
}


def _inline(op: Any, node: Node, operands: tuple[Any, ...]) -> Any:
    """Inductor IR of ``op`` applied to ``operands``; ``node`` is the graph node being lowered."""
    inputs = [a for a in node.args if isinstance(a, Node)]
    values = [a.meta["val"] for a in inputs]
    constants = map_arg(node.args, lambda n: None)
    key = (op, str(constants), tuple((str(tuple(v.shape)), str(v.stride()), v.dtype, str(v.device)) for v in values))
    if key not in _traced or any(isinstance(s, torch.SymInt) for v in values for s in v.shape):

        def call(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return _DECOMPOSITIONS[op](*(next(given) if isinstance(a, Node) else a for a in node.args))

        _traced[key] = compat.trace(call, values)
    copy = GraphModule(_traced[key], torch.fx.Graph())
    copy.graph.output(copy.graph.graph_copy(_traced[key].graph, {}))
    return compat.inline_into_inductor(copy, _tensors(node, operands), realize=op is ir.HADAMARD)


def _tensors(node: Node, operands: tuple[Any, ...]) -> list[Any]:
    return [value for value, arg in zip(operands, node.args, strict=True) if isinstance(arg, Node)]


def register() -> None:
    """Teach Inductor the decompositions of the semantic ops."""
    for op in _DECOMPOSITIONS:
        compat.register_inductor_lowering(op, lambda node, operands, op=op: _inline(op, node, operands))
