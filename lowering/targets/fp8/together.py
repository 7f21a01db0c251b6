"""Casts of several tensors in one launch: weights that follow each other, and the gradients that meet one X.

Those that wait for others do so in memory: codes of weights, and under autocast their conversions. A gradient waits
for no product but those in front of it, so what other products read is freed as early as without.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import chain, groupby

from torch.fx import Node

from quartet.lowering.ir.graph import Builder, Traced, aten, is_backward, pull, source_of, val
from quartet.lowering.ir.operands import TRANSPOSED, Product, quantizer_of, readers
from quartet.lowering.ir.ops.fp8 import CASTS
from quartet.lowering.targets.fp8.casts import Cast, Delayed, cast_by_rows, hand_over_all, magnitudes_of_rows
from quartet.lowering.targets.fp8.weights import Scales
from quartet.runtime.compat import OpOverload
from quartet.runtime.view_ops import CAST

TOGETHER = 8  # tensors at most


def cast_together(quantizers: list[Node], gemms: list[Node], known: dict[Node, Scales], traced: Traced,
                  delayed: Delayed) -> set[Node]:
    """Rewrite those of the quantisers that are cast with others; ``known``: the scales of weights."""
    able = [node for node in quantizers if _able(node)]
    done: set[Node] = set()
    for members in _weights([node for node in able if node in known], known):
        build, casts = _begun(members)
        first, cast = known[members[0]], casts[0]
        table = build(aten.slice.Tensor, first.table, 0, first.row, first.row + len(members))
        made = build(CASTS, [each.x for each in casts], table, cast.spec.element, cast.plain, cast.turned)
        hand_over_all(build, casts, made, [known[node].scale for node in members])
        done.update(members)
    able = [node for node in able if node not in known]
    for members in chain(_of_parameters(able), _gradients(able, gemms)):
        build, casts = _begun(members)
        done.update(members)
        if casts[0].history is not None:
            delayed.cast(build, casts)
            continue
        magnitudes = [magnitudes_of_rows(build, traced, cast.x) for cast in casts]
        cast_by_rows(build, casts, [rows for rows in magnitudes if rows is not None])
    return done


def _begun(members: list[Node]) -> tuple[Builder, list[Cast]]:
    """Where the first stands, what all are made from before it."""
    first, casts = members[0], [Cast.of(node) for node in members]
    for cast in casts:
        pull(cast.x, first)
    return Builder(first.graph, like=first, before=first, backward=is_backward(first)), casts


def _able(quantizer: Node) -> bool:
    """Whether the kernels for several take it: a matrix as it lies in memory, by a scale of its own or of earlier
    steps."""
    cast = Cast.of(quantizer)
    by_itself = cast.spec.rule in ("amax", "amax_pow2") and cast.amax is None
    return (cast.by_words and (by_itself or cast.history is not None)
            and (is_backward(quantizer) or "recompute" not in quantizer.meta))


def _kind(quantizer: Node) -> Hashable:
    """What quantisers have in common that are cast in one launch."""
    cast = Cast.of(quantizer)
    x, margin = val(cast.x), None if cast.history is None else cast.history.margin
    return is_backward(quantizer), str(cast.spec), margin, x.dtype, x.device, cast.plain, cast.turned


def _weights(quantizers: list[Node], known: dict[Node, Scales]) -> Iterator[list[Node]]:
    """Neighbours in a table of scales."""
    def run(numbered: tuple[int, Node]) -> Hashable:
        place, node = numbered
        return known[node].table, known[node].row - place, _kind(node)

    for _, neighbours in groupby(enumerate(quantizers), key=run):
        yield from _some(node for _, node in neighbours)


def _of_parameters(quantizers: list[Node]) -> Iterator[list[Node]]:
    """Weights that forward converts to another dtype first, or whose history it knows, in their order."""
    found: dict[Hashable, list[Node]] = {}
    for node in quantizers:
        cast = Cast.of(node)
        converted = source_of(cast.x) if cast.x.target is CAST else None
        shown = cast.x if converted is None and cast.history is not None else converted
        if not is_backward(node) and shown is not None and shown.op == "placeholder":
            found.setdefault(_kind(node), []).append(node)
    for members in found.values():
        yield from _some(members)


def _gradients(quantizers: list[Node], gemms: list[Node]) -> Iterator[list[Node]]:
    """Gradients that are multiplied with the codes of one X; of one that meets several X, those of the first."""
    able, found = set(quantizers), dict[Hashable, set[Node]]()
    for gemm in gemms:
        for one, other in (Product.of(gemm).operands, Product.of(gemm).operands[::-1]):
            gradient, x = quantizer_of(one.codes), quantizer_of(other.codes)
            if (gradient is not None and x is not None and gradient.node in able and one.layout == TRANSPOSED
                    and is_backward(gradient.node) and not is_backward(x.node)):
                found.setdefault((x.node, _kind(gradient.node)), set()).add(gradient.node)
    for nodes in found.values():
        runs: list[list[Node]] = []
        for node in sorted(nodes & able):
            if runs and len(runs[-1]) < TOGETHER and _at_hand(node, runs[-1]):
                runs[-1].append(node)
            else:
                runs.append([node])
        for members in runs:
            if len(members) > 1:
                able.difference_update(members)
                yield members


def _at_hand(node: Node, others: list[Node]) -> bool:
    """Whether a node can stand beside those before it: it needs nothing that they compute, and no product would stay
    behind, as those of other layers that gave their gradients meanwhile, which hold their operands in memory."""
    needed, waiting = set[Node](), [node]
    while waiting:
        for made in waiting.pop().all_input_nodes:
            if made not in needed and not made < others[0]:
                needed.add(made)
                waiting.append(made)
    if not needed.isdisjoint(others):
        return False
    own, between = set[Node]().union(*map(readers, others)), others[0].next
    while between is not node:
        if _multiplies(between) and between not in needed and between not in own:
            return False
        between = between.next
    return True


def _multiplies(node: Node) -> bool:
    name = node.target._schema.name if isinstance(node.target, OpOverload) else ""
    return name.endswith("mm") or "convolution" in name


def _some(nodes: Iterable[Node]) -> Iterator[list[Node]]:
    """Runs of at most ``TOGETHER``, and at least two."""
    left = list(nodes)
    for at in range(0, len(left), TOGETHER):
        if len(part := left[at:at + TOGETHER]) > 1:
            yield part
