"""Which kept tensors have to stay exact: by what they are, and by what backward does with them."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator

import torch
from torch.fx import Graph, Node

from quartet.kernels.reference.formats.saved import packed_together, saved_bytes_per_element
from quartet.lowering.ir.graph import argument, index_of, maker, shape, source, source_of, val
from quartet.lowering.recipe.types import Saved
from quartet.passes.residuals.boundary import FLOATS, Storage, above_view, dense_order
from quartet.runtime.compat import OpOverload
from quartet.runtime.sizes import hint, same, same_sizes
from quartet.runtime.view_ops import CAST

SMALLEST = 4096  # elements below which encoding does not pay
WORTH = 0.7  # of the bytes, at most

REDUCTIONS = {"sum", "mean", "var", "var_mean", "std", "amax", "amin", "logsumexp", "prod", "native_layer_norm",
              "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "linalg_vector_norm", "norm"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_mm", "_grouped_mm",
            "_scaled_grouped_mm", "addbmm", "mv", "dot"}
DISCRETE = {"eq", "ne", "argmax", "argmin", "topk", "sort", "kthvalue", "mode", "median", "floor", "ceil", "round",
            "trunc", "floor_divide", "remainder", "fmod", "bucketize", "searchsorted", "nonzero", "unique", "isnan",
            "histc", "cummax", "cummin"}


def op_name(node: Node) -> str:
    """``"mm"`` for ``aten.mm.default``; the name of the function for anything else, of an input its own."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def maker_name(node: Node) -> str:
    """The operator that computes a node, also when it is one of several results."""
    return op_name(_maker(node))


def namespace(node: Node) -> str:
    return node.target.namespace if isinstance(node.target, OpOverload) else ""


