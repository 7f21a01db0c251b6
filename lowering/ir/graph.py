"""Helpers over joint graphs: directions, shapes, and inserting nodes that carry the right metadata."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, reduce
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering.ir.values import value_of
from quartet.runtime.compat import OpOverload, detect_fake_mode, keeps_dead_draws, trace
from quartet.runtime.sizes import same, same_sizes

aten = torch.ops.aten

_ARITHMETIC = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "Mod": operator.mod,
               "PythonMod": operator.mod}  # by the class of a size's expression

FORWARD = "is_forward"
BACKWARD = "must_be_in_backward"
MODULE_KEY = "quartet_module"  # node.meta key: the name of the module that computes the node
BY_HAND = "quartet_by_hand"  # of nodes that a custom Function's backward computes: their seq_nr says nothing
_INHERITED = ("seq_nr", "nn_module_stack", "fwd_nn_module_stack", "stack_trace", "recompute", "ac_graph_id", "custom",
              "autograd_backward", "source_fn_stack", MODULE_KEY, BY_HAND)


SAVED = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def keep_as(node: Node, like: Node) -> Node:
    """Give ``node``, which computes what ``like`` did, its place in the user's activation checkpointing."""
    if "recompute" in like.meta and not is_backward(node):
        node.meta["recompute"] = like.meta["recompute"]
    return node


def is_backward(node: Node) -> bool:
    """Whether a node runs in backward (:mod:`quartet.passes.find.tag`). Graphs without one carry no tags: all is
    forward.

    Inputs go by their name, as in the partitioner: in a region's graph autograd tags those that it has touched.
    """
    if node.op == "placeholder":
        return node.name.startswith("tangents")
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def val(node: Node) -> torch.Tensor:
    """The fake tensor of a node."""
    return node.meta["val"]


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(val(node).shape)


