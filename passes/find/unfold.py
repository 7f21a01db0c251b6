"""Write convolutions as matrix products where the policy quantises them. Exact: the same sums in another order.

    columns   X[m, k]: for each output position the inputs under the kernel, k = in · kernel size
    fprop     Y[m, out] = X · Wᵀ + bias      W[out, k], the weight as it lies in memory
    dgrad     gX = fold(E · W)               what was unfolded is added up again
    wgrad     gW = Eᵀ · X

Unfolding is a pad and a strided view in each dimension, folding a sum over the kernel's taps, one dimension after the
other. ``find_matmuls`` then finds the three products as it finds a linear layer's. Columns can repeat each input
kernel size times over: then neither they nor their codes are kept, backward unfolds and quantises the input again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from typing import Any

import torch
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering.ir.graph import (
    BY_HAND,
    Builder,
    argument,
    arguments,
    aten,
    editing,
    is_backward,
    keep_as,
    results,
    shape,
    source_of,
    val,
)
from quartet.lowering.recipe.resolution import Resolution
from quartet.passes.find.find_matmuls import left_alone, parameter_origins
from quartet.passes.graph_pass import graph_pass
from quartet.passes.naming import module_name, module_of
from quartet.passes.plan.plan import DTYPES, UnsupportedMatmul
from quartet.passes.sites import NOTES_KEY, OP_CLASS_KEY, RECOMPUTED_KEY
from quartet.passes.state import State
from quartet.runtime.sizes import hint, same_sizes

CONV, CONV_BACKWARD = aten.convolution.default, aten.convolution_backward.default
GRADIENTS = {"dgrad": 0, "wgrad": 1}  # role → which result of CONV_BACKWARD


@dataclass(frozen=True)
class Convolution:
    """``aten.convolution`` and its gradients' node, which is None where there are none.

    ``kernel``, ``stride``, ``padding``, ``dilation``: one entry a spatial dimension; m, n, k as of a matmul.
    """

    node: Node
    backward: Node | None
    fqn: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    groups: int
    mnk: tuple[Any, Any, Any]

    @staticmethod
    def of(node: Node, backward: Node | None, fqn: str) -> Convolution:
        given = arguments(node)
        weight, out = shape(given["weight"]), shape(node)
        kernel = weight[2:]

        def each(name: str) -> tuple[int, ...]:
            values = tuple(given[name])
            return values if len(values) == len(kernel) else values * len(kernel)

        mnk = out[0] * prod(out[2:]), out[1], prod(weight[1:])
        return Convolution(node, backward, fqn, kernel, each("stride"), each("padding"), each("dilation"),
                           bool(given["transposed"]), given["groups"], mnk)

    @property
    def x(self) -> Node:
        return source_of(self.node)

    @property
    def weight(self) -> Node:
        return _weight(self.node)

    @property
    def plain(self) -> bool:
        """Each output position has its own inputs as they are: nothing is padded, skipped or repeated."""
        return all(k == s == 1 and p == 0 for k, s, p in zip(self.kernel, self.stride, self.padding, strict=True))

    @property
    def repeats(self) -> float:
        """Elements of the columns for each of the input."""
        return float(prod(shape(self.node)[2:]) * self.mnk[2] / prod(shape(self.x)[1:]))

    def obstacle(self) -> str | None:
        """Why it is no matrix product of ours."""
        if self.transposed:
            return "a transposed convolution; only forward ones are unfolded"
        if self.groups != 1:
            return f"{self.groups} groups, each a product of its own; only convolutions of one group are unfolded"
        dtypes = {val(self.x).dtype, val(self.weight).dtype}
        if not dtypes <= set(DTYPES):
            return f"operands are {', '.join(map(str, dtypes))}; quantisers take float32, bfloat16 or float16"
        sizes = *shape(self.weight), *shape(self.x)[1:]
        if not all(isinstance(size, int) for size in sizes):
            return (f"only the batch can be of symbolic size, not the image {shape(self.x)[1:]}: "
                    "mark_dynamic the batch alone, or compile with dynamic=False")
        if any(isinstance(size, int) and size == 0 for size in (*shape(self.node), *self.mnk)):
            return f"a size is zero (output {shape(self.node)})"
        return None


@graph_pass(optional=True, summary="convolutions that the policy quantises, written as matrix products")
def unfold(state: State) -> None:
    """Rewrite the convolutions that the policy quantises; record all others. Raises UnsupportedMatmul when strict."""
    nodes = state.gm.graph.find_nodes(op="call_function", target=CONV)
    if not nodes:
        return
    origin = parameter_origins(state)
    gradients = state.gm.graph.find_nodes(op="call_function", target=CONV_BACKWARD)
    with editing(state.gm):
        for node in nodes:
            if not is_backward(node):
                own = next((g for g in gradients if _belongs(g, node)), None)
                _convolution(state, node, own, origin)


def _belongs(backward: Node, forward: Node) -> bool:
    same = "seq_nr" not in forward.meta or backward.meta.get("seq_nr") == forward.meta["seq_nr"] or (
        BY_HAND in backward.meta)
    return same and (argument(backward, "input"), _weight(backward)) == (source_of(forward), _weight(forward))


def _weight(node: Node) -> Node:
    found: Node = argument(node, "weight")
    return found


def _convolution(state: State, node: Node, backward: Node | None, origin: dict[Node, str]) -> None:
    x, weight = source_of(node), _weight(node)
    weighted = weight in origin and x not in origin
    fqn = module_name(origin[weight]) if weighted else module_of(node)
    conv = Convolution.of(node, backward, fqn)
    if not weighted:
        _leave(state, conv, "its kernel is no parameter, or its input is one")
        return
    resolution = state.config.resolve("conv", fqn, *conv.mnk)
    if not resolution.quantizes_unpriced(state.config.where_it_pays):
        _leave(state, conv, resolution)
        return
    obstacle = conv.obstacle()
    if obstacle is None:
        _rewrite(conv)
        return
    if state.config.strict:
        m, n, k = conv.mnk
        raise UnsupportedMatmul(f"strict=True, and the convolution {fqn or node.name} (m={m} n={n} k={k}, "
                                f"{val(node).dtype}) cannot be quantised: {obstacle}")
    _leave(state, conv, obstacle)


def _leave(state: State, conv: Convolution, why: Resolution | str) -> None:
    """A record for each product of a convolution that stays."""
    m, n, k = conv.mnk
    mask = argument(conv.backward, "output_mask") if conv.backward is not None else (False, False)
    for role, mnk in (("fprop", (m, n, k)), ("dgrad", (m, k, n)), ("wgrad", (n, k, m))):
        if role == "fprop" or mask[GRADIENTS[role]]:
            reason = why if isinstance(why, str) else why.choice(role).reason
            if not isinstance(why, str) and why.choice(role).gemm is not None:
                reason = "it is not known to pay: name it in a rule"
            state.leave(left_alone(conv.node, "conv", role, mnk, val(conv.node).dtype, reason, conv.fqn))


def _rewrite(conv: Convolution) -> None:
    build = Builder(conv.node.graph, like=conv.node, before=conv.node, backward=False)
    columns = _columns(conv)
    weight = _matrix(build, conv.weight, [conv.mnk[1], conv.mnk[2]])
    out = keep_as(build(aten.mm.default, columns, build.transpose(weight)), conv.node)
    out.meta[OP_CLASS_KEY] = "conv"
    if not conv.plain:
        out.meta[NOTES_KEY] = (f"unfolded: {conv.repeats:.3g}× the input",)
    bias = argument(conv.node, "bias")
    if bias is not None:
        out = build(aten.add.Tensor, out, bias)
    conv.node.replace_all_uses_with(_image(build, out, conv.node))
    if conv.backward is not None:
        _rewrite_gradients(conv, conv.backward, columns, weight)


def _rewrite_gradients(conv: Convolution, node: Node, columns: Node, weight: Node) -> None:
    build = Builder(node.graph, like=node, before=node, backward=is_backward(node))
    made, rank = results(node), len(conv.kernel)
    e = _matrix(build, build(aten.permute.default, source_of(node), [0, *range(2, 2 + rank), 1]), [-1, conv.mnk[1]])
    if 0 in made:
        folded = _fold(build, conv, build(aten.mm.default, e, weight))
        made[0].replace_all_uses_with(_laid_out(build, folded, made[0]))
    if 1 in made:
        product = build(aten.mm.default, build.transpose(e), columns)
        product = build(aten.view.default, product, list(shape(conv.weight)))
        made[1].replace_all_uses_with(_laid_out(build, product, made[1]))
    if 2 in made:
        made[2].replace_all_uses_with(build(aten.sum.dim_IntList, e, [0]))


def _columns(conv: Convolution) -> Node:
    """``[m, k]`` of the input: k runs over channels, then over the kernel, like a row of the weight."""
    build = Builder(conv.node.graph, like=conv.node, before=conv.node, backward=False)
    again = conv.backward is not None and conv.repeats > 1
    if again:
        build.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
    rank, x = len(conv.kernel), conv.x
    if any(conv.padding):
        x = build(aten.constant_pad_nd.default, x, [p for p in reversed(conv.padding) for _ in range(2)])
    if not conv.plain:
        for i in range(rank):
            x = build(aten.unfold.default, x, 2 + i, conv.dilation[i] * (conv.kernel[i] - 1) + 1, conv.stride[i])
            if conv.dilation[i] > 1:
                x = build(aten.slice.Tensor, x, -1, 0, None, conv.dilation[i])
    order = [0, *range(2, 2 + rank), 1, *range(2 + rank, x.meta["val"].dim())]
    columns = _matrix(build, build(aten.permute.default, x, order), [-1, conv.mnk[2]])
    columns.meta[RECOMPUTED_KEY] = again
    return columns


def _fold(build: Builder, conv: Convolution, g: Node) -> Node:
    """The adjoint of :func:`_columns`: ``[m, k]`` → the input's shape; sums are made in fp32."""
    _, channels, *image = shape(conv.x)
    rank, positions, dtype = len(conv.kernel), shape(conv.node)[2:], val(conv.x).dtype
    if conv.plain:
        return build(aten.permute.default, build(aten.view.default, g, [-1, *positions, channels]),
                     [0, 1 + rank, *range(1, 1 + rank)])
    g = build(aten.view.default, g, [-1, *positions, channels, *conv.kernel])
    g = build(aten.permute.default, g, [0, 1 + rank, *range(1, 1 + rank), *range(2 + rank, 2 + 2 * rank)])
    if any(s < d * (k - 1) + 1 for s, d, k in zip(conv.stride, conv.dilation, conv.kernel, strict=True)):
        g = build.cast(g, torch.float32)
    for i in reversed(range(rank)):
        g = _fold_axis(build, g, 2 + i, image[i], conv.padding[i], conv.stride[i], conv.dilation[i])
    return build.cast(g, dtype)


