"""Give every product the form in which the other passes look for it, once. Exact: no arithmetic changes.

    a bmm of one matrix each is an mm
    a bmm of a weight's one matrix, expanded over the batch, is an mm of all rows, where the policy quantises it:
        x[b] · W  of each b is  X · W, and so is  W · x[b], transposed;  W's gradient  Σ_b x[b]ᵀ · e[b]  is  Xᵀ · E
    what a custom Function's backward multiplies again is forward's product, as Inductor would find on its own
"""

from __future__ import annotations

from collections.abc import Container

from torch.fx import Node

from quartet.lowering.ir.graph import (
    BY_HAND,
    Builder,
    argument,
    aten,
    editing,
    is_backward,
    keep_as,
    shape,
    source_of,
    val,
)
from quartet.passes.find.find_matmuls import parameter_origins
from quartet.passes.find.values import Values
from quartet.passes.graph_pass import graph_pass
from quartet.passes.matrices import MATMULS, canonical, operands
from quartet.passes.naming import module_name
from quartet.passes.state import State
from quartet.runtime.sizes import same, same_sizes
from quartet.runtime.view_ops import RESHAPES


@graph_pass(optional=True,
            summary="a bmm of batch 1, or of one weight for the whole batch, is a matrix product; what such a "
                    "Function multiplies again is one product")
def canonicalize(state: State) -> None:
    """Rewrite batches of one and of one weight, then merge what is multiplied twice."""
    with editing(state.gm) as graph:
        for node in list(graph.find_nodes(op="call_function", target=aten.bmm.default)):
            batch = shape(node)[0]
            if isinstance(batch, int) and batch == 1:
                _to_mm(state, node)
        _fold(state)
    again = [n for n in state.gm.graph.nodes if n.target in MATMULS and BY_HAND in n.meta]
    if again:
        _merge(state, again)


def _to_mm(state: State, node: Node) -> None:
    build = _builder(state, node)
    a, b = operands(node)
    mm = keep_as(build(aten.mm.default, build(aten.squeeze.dim, a, 0), build(aten.squeeze.dim, b, 0)), node)
    node.replace_all_uses_with(build(aten.unsqueeze.default, mm, 0))


def _fold(state: State) -> None:
    """Write as a product of all rows what multiplies one weight with each matrix of a batch, and W's gradient of it.

    ``matmul`` folds a batch by itself where W is trained, and not where it is frozen: a layer is quantised in both.
    """
    graph = state.gm.graph
    batches = list(graph.find_nodes(op="call_function", target=aten.bmm.default))
    origin, folded = parameter_origins(state) if batches else {}, False
    for node in batches:
        a, b = operands(node)
        left, right = _one_matrix(a, origin), _one_matrix(b, origin)
        shared = left or right
        if shared is None or left and right or a in origin and b in origin or _is_empty(a, b):
            continue
        batch, rows, cols = shape(node)
        sizes = (batch * rows, cols) if right is not None else (batch * cols, rows)
        resolution = state.config.resolve("linear", module_name(origin[shared[0]]), *sizes, shape(a)[2])
        if not resolution.quantizes_unpriced(state.config.where_it_pays):  # what turning the rows costs has no price
            continue
        build = _builder(state, node)
        if right is not None:
            product = build(aten.mm.default, _rows(build, a), _weight(build, *shared))
            made = _batch(build, keep_as(product, node), a)
        else:
            turned = build(aten.permute.default, b, [0, 2, 1])
            product = build(aten.mm.default, _rows(build, turned), build.transpose(_weight(build, *shared)))
            back = build(aten.permute.default, _batch(build, keep_as(product, node), turned), [0, 2, 1])
            made = build.contiguous(back)
        node.replace_all_uses_with(made)
        folded = folded or not is_backward(node)
    for total in list(graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)) if folded else ():
        _fold_gradient(state, total)


def _fold_gradient(state: State, total: Node) -> None:
    """Where a gradient's products are summed over the batch, multiply all rows."""
    node, flipped = canonical(source_of(total))
    if node.target is not aten.bmm.default or len(node.users) > 1 or not is_backward(node) or (
            list(argument(total, "dim") or ()) != [0]) or argument(total, "dtype") not in (None, val(node).dtype):
        return
    a, b = operands(node)
    if _is_empty(a, b):
        return
    build = _builder(state, node, before=total)
    rows = _rows(build, build(aten.permute.default, a, [0, 2, 1]))
    product = build(aten.mm.default, build.transpose(rows), _rows(build, b))
    product = build.transpose(product) if flipped else product
    total.replace_all_uses_with(build(aten.unsqueeze.default, product, 0) if argument(total, "keepdim") else product)


def _is_empty(*operands: Node) -> bool:
    return any(same(size, 0) for operand in operands for size in shape(operand))


def _one_matrix(operand: Node, origin: Container[Node]) -> tuple[Node, bool] | None:
    """The one matrix of a weight that all matrices of a batch are, and whether they are its transpose."""
    node, flipped = canonical(operand)
    while node.target in RESHAPES and same_sizes(shape(source_of(node))[-2:], shape(node)[-2:]):
        node = source_of(node)
    if node.target is not aten.expand.default or source_of(node) not in origin:
        return None
    *batch, rows, cols = shape(source_of(node)) if len(shape(source_of(node))) > 1 else (0, 0, 0)
    if any(not isinstance(size, int) or size != 1 for size in batch) or not same_sizes((rows, cols), shape(node)[-2:]):
        return None
    return source_of(node), flipped


def _weight(build: Builder, matrix: Node, flipped: bool) -> Node:
    while len(shape(matrix)) > 2:
        matrix = build(aten.squeeze.dim, matrix, 0)
    return build.transpose(matrix) if flipped else matrix


def _rows(build: Builder, batch: Node) -> Node:
    return build(aten.view.default, build.contiguous(batch), [-1, build.size(shape(batch)[-1])])


def _batch(build: Builder, rows: Node, like: Node) -> Node:
    return build(aten.view.default, rows, [*map(build.size, shape(like)[:2]), build.size(shape(rows)[-1])])


def _builder(state: State, node: Node, before: Node | None = None) -> Builder:
    build = Builder(state.gm.graph, like=node, before=before or node, backward=is_backward(node))
    if is_backward(node):  # keep autograd's own freedom to move it
        build.meta["partitioner_tag"] = node.meta["partitioner_tag"]
    return build


def _merge(state: State, again: list[Node]) -> None:
    values = Values(state.gm.graph)
    forward = {values[n]: n for n in reversed(state.gm.graph.nodes) if n.target in MATMULS and not is_backward(n)}
    with editing(state.gm):
        for node in again:
            first = forward.get(values[node])
            if first is not None:
                node.replace_all_uses_with(first)
