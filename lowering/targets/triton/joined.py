"""After the division: a quantiser and the fold of its codes in one launch, where both are in the same graph.

Of a product that backward computes again the codes are kept, and forward's operand is not. In the joint graph the fold
is a node of its own therefore, which backward gets a copy of. The one that stays in forward may be the quantiser's.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from quartet.lowering.ir.graph import Builder, argument, arguments, index_of, is_backward, maker, results
from quartet.lowering.ir.ops.fused import FOLD, QUANTIZE


def fold_where_quantized(graph: Graph) -> None:
    """Let quantisers write the FP8 operands that their codes are folded to."""
    for fold in graph.find_nodes(op="call_function", target=FOLD):
        quantizer = _quantizer(fold)
        if quantizer is None:
            continue
        folded = argument(quantizer, "folded")
        build = Builder(graph, quantizer, before=quantizer.next if folded else quantizer,
                        backward=is_backward(quantizer))
        both = quantizer if folded else build(QUANTIZE, *(arguments(quantizer) | {"folded": True}).values())
        _hand_over(build, fold, both, 3)
        if not folded:
            _hand_over(build, quantizer, both, 0)


def _hand_over(build: Builder, old: Node, new: Node, first: int) -> None:
    """Results of ``new`` from ``first`` on instead of those of ``old``, which goes."""
    for index, item in results(old).items():
        item.replace_all_uses_with(build.item(new, first + index))
        old.graph.erase_node(item)
    old.graph.erase_node(old)


def _quantizer(fold: Node) -> Node | None:
    """What makes the codes and the scales of a fold, but of groups."""
    codes, scales = argument(fold, "codes"), argument(fold, "scales")
    made = maker(codes)
    if made is None or made.target is not QUANTIZE or maker(scales) is not made or argument(fold, "ends") is not None:
        return None
    same = (index_of(codes), index_of(scales)) == (0, 1) and argument(made, "spec") == argument(fold, "spec")
    return made if same and argument(made, "ends") is None else None
