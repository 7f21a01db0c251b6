"""How Inductor lowers a semantic op that no kernel took: its decomposition, traced and inlined into Inductor's IR.

What is inlined fuses with its neighbours. Each (op, constants, shapes) is traced once a process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quartet.kernels import extension
from quartet.lowering.ir import STORE
from quartet.lowering.ir.graph import Builder, aten, shape, val
from quartet.lowering.ir.op import ops
from quartet.lowering.ir.ops import grouped, saved, weights  # noqa: F401  declare ops that are inlined
from quartet.lowering.targets.blackwell import block_scaled_ops  # noqa: F401  declares one that is inlined
from quartet.runtime import compat
from quartet.runtime.sizes import unbacked

_traced: dict[Any, GraphModule] = {}


def _inline(decompose: Callable[..., Any], graph: Any, operands: tuple[Any, ...]) -> Any:
    """Inductor IR of an op's decomposition applied to ``operands``, in the graph that is being lowered."""
    node = graph.current_node
    _count_inputs_once(graph)
    values = [a.meta["val"] for a in node.args if isinstance(a, Node)]
    constants = map_arg(node.args, lambda n: None)
    shapes = tuple((str(tuple(v.shape)), str(v.stride()), v.dtype, str(v.device)) for v in values)
    key = (decompose, str(constants), extension.changes(), shapes)
    if key not in _traced or any(isinstance(s, torch.SymInt) for v in values for s in v.shape):

        def call(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return decompose(*(next(given) if isinstance(a, Node) else a for a in node.args))

        _traced[key] = _with_known_strides(compat.trace(call, values))
    inputs = [value for value, arg in zip(operands, node.args, strict=True) if isinstance(arg, Node)]
    return compat.inline_into_inductor(_traced[key], inputs)


def _count_inputs_once(graph: Any) -> None:
    """Let no read of an input count for more bytes than the input has, in a graph that Inductor is lowering.

    ``get_freeable_input_buf`` of torch/_inductor/memory.py takes an input for as large as the loops that read it, so
    kept scales of groups for as large as what they scale. By that a backward would decode all that attention reads when
    it begins, to be rid of the scales, and hold buffers for reuse below a peak that there is not.
    """
    theirs = graph.get_dep_size_hint

    def size(dep: Any, *how: Any) -> Any:
        read = theirs(dep, *how)
        return min(read, theirs(compat.StarDep(dep.name), *how)) if dep.name in graph.graph_inputs else read

    if "get_dep_size_hint" not in vars(graph):
        graph.get_dep_size_hint = size


def _with_known_strides(gm: GraphModule) -> GraphModule:
    """Keep what a product reads with the sizes that only the data decides as its outermost ones.

    Inductor sorts the strides of a product's operands, and no stride is then made of such a size.
    """
    for node in (n for n in gm.graph.nodes if n.target in (aten.mm.default, aten.bmm.default)):
        for operand in node.all_input_nodes:
            if any(map(unbacked, val(operand).stride())):
                order = sorted(range(val(operand).dim()), key=lambda dim: not unbacked(shape(operand)[dim]))
                build = Builder(gm.graph, like=node, before=node, backward=False)
                kept = build(STORE, build(aten.permute.default, operand, order))
                back = build(aten.permute.default, kept, [order.index(dim) for dim in range(len(order))])
                node.replace_input_with(operand, back)
    return gm


def register() -> None:
    """Teach Inductor the decompositions of the semantic ops."""
    for op in ops():
        if op.decompose is not None:
            compat.register_inductor_lowering(op.overload, partial(_inline, op.decompose))
    compat.register_inductor_lowering(STORE, lambda graph, operands: compat.store_in_inductor(*operands))
