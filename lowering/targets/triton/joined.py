"""After the division: a quantiser and the fold of its codes in one launch, where both are in the same graph.

Of a product that backward computes again the codes are kept, and forward's operand is not. In the joint graph the fold
is a node of its own therefore, which backward gets a copy of. The one that stays in forward may be the quantiser's.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from quartet.lowering.ir.graph import Builder, argument, arguments, hand_over, index_of, is_backward, maker
from quartet.lowering.ir.ops.fused import FOLD, QUANTIZE


def fold_where_quantized(graph: Graph) -> None:
    """Let quantisers write the FP8 operands that their codes are folded to. What made them apart is dead then."""
    for fold in graph.find_nodes(op="call_function", target=FOLD):
        quantizer = _quantizer(fold)
        if quantizer is None:
            continue
        folded = argument(quantizer, "folded")
        build = Builder(graph, quantizer, before=quantizer.next if folded else quantizer,
                        backward=is_backward(quantizer))
        both = quantizer if folded else build(QUANTIZE, *(arguments(quantizer) | {"folded": True}).values())
        made = [build.item(both, i) for i in range(5)]
        hand_over(fold, made[3:])
        if not folded:
            hand_over(quantizer, made)


def _quantizer(fold: Node) -> Node | None:
    """What makes the codes and the scales of a fold, but of groups."""
    codes, scales = argument(fold, "codes"), argument(fold, "scales")
    made = maker(codes)
    if made is None or made.target is not QUANTIZE or maker(scales) is not made or argument(fold, "ends") is not None:
        return None
    same = (index_of(codes), index_of(scales)) == (0, 1) and argument(made, "spec") == argument(fold, "spec")
    return made if same and argument(made, "ends") is None else None
