"""By how many tokens each layer of a model is decided: those of the first batch that it was trained with.

They are what it is priced for, and whether its wgrad contracts less than a block. They are read from dynamo's graph and
not by the passes, which do not run where a cache answers; a symbolic number counts as it was then. A graph without a
backward that comes first is decided by its own tokens, and that is remembered too, so that training can say where it
decides otherwise. Memory is by module, weakly, and lasts as long as the process.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any
from weakref import finalize, ref

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quartet.model.fused import encoder_layer
from quartet.passes.naming import module_name
from quartet.runtime.sizes import hint

_PRODUCTS = ("linear", "matmul", "mm", "addmm", "einsum")
_HIGHER_ORDER = ("tag_activation_checkpoint", "invoke_subgraph")


@dataclass
class Tokens:
    """Of one model: module → tokens, as first trained and as evaluated before that."""

    trained: dict[str, int] = field(default_factory=dict)
    guessed: dict[str, int] = field(default_factory=dict)


_remembered: dict[int, tuple[ref[nn.Module], Tokens]] = {}  # by id: a module need not be hashable


def tokens_for(gm: GraphModule, weights: Mapping[int, str], model: nn.Module | None, training: bool,
               remember: bool = True) -> Tokens:
    """What the layers of a graph are decided by; in training, what it has is remembered where nothing is yet.

    Args:
        weights: index of an input of the graph → name of the parameter.
        model: whose parameters they are; None remembers nothing.
        training: whether the graph will have a backward.
        remember: False only reads, for a compilation that is looked at and thrown away.
    Returns:
        Of the graph's layers the tokens that they were first trained with, or else those of the graph; and in training
        those that were guessed before.
    """
    seen = tokens_of(gm, weights)
    known = _known(model)
    new = {name: count for name, count in seen.items() if name not in known.trained}
    found = Tokens({name: known.trained.get(name, count) for name, count in seen.items()})
    if training:
        found.guessed = {name: known.guessed[name] for name in new if name in known.guessed}
    if remember and model is not None:
        (known.trained if training else known.guessed).update(
            {name: count for name, count in new.items() if training or name not in known.guessed})
        if id(model) not in _remembered:
            finalize(model, _remembered.pop, id(model), None)
        _remembered[id(model)] = ref(model), known
    return found


def _known(model: nn.Module | None) -> Tokens:
    reference, known = _remembered.get(id(model), (None, Tokens()))
    return known if reference is not None and reference() is model else Tokens()


def tokens_of(gm: GraphModule, weights: Mapping[int, str]) -> dict[str, int]:
    """Module → rows of its largest product with a matrix of weights, in dynamo's graph; none of an empty one."""
    found: dict[str, int] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for name, count in _products(gm, {node: weights[i] for i, node in enumerate(placeholders) if i in weights}):
        found[module_name(name)] = max(count, found.get(module_name(name), 0))
    return {name: count for name, count in found.items() if count > 0}


def _products(gm: GraphModule, names: Mapping[Node, str]) -> Iterator[tuple[str, int]]:
    """(parameter, rows) of each product X · W, rows² = elements of X · elements of Y / elements of W."""
    names = dict(names)
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        operation, inputs = _operation(node), node.all_input_nodes
        known = [i for i in inputs if i in names]
        if inputs and len(known) == len(inputs):
            names[node] = names[known[0]]  # a view of it, a cast, a parametrisation of several
        elif operation in _HIGHER_ORDER:
            yield from _inner(gm, node, names)
        elif node.target is encoder_layer:
            x = _value(inputs[0])
            yield from ((names[w], hint(x.numel()) // hint(x.shape[-1])) for w in known if len(_shape(w)) == 2)
        elif operation in _PRODUCTS:
            w = next((i for i in known if len(_shape(i)) == 2), None)
            x = next((i for i in inputs if i is not w and len(_shape(i)) >= 2 and i not in names), None)
            if w is not None and x is not None:
                sizes = [hint(_value(at).numel()) for at in (x, node, w)]
                yield names[w], isqrt(sizes[0] * sizes[1] // max(sizes[2], 1))


def _inner(gm: GraphModule, node: Node, names: Mapping[Node, str]) -> Iterator[tuple[str, int]]:
    """The products in the body of a checkpointed or a compiled region."""
    body = next((a for a in node.args if isinstance(a, Node) and a.op == "get_attr"), None)
    part = None if body is None else getattr(gm, str(body.target), None)
    if isinstance(part, GraphModule):
        operands = [a for a in node.args if a is not body and not isinstance(a, str)]
        inputs = part.graph.find_nodes(op="placeholder")
        yield from _products(part, {at: names[a] for at, a in zip(inputs, operands, strict=False)
                                    if isinstance(a, Node) and a in names})


def _operation(node: Node) -> str:
    if node.target is operator.matmul:
        return "matmul"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _shape(node: Node) -> tuple[Any, ...]:
    value = _value(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
