"""Quantise rows before the collective that moves them, so that their codes travel.

    Q(gather(X)) = gather(Q(X))        Q row-local, to nearest

Between a collective and a quantiser may stand what moves whole rows: waiting, views that keep the last axis, and the
parts and their concatenation by which a gather along another axis is written. It is repeated on codes, scales and mask.
What backward makes of X starts from those codes, so that the plane along the other axis need not travel.

Left alone are tensors that anything else reads, quantisers that need more than a row (one scale a tensor, random bits
by the element's place in the gathered tensor), and those in generated code, which Inductor would fuse with what
computes X, past the rounding to X's dtype: other numbers.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import (
    Builder,
    argument,
    aten,
    editing,
    is_backward,
    maker,
    pull,
    remaining,
    results,
    shape,
    source,
    source_of,
    val,
)
from quartet.lowering.ir.operands import Product, quantizer_of, readers
from quartet.lowering.ir.views import Hadamard, Quantize
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.quantize import OPERANDS
from quartet.passes.sites import SITE_KEY, Quantized
from quartet.passes.state import State
from quartet.runtime.sizes import same
from quartet.runtime.view_ops import COPIES, RESHAPES

_C10D = torch.ops._c10d_functional
COLLECTIVES = (_C10D.all_gather_into_tensor.default, _C10D.all_to_all_single.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
SWAPPED = [1, 0]
_NAMES = {"x": "X", "w": "W", "e": "E"}


@graph_pass(reads=Quantized, writes=Quantized, optional=True,
            summary="row-local quantisers before the collectives that move their rows: codes travel")
def travel(state: State) -> None:
    """Move quantisers before the gathers and exchanges of their tensors, and note where they stay behind."""
    quantizers = state.gm.graph.find_nodes(op="call_function", target=ir.QUANTIZE)
    moved = [(node, path) for node in quantizers if (path := _path(_shown(node)[-1])) is not None]
    if not moved:
        return
    with editing(state.gm):
        for quantizer, path in moved:
            names = _operands(quantizer)
            reason = _obstacle(state, quantizer, path, set(names))
            note = f"gathered in high precision: {reason}" if reason else _move(state, quantizer, path)
            for product, name in names.items():
                index, role = product.meta[SITE_KEY]
                site = state.site(index)
                if isinstance(site, Quantized):
                    state.advance(site.remark(role, f"{name} {note}"))


def _shown(quantizer: Node) -> list[Node]:
    """From a quantiser up to what it quantises, through a rotation and through a transpose that is undone."""
    found = [quantizer, Quantize.of(quantizer).x]
    if (rotated := Hadamard.into(found[-1])) is not None:
        found.append(rotated.x)
    while (turned := _permuted(found[-1])) is not None and (x := _permuted(turned)) is not None:
        found += [turned, x]
    return found


def _permuted(node: Node) -> Node | None:
    """What a node is the transpose of."""
    return source(node) if node.target is aten.permute.default and argument(node, "dims") == SWAPPED else None


def _path(x: Node) -> list[Node] | None:
    """From a collective to what a quantiser reads, in the graph's order; None where it does not come from one."""
    path: list[Node] = []
    while True:
        path.insert(0, x)
        if x.target in COLLECTIVES:
            return path
        if x.target is aten.cat.default:
            parts = argument(x, "tensors")
            whole = maker(parts[0])
            axis = argument(x, "dim") % len(shape(x))
            if (whole is None or whole.target not in _SPLITS or parts != [results(whole).get(i) for i in
                range(len(val(whole)))] or axis == len(shape(x)) - 1 or _axis(whole) == len(shape(x)) - 1):
                return None
            path[:0] = [whole, *parts]
            above: Node | None = source_of(whole)
        elif x.target is _C10D.wait_tensor.default or x.target in COPIES:
            above = source_of(x)
        elif x.target in RESHAPES and same(shape(x)[-1], shape(source_of(x))[-1]):
            above = source(x)
        else:
            return None
        if above is None:
            return None
        x = above


def _axis(split: Node) -> int:
    return int(argument(split, "dim")) % len(shape(source_of(split)))