def _fold_axis(build: Builder, g: Node, axis: int, length: int, padding: int, stride: int, dilation: int) -> Node:
    """Add the taps, the last axis of ``g``, up along ``axis``, which gets ``length``."""
    taps, behind = shape(g)[-1], val(g).dim() - 2 - axis  # axes after `axis` once the taps are gone

    def placed(tap: int) -> Node:
        part = _spread(build, build(aten.select.int, g, -1, tap), axis, stride)
        start = tap * dilation - padding
        end = length - start - shape(part)[axis]
        return build(aten.constant_pad_nd.default, part, [0, 0] * behind + [start, end])

    return reduce(partial(build, aten.add.Tensor), map(placed, range(taps)))


def _spread(build: Builder, x: Node, axis: int, stride: int) -> Node:
    """``stride - 1`` zeros after each element of an axis."""
    if stride == 1:
        return x
    sizes, behind = list(shape(x)), val(x).dim() - 1 - axis
    x = build(aten.unsqueeze.default, x, axis + 1)
    x = build(aten.constant_pad_nd.default, x, [0, 0] * behind + [0, stride - 1])
    return build(aten.view.default, x, [-1, *sizes[1:axis], sizes[axis] * stride, *sizes[axis + 1:]])


def _image(build: Builder, out: Node, like: Node) -> Node:
    """``[m, channels]`` → batch, channels and image, in the layout of ``like``."""
    _, channels, *positions = shape(like)
    out = build(aten.view.default, out, [-1, *positions, channels])
    order = [0, 1 + len(positions), *range(1, 1 + len(positions))]
    return _laid_out(build, build(aten.permute.default, out, order), like)


def _matrix(build: Builder, x: Node, size: list[Any]) -> Node:
    return build(aten.view.default, build.contiguous(x), size)


def _laid_out(build: Builder, x: Node, like: Node) -> Node:
    """``x`` with the strides of ``like``, which is dense."""
    if same_sizes(val(x).stride(), val(like).stride()):
        return x
    strides = [hint(s) for s in val(like).stride()]
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    if order == sorted(order):
        return build.contiguous(x)
    back = [order.index(axis) for axis in range(len(order))]
    x = build.contiguous(build(aten.permute.default, x, order))
    return build(aten.permute.default, x, back)