class Backward:
    """Which nodes of a backward only compute again what forward had.

    Args:
        graph: backward as it was partitioned, or a joint graph. computed: what of the latter backward computes.
    """

    def __init__(self, graph: Graph, computed: Collection[Node] | None = None) -> None:
        self._computed = computed
        self.gradients: set[Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" and node.name.startswith("tangents"):
                self.gradients.add(node)
            elif self._is_inside(node) and any(n in self.gradients for n in node.all_input_nodes):
                self.gradients.add(node)

    def _is_inside(self, node: Node) -> bool:
        return self._computed is None or node in self._computed

    def readers(self, node: Node) -> Iterator[Node]:
        """The nodes that read a tensor, through views and casts."""
        for user in filter(self._is_inside, node.users):
            if above_view(user) is node or user.target is CAST and val(user).dtype in FLOATS:
                yield from self.readers(user)
            else:
                yield user

    def recomputed(self, node: Node) -> Iterator[Node]:
        """Everything that backward computes from a kept tensor and not from a gradient."""
        todo, seen = [node], {node}
        while todo:
            for user in todo.pop().users:
                if user not in seen and user not in self.gradients and user.op == "call_function" and (
                        self._is_inside(user)):
                    seen.add(user)
                    todo.append(user)
                    yield user


def why_exact(storage: Storage, outputs: Iterable[Node], backward: Backward, saved: Saved) -> str | None:
    """Why the tensors of one storage stay as they are; None when they can be encoded."""
    reason = _what_it_is(storage, set(outputs))
    if reason is None:
        reason = _what_reads_it(storage, backward, saved) or _what_follows(storage, backward)
    if reason is None:
        order = dense_order(storage.source)
        if order is None:
            return "it has gaps or overlaps in memory"
        last, together = hint(shape(storage.source)[order[-1]]), packed_together(saved.element)
        if not same(shape(storage.source)[order[-1]] % together, 0):
            return f"a last axis of {last} is no multiple of {together}, which are packed together"
        if saved_bytes_per_element(saved.element, saved.group, last) > WORTH * val(storage.source).element_size():
            return f"groups along a last axis of {last} would take as much"
    return reason


def read_by_attention(storage: Storage, backward: Backward) -> bool:
    """Whether a fused attention reads it in backward, which cannot decode what it reads."""
    return any(_is_attention(reader) for part in storage.parts for reader in backward.readers(part.read))


def _what_it_is(storage: Storage, outputs: set[Node]) -> str | None:
    root, value = storage.root, val(storage.root)
    if value.dtype not in FLOATS:
        return "codes of a quantiser" if namespace(_maker(root)) == "quartet" else "indices, masks or random state"
    if namespace(_maker(root)) == "quartet" and maker(root) is not None and index_of(root) != 0:
        return "scales of a quantiser"
    if "invoke_subgraph" in str(_maker(root).target):
        return "kept by a compiled region, where it was decided"
    if hint(value.numel()) < SMALLEST:
        return f"fewer than {SMALLEST} elements"
    if root in outputs:
        return "an output of the model"
    if _is_attention(_maker(root)) and (maker(root) is None or index_of(root) != 0):
        return "statistics of attention"
    if _is_statistic(root, {}):
        return "statistics"
    return None


def _what_reads_it(storage: Storage, backward: Backward, saved: Saved) -> str | None:
    for reader in {reader: None for part in storage.parts for reader in backward.readers(part.read)}:
        if reader.op == "output":
            continue
        name = op_name(reader)
        if _is_attention(reader):
            if not saved.attention:
                return "read by attention; recipe 'e4m3/16-attention' encodes it"
        elif name in PRODUCTS or namespace(reader) == "quartet":
            return f"operand of {name}: the recipe of that product decides"
        elif namespace(reader) not in ("aten", "prims") and reader.target is not operator.getitem:
            return f"read by {name}, whose needs are unknown"
    return None


def _what_follows(storage: Storage, backward: Backward) -> str | None:
    for node in {node: None for part in storage.parts for node in backward.recomputed(part.read)}:
        name = op_name(node)
        discrete = name in DISCRETE or (name in ("max", "min") and "dim" in str(node.target))
        integer = node.target is CAST and val(node).dtype not in (*FLOATS, torch.bool, torch.float64)
        if discrete or integer:
            return f"backward decides by it ({name})"
        if name in ("exp", "exp2") and _is_shifted(source(node)):
            return "backward exponentiates it: an error would grow with its largest values"
    return None


def _is_shifted(node: Node | None) -> bool:
    """x − statistic, as softmax has it."""
    if node is None or op_name(node) != "sub":
        return node is not None and (node.target is CAST or above_view(node) is not None) and _is_shifted(source(node))
    b = argument(node, "other")
    return isinstance(b, Node) and isinstance(b.meta.get("val"), torch.Tensor) and not same_sizes(shape(b), shape(node))


def _maker(node: Node) -> Node:
    """The operator behind one of several results."""
    return maker(node) or node


def _is_attention(node: Node) -> bool:
    return node.op == "call_function" and "attention" in str(node.target)


def _is_statistic(node: Node, known: dict[Node, bool]) -> bool:
    """Whether a tensor is what a reduction left, or elementwise of such."""
    if node not in known:
        known[node] = False
        if node.op != "call_function":
            return False
        by = _maker(node)
        if op_name(by) in REDUCTIONS:
            known[node] = by is node or not _whole(node, by)
        elif _keeps_elements(node):
            inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)
                      and same(n.meta["val"].numel(), val(node).numel())]
            known[node] = bool(inputs) and all(_is_statistic(n, known) for n in inputs)
    return known[node]


def _whole(node: Node, by: Node) -> bool:
    """Whether one of several results is as large as the operand: the normalised tensor beside its statistics."""
    return same(val(node).numel(), val(source_of(by)).numel())


def _keeps_elements(node: Node) -> bool:
    """Whether a node is a view, a cast or computed element by element."""
    tags = getattr(node.target, "tags", ())
    return above_view(node) is not None or node.target is CAST or torch.Tag.pointwise in tags