def _obstacle(state: State, quantizer: Node, path: list[Node], products: set[Node]) -> str:
    """Why a quantiser stays behind the collective; empty where it need not."""
    spec = Quantize.of(quantizer).spec
    if not spec.row_local:
        return f"'{spec}' is scaled by more than a row"
    if spec.stochastic:
        return "its random bits go by the element's place in the gathered tensor"
    x, read = path[-1], {*path, *_shown(quantizer)}
    others = [user for node in read - {quantizer} for user in node.users if user not in read]
    if others:
        return f"{others[0]} reads it too"
    for product in products:
        index, role = product.meta[SITE_KEY]
        site = state.site(index)
        kernel = site.decisions[role].kernel if isinstance(site, Quantized) else None
        if val(x).dtype is not torch.float32 and not (kernel is not None and kernel.opaque):
            return f"{kernel.name if kernel else 'no kernel'} quantises in generated code, past X's rounding"
    return "" if products else "no product reads the codes"


def _move(state: State, quantizer: Node, path: list[Node]) -> str:
    """Quantise what the collective is given, and repeat the path on each plane; returns what travels."""
    made, collective = Quantize.of(quantizer), path[0]
    local = source_of(collective)
    build = Builder(state.gm.graph, like=quantizer, before=collective, backward=is_backward(collective))
    *rows, columns = shape(local)
    x = local if len(rows) == 1 else build(aten.reshape.default, local, [-1, columns])
    if (rotated := Hadamard.into(made.x)) is not None:
        if rotated.signs is not None:
            pull(rotated.signs, collective)
        x = replace(rotated, x=x).emit(build)
    early, sent = replace(made, x=x).emit(build), 0
    for index, item in results(quantizer).items():
        plane = build.item(early, index)
        if len(rows) != 1:
            plane = build(aten.reshape.default, plane, [*map(build.size, rows), shape(plane)[1]])
        copies: dict[Node, Node] = {local: plane}
        for node in path:
            copies[node] = _repeated(state, node, copies)
        moved = copies[path[-1]]
        item.replace_all_uses_with(moved)
        _replace_operands(state, item, moved)
        sent += _bytes(copies[collective])
    return f"gathered as codes, {sent} in place of {_bytes(collective)} bytes"


def _repeated(state: State, node: Node, copies: dict[Node, Node]) -> Node:
    """A node of the path for a plane, whose last axis is another."""
    build = Builder(state.gm.graph, like=node, before=node, backward=is_backward(node))
    if node.target is aten.cat.default:
        return build(aten.cat.default, [copies[part] for part in argument(node, "tensors")], argument(node, "dim"))
    above = source_of(node)
    if node.target is operator.getitem:
        return build(operator.getitem, copies[above], *remaining(node))
    if node.target in RESHAPES:
        sizes = [*map(build.size, shape(node)[:-1]), shape(copies[above])[-1]]
        return build(aten.reshape.default, copies[above], sizes)
    if node.target is aten.clone.default:
        return build.contiguous(copies[above])
    target: Any = node.target
    return build(target, copies[above], *remaining(node))


def _replace_operands(state: State, item: Node, moved: Node) -> None:
    """Tell the sites what their operands are now."""
    for site in state.at(Quantized):
        for name, operand in site.operands.items():
            parts: dict[str, Any] = {part: moved for part in ("codes", "scales", "mask")
                                     if getattr(operand, part) is item}
            if parts:
                site = replace(site, operands={**site.operands, name: replace(operand, **parts)})
                state.advance(site)


def _operands(quantizer: Node) -> dict[Node, str]:
    """The products that read a quantiser's results, and which operand of theirs these are."""
    found = {}
    for product in readers(quantizer):
        if SITE_KEY in product.meta:
            made = quantizer_of(Product.of(product).a.codes)
            first = made is not None and made.node is quantizer
            _, role = product.meta[SITE_KEY]
            found[product] = _NAMES[OPERANDS[role][0 if first else 1]]
    return found


def _bytes(node: Node) -> Any:
    return val(node).numel() * val(node).element_size()