@cache
def parameters(op: OpOverload) -> tuple[tuple[str, Any], ...]:
    """Names of an operator's arguments in order, each with its default; None where there is none."""
    return tuple((a.name, a.default_value) for a in op._schema.arguments)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by their names, also those that a node leaves to their defaults.

    Raises:
        TypeError: the node calls no operator.
    """
    if not isinstance(node.target, OpOverload):
        raise TypeError(f"{node.format_node()} calls no operator")
    expected = parameters(node.target)
    return {**dict(expected), **dict(zip((name for name, _ in expected), node.args, strict=False)), **node.kwargs}


def argument(node: Node, name: str) -> Any:
    """One of :func:`arguments`."""
    return arguments(node)[name]


def set_argument(node: Node, name: str, value: Any) -> None:
    """Give an argument, by name, another value than a node or a list of them."""
    names = [known for known, _ in parameters(node.target)]
    if name in node.kwargs or names.index(name) >= len(node.args):
        node.update_kwarg(name, value)
    else:
        node.update_arg(names.index(name), value)


def remaining(node: Node) -> tuple[Any, ...]:
    """What a call takes by position behind its first argument."""
    return node.args[1:]


def source(node: Node) -> Node | None:
    """The first argument of a call, where it is a node: what a view shows, what a cast or a sum is made of."""
    first = node.args[0] if node.op == "call_function" and node.args else None
    return first if isinstance(first, Node) else None


def source_of(node: Node) -> Node:
    """:func:`source` of a node that has one.

    Raises:
        TypeError: the node has none.
    """
    found = source(node)
    if found is None:
        raise TypeError(f"{node.format_node()} is made of no node")
    return found


def maker(item: Node) -> Node | None:
    """The operation of which a node is one of several results; None of any other node."""
    return source(item) if item.target is operator.getitem else None


def index_of(item: Node) -> int:
    """Which of several results a node is."""
    return int(item.args[1])  # type: ignore[arg-type]


def results(node: Node) -> dict[int, Node]:
    """The results of an operation with several, those that something reads."""
    return {index_of(user): user for user in node.users if maker(user) is node}


def hand_over(node: Node, to: Sequence[Node]) -> None:
    """What reads the results of ``node`` reads those in ``to`` instead."""
    for item in list(node.users):
        item.replace_all_uses_with(to[index_of(item)])


def outputs(graph: Graph) -> Sequence[Any]:
    """What a graph returns; one inside of a higher-order operator (a mask of FlexAttention) may return a node."""
    returned: Any = graph.output_node().args[0]
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def fake_mode(graph: Graph) -> Any:
    """The fake mode under which the graph was traced."""
    inputs = (n.meta.get("val") for n in graph.nodes if n.op == "placeholder")
    return detect_fake_mode(next(([v] for v in inputs if isinstance(v, torch.Tensor)), []))


def _fake_args(args: Any) -> Any:
    return torch.fx.node.map_arg(args, lambda n: n.meta["val"])


class Builder:
    """Inserts call_function nodes before an anchor, in one direction, with metadata of a model node.

    Args:
        graph: the joint graph.
        like: node whose module stack, seq_nr, checkpoint tags … the new nodes inherit.
        before: where they go.
            The choice to save its result is not inherited but left to :func:`keep_as`: it stands for one node.
        backward: direction of the new nodes. A backward node is pinned there: what no tangent reaches
            would otherwise be hoisted into the forward and its result saved.
    """

    def __init__(self, graph: Graph, like: Node, before: Node, backward: bool) -> None:
        self.graph, self.before = graph, before
        self.mode = fake_mode(graph)
        self.meta = {k: like.meta[k] for k in _INHERITED if k in like.meta}
        if backward:
            for key in ("recompute", "ac_graph_id"):
                self.meta.pop(key, None)
        if self.meta.get("recompute") in SAVED:
            self.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        self.meta["partitioner_tag"] = BACKWARD if backward else FORWARD

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        node.meta["val"] = value_of(self.mode, target, _fake_args(args), _fake_args(kwargs))
        return node

    def item(self, node: Node, index: int) -> Node:
        """``node[index]`` of an op with several results."""
        return self(operator.getitem, node, index)

    def again(self, node: Node, replaced: Callable[[Node], Node]) -> Node:
        """The call that a node is, of what ``replaced`` gives for its operands."""
        assert callable(node.target)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), replaced)
        return self(node.target, *args, **kwargs)

    def transpose(self, node: Node) -> Node:
        return self(aten.permute.default, node, [1, 0])

    def permuted_back(self, node: Node, order: Sequence[int]) -> Node:
        """What has become ``node`` by a permutation of its axes."""
        return self(aten.permute.default, node, sorted(range(len(order)), key=order.__getitem__))

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if val(node).dtype == dtype else self(torch.ops.prims.convert_element_type.default, node, dtype)

    def contiguous(self, node: Node) -> Node:
        """``node``, copied unless its strides are those of a contiguous tensor."""
        packed = torch.empty_like(val(node), memory_format=torch.contiguous_format)
        if same_sizes(val(node).stride(), packed.stride()):
            return node
        return self(aten.clone.default, node, memory_format=torch.contiguous_format)

    def columns(self, node: Node, cols: Any) -> Node:
        """The first ``cols`` columns of a 2-D node."""
        if same(shape(node)[1], cols):
            return node
        return self(aten.slice.Tensor, node, 1, 0, self.size(cols))

    def padded(self, node: Node, rows: int = 1, cols: int = 1) -> Node:
        """Matrices with zeros below and to the right, as far as the next multiples of ``rows`` and ``cols``."""
        below, right = (self._missing(size, to) for size, to in zip(shape(node)[-2:], (rows, cols), strict=True))
        return node if below == right == 0 else self(aten.constant_pad_nd.default, node, [0, right, 0, below])

    def _missing(self, size: Any, multiple: int) -> Any:
        """How much ``size`` lacks to a multiple; for a symbolic one the node that computes it."""
        if isinstance(size, int):
            return -size % multiple
        if multiple == 1:
            return 0
        held = self.size(size)
        whole = self(operator.mul, self(operator.floordiv, self(operator.add, held, multiple - 1), multiple), multiple)
        return self(operator.sub, whole, held)

    def size(self, value: Any) -> Any:
        """A static size as it is; a symbolic one as the graph node that holds it, or that computes it of what is held.

        Raises:
            RuntimeError: nothing before the anchor holds it or what it is made of.
        """
        if not isinstance(value, torch.SymInt):
            return value
        held = self._held(value, lambda size: size.node.expr == value.node.expr) or self._computed(value)
        held = held or self._held(value, lambda size: same(size, value))
        if held is None:
            raise RuntimeError(f"size {value} is not held by any node of the graph")
        return held

    def _held(self, value: torch.SymInt, equals: Callable[[torch.SymInt], bool]) -> Node | None:
        tensors = []
        for node in self.graph.nodes:
            if node is self.before:
                break
            held = node.meta.get("val")
            if isinstance(held, torch.SymInt) and equals(held):
                return node
            if isinstance(held, torch.Tensor):
                tensors.append(node)
        for node in tensors:
            for dim, size in enumerate(shape(node)):
                if isinstance(size, torch.SymInt) and equals(size):
                    return self(aten.sym_size.int, node, dim)
        return None

    def _computed(self, value: torch.SymInt) -> Node | None:
        """A sum, product, quotient or remainder of sizes that are held."""
        combine = _ARITHMETIC.get(type(value.node.expr).__name__)
        if combine is None:
            return None
        environment = value.node.shape_env
        parts = [int(part) if part.is_Integer else environment.create_symintnode(part, hint=None)
                 for part in value.node.expr.args]
        try:
            return reduce(partial(self, combine), [self.size(part) for part in parts])
        except RuntimeError:
            return None


def inline(build: Builder, gm: torch.fx.GraphModule, inputs: list[Node]) -> list[Node]:
    """Copy a traced graph of aten ops to where ``build`` inserts; returns its results."""
    copied: dict[Node, Node] = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), copied.__getitem__)
            copied[node] = build(node.target, *args, **kwargs)
    return [copied[node] for node in outputs(gm.graph)]


class Traced:
    """Functions of tensors as aten graphs, each traced once for inputs of one layout."""

    def __init__(self) -> None:
        self._graphs: dict[Any, torch.fx.GraphModule] = {}

    def __call__(self, build: Builder, function: Callable[..., Any], inputs: list[Node], *key: Hashable) -> list[Node]:
        """The nodes of ``function(*inputs)`` where ``build`` inserts; functions of one ``key`` are the same."""
        values = [val(node) for node in inputs]
        if any(isinstance(size, torch.SymInt) for value in values for size in value.shape):
            return inline(build, trace(function, values), inputs)
        layouts = tuple((tuple(value.shape), value.stride(), value.dtype, value.device) for value in values)
        if (key, layouts) not in self._graphs:
            self._graphs[key, layouts] = trace(function, values)
        return inline(build, self._graphs[key, layouts], inputs)


@contextmanager
def editing(gm: torch.fx.GraphModule) -> Iterator[Graph]:
    """Edit a graph, then see that it is sound, drop dead nodes and recompile."""
    yield gm.graph
    draws = keeps_dead_draws()  # as PyTorch decides
    # lints the graph first; what somebody reads is not asked for its effects, which takes far longer
    gm.graph.eliminate_dead_code(lambda node: bool(node.users) or node.is_impure(draws))
    gm.recompile()


def pull(node: Node, place: Node) -> None:
    """Move a node, and what it is made from, to before ``place`` where it comes later, in the order that they have."""
    later, waiting = set[Node](), [node]
    while waiting:
        made = waiting.pop()
        if made not in later and not made < place:
            later.add(made)
            waiting += made.all_input_nodes
    for made in sorted(later):
        place.prepend(made)


def replace_all(old: Node, new: Node, keep: tuple[Node, ...] = ()) -> None:
    """Every user of ``old`` reads ``new`` instead, except the nodes in ``keep`` and ``new`` itself."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and user not in keep)
