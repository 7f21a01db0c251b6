"""Statistics of every operand and every gradient, recorded by ops beside the graph (``quartet.runtime.inspect``).

Such an op reads what is there anyway, tensors and codes, the seed and the signs, and does what a quantiser does once
more, in the steps that are recorded. So no kernel is split for it, and what it measures is what the product reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.kernels.spec import dtype_name
from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, aten, editing, is_backward, shape, source_of, val
from quartet.lowering.ir.operands import SCALED, Kind, Product, quantizer_of
from quartet.lowering.ir.ops.grouped import TOKENS
from quartet.lowering.ir.ops.inspect import OBSERVE
from quartet.lowering.ir.views import Dequantize, Hadamard, Quantize, QuantizeGroups
from quartet.lowering.recipe.types import ROLES, Gemm, Recipe, Rotation
from quartet.passes.graph_pass import graph_pass
from quartet.passes.inspect.originals import Originals
from quartet.passes.inspect.watching import Tensors, after, layers_of, token_of
from quartet.passes.matrices import Operand
from quartet.passes.quantize.layout import multiple_of
from quartet.passes.quantize.quantize import OPERANDS
from quartet.passes.recipe.gated import gated_activation
from quartet.passes.sites import SITE_KEY, Found, Quantized
from quartet.passes.state import State
from quartet.runtime.inspect import program
from quartet.runtime.sizes import same_sizes

_FAR = 40  # nodes between a layer and the two whose results it multiplies

@dataclass
class _Op:
    """What becomes one op: its program, the tensors that it reads, and the nodes after which it stands."""

    tensors: Tensors = field(default_factory=Tensors)
    lines: list[Any] = field(default_factory=list)

    def matrix(self, operand: Operand) -> program.Matrix:
        node, flipped = operand
        return program.Matrix(self.tensors.at(node), flipped)


@graph_pass(reads=Quantized, unplanned=True,
            summary="statistics of operands and gradients are recorded, for the option `inspect`")
def observe(state: State) -> None:
    """Put an op beside each product, where the option asks for it and the graph trains."""
    config, token = state.config.inspection, token_of(state)
    if config is None or token is None or not any(is_backward(node) for node in state.gm.graph.nodes):
        return
    with editing(state.gm):
        for made in (*_operands(state), *_gradients(state), *_what_if(state, config.what_if), *_alignments(state)):
            build = after(state, made.tensors.nodes)
            build(OBSERVE, token, made.tensors.nodes, program.written(made.lines))


def _operands(state: State) -> Iterator[_Op]:
    """An op for each product of the graph, of the quantisers that it is the first to read."""
    layers = layers_of(state)
    readers: dict[Node, list[tuple[Node, str]]] = {}
    for node in state.gm.graph.nodes:
        if node.target in SCALED and SITE_KEY in node.meta:
            index, role = node.meta[SITE_KEY]
            for letter, operand in zip(OPERANDS[role], Product.of(node).operands, strict=True):
                made = quantizer_of(operand.codes)
                if made is not None:
                    readers.setdefault(made.node, []).append((node, f"{layers[index]} {role} {letter}"))
    by_product: dict[Node, list[Node]] = {}
    for quantizer, users in readers.items():
        by_product.setdefault(users[0][0], []).append(quantizer)
    for quantizers in by_product.values():
        op = _Op()
        for quantizer in quantizers:
            names = tuple(dict.fromkeys(name for _, name in readers[quantizer]))
            op.lines.append(_operand(op.tensors, quantizer, names, Product.of(readers[quantizer][0][0]).kind))
        yield op


def _operand(tensors: Tensors, quantizer: Node, names: tuple[str, ...], kind: Kind) -> program.Operand:
    if quantizer.target is QuantizeGroups.op:
        of_groups = QuantizeGroups.of(quantizer)
        made = Quantize(of_groups.x, of_groups.spec)
    else:
        made = Quantize.of(quantizer)
    ends = kind.ends if kind.over_tokens else None
    x, rotation, signs = made.x, 0, None
    if (rotated := Hadamard.into(x)) is not None:
        x, rotation, signs = rotated.x, rotated.n, rotated.signs
    x, stored = _stored(tensors, x)
    return program.Operand(names, tensors.at(x), str(made.spec), rotation, tensors.maybe(signs),
                           tensors.maybe(made.seed), made.site, tensors.maybe(made.amax), tensors.maybe(ends), stored)


def _stored(tensors: Tensors, x: Node) -> tuple[Node, program.Stored | None]:
    """The codes that ``x`` is dequantised from, so that nothing dequantises them in each step."""
    node, turned, cols = x, False, None
    if node.target is aten.permute.default and len(shape(node)) == 2:
        node, turned = source_of(node), True
    if node.target is aten.slice.Tensor and isinstance(shape(node)[1], int):
        node, cols = source_of(node), shape(node)[1]
    if node.target is not ir.DEQUANTIZE:
        return x, None
    made = Dequantize.of(node)
    return made.codes, program.Stored(tensors.at(made.scales), str(made.spec), dtype_name(made.dtype),
                                      tensors.maybe(made.amax), cols, turned)


def _gradients(state: State) -> Iterator[_Op]:
    """Of each layer what forward keeps of X and W, and each gradient that is a node of its own."""
    originals, layers = Originals(state), layers_of(state)
    for site in state.sites:
        seen = originals.seen(site)
        if len(seen.operands) < len("xwe") or not seen.gradients:
            continue
        kept = _Op()
        kept.lines.append(program.Keep(str(site.index), *(kept.matrix(seen.operands[letter]) for letter in "xw")))
        yield kept
        for role, gradient in seen.gradients.items():
            made = _Op()
            made.lines.append(program.Product(f"{layers[site.index]} {role}", str(site.index), role == "wgrad",
                                              made.matrix(seen.operands["e"]), made.matrix(gradient),
                                              made.tensors.maybe(seen.ends)))
            yield made


def _single(state: State) -> Iterator[Found]:
    return (site for site in state.sites if site.batch is None and site.groups is None)


def _what_if(state: State, recipes: tuple[Recipe, ...]) -> Iterator[_Op]:
    """An op for each tensor that the layers read: X that several read is one."""
    signs, originals, layers = _Signs(state), Originals(state), layers_of(state)
    found: dict[tuple[str, Operand, Node | None], list[str]] = {}
    for site in state.sites if recipes else ():
        seen = originals.seen(site)
        for letter, operand in seen.operands.items():
            found.setdefault((letter, operand, seen.ends), []).append(layers[site.index])
    for (letter, operand, ends), names in found.items():
        made = _Op()
        matrix = made.matrix(operand)
        quantisers = [one for recipe in recipes
                      for one in _quantisers(recipe, letter, made.tensors, signs, grouped=ends is not None)]
        if quantisers:
            tokens_end = None if letter == "w" else ends
            made.lines.append(program.WhatIf(tuple(names), matrix, tuple(quantisers), made.tensors.maybe(tokens_end)))
            yield made


def _quantisers(recipe: Recipe, letter: str, tensors: Tensors, signs: _Signs,
                grouped: bool) -> Iterator[program.Quantiser]:
    """What a recipe does to a tensor, product by product."""
    gemms: dict[str, Gemm] = {role: gemm for role in ROLES if (gemm := getattr(recipe, role)) is not None}
    room = multiple_of(gemms, TOKENS) if grouped else 1
    for role, gemm in gemms.items():
        if letter not in OPERANDS[role]:
            continue
        at_b = OPERANDS[role][1] == letter
        operand, first = gemm.b if at_b else gemm.a, None
        if operand.source == "saved" and recipe.fprop is not None:
            spec = (recipe.fprop.a if letter == "x" else recipe.fprop.b).spec
            first = str(spec), *signs.of(recipe.fprop.rotation, tensors)
        if operand.spec is None and first is None:
            continue
        rotation = signs.of(gemm.rotation, tensors)
        yield program.Quantiser(f"{role} {letter} {recipe.name}", None if operand.spec is None else str(operand.spec),
                                *rotation, role == "wgrad" or (role, letter) == ("dgrad", "w"), first, room)


class _Signs:
    """The signs of rotations, made at the start of the graph. Random ones are those of one fixed choice."""

    def __init__(self, state: State) -> None:
        self._state, self._made = state, dict[tuple[tuple[int, ...], torch.device], Node]()

    def of(self, rotation: Rotation | None, tensors: Tensors) -> tuple[int, int | None]:
        """Size of a rotation, 0 for none, and where its signs are among the tensors."""
        if rotation is None or rotation.signs == "none":
            return 0 if rotation is None else rotation.n, None
        signs = rotation.signs if isinstance(rotation.signs, tuple) else (FLAT_SIGNS * 4)[:rotation.n]
        return rotation.n, tensors.at(self._node(tuple(signs), val(tensors.nodes[0]).device))

    def _node(self, signs: tuple[int, ...], device: torch.device) -> Node:
        if (signs, device) not in self._made:
            first = next(node for node in self._state.gm.graph.nodes if node.op != "placeholder")
            build = Builder(self._state.gm.graph, like=first, before=first, backward=False)
            self._made[signs, device] = build(ir.FIXED_SIGNS, list(signs), device)
        return self._made[signs, device]


def _alignments(state: State) -> Iterator[_Op]:
    """Of each gated activation the weights of the two layers that it is made of."""
    originals, layers = Originals(state), layers_of(state)
    products = {out: site for site in _single(state) if (out := originals.now(site.forward.node)) is not None}
    seen = set[tuple[int, ...]]()
    for site in _single(state):
        x = originals.of(site, "x")
        gated = x is not None and gated_activation(replace(site, x=x)) is not None
        branches = _branches(x[0], products) if x is not None and gated else []
        weights = [w for branch in branches if (w := originals.of(branch, "w")) is not None]
        key = tuple(branch.index for branch in branches)
        if len(weights) == 2 and key not in seen and same_sizes(*(shape(node) for node, _ in weights)):
            seen.add(key)
            made = _Op()
            gate, linear = map(made.matrix, weights)
            made.lines.append(program.Alignment(tuple(layers[branch.index] for branch in branches), gate, linear))
            yield made


def _branches(x: Node, products: dict[Node, Found]) -> list[Found]:
    """The layers whose results ``x`` is computed from, with nothing but elementwise work between."""
    found, waiting, seen = dict[int, Found](), [x], set[Node]()
    while waiting and len(seen) < _FAR:
        node = waiting.pop()
        if node in products:
            found[products[node].index] = products[node]
        elif node not in seen and not is_backward(node):
            seen.add(node)
            waiting += node.all_input_nodes
    return [found[index] for index in sorted(found)]
