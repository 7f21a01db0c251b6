"""Find every forward product, of an activation with a weight or with another activation, and its dgrad and wgrad.

A weight is whatever is computed from parameters alone: a parameter, its transpose, a slice of a fused
one, its cast under autocast, what a collective gathers of it, a parametrisation of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

from quartet.lowering.ir.graph import argument, aten, is_backward, shape, source_of, val
from quartet.lowering.recipe.op_classes import own_class
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.recipe.types import ROLES
from quartet.passes.classify.already import quantised_before
from quartet.passes.classify.aside import projects_input, reads_input, small
from quartet.passes.classify.classify import LOOKUPS, activations_class_of, embeds, op_class_of
from quartet.passes.classify.masks import Masks
from quartet.passes.classify.others import left_alone, plain, without_site
from quartet.passes.find.gradients import attach, not_needed_in_forward
from quartet.passes.find.values import Values
from quartet.passes.flow import Flow
from quartet.passes.graph_pass import graph_pass
from quartet.passes.matrices import MATMULS, canonical, operands
from quartet.passes.naming import module_name, module_of
from quartet.passes.sites import NOTES_KEY, OP_CLASS_KEY, Found, Product
from quartet.passes.state import State


def input_indices(graph: Graph) -> dict[Node, int | None]:
    """Placeholder → index of the dynamo input behind it, through tensor subclasses.

    The body of a region describes no input: there it is the position.
    """
    inputs = graph.find_nodes(op="placeholder")
    if not any("desc" in node.meta for node in inputs):
        return {node: position for position, node in enumerate(inputs)}
    return {node: _described_index(node.meta.get("desc")) for node in inputs}


def _described_index(desc: Any) -> int | None:
    while desc is not None and not hasattr(desc, "idx"):
        desc = getattr(desc, "base", None)
    return getattr(desc, "idx", None)


def parameter_origins(state: State) -> dict[Node, str]:
    """Nodes computed from parameters alone, or chosen by data from a stack of matrices → name of the parameter.

    What is looked up in a table is none of them.
    """
    weights, origin, data = state.config.weights, {}, set()
    index = input_indices(state.gm.graph)
    for node in state.gm.graph.nodes:
        if node.op == "placeholder":
            position = index[node]
            name = None if position is None else weights.get(position)
            if name is not None:
                origin[node] = name
            else:
                data.add(node)
        elif node.op == "call_function" and not is_backward(node):
            inputs = [i for i in node.all_input_nodes if _holds_tensors(i)]
            if _chosen(node) and inputs[0] in origin:
                origin[node] = origin[inputs[0]]
            elif _looked_up(node) or any(i in data for i in inputs):
                data.add(node)
            else:
                named = [origin[i] for i in inputs if i in origin]
                if named:
                    origin[node] = named[0]
    return origin


def _chosen(node: Node) -> bool:
    """Whether the node picks matrices from a stack ``[E, rows, cols]``: the weights of the experts of each token."""
    if node.target is not aten.index.Tensor or len(argument(node, "indices")) != 1:
        return False
    (chooser,) = argument(node, "indices")
    return isinstance(chooser, Node) and len(shape(source_of(node))) == 3 and (
        not val(chooser).dtype.is_floating_point)


def _is_stored(node: Node, origin: Mapping[Node, str]) -> bool:
    """Whether matrices of a batch are those of parameters, as experts are, or of a stack of them with something added:
    not what a layer makes of a parameter of two axes, such as learned queries and positions."""
    waiting, stored = [(node, False)], False
    seen = set(waiting)
    while waiting and not stored:
        at, made = waiting.pop()
        if at.op == "placeholder":
            axes = [size for size in shape(at) if size != 1]
            stored = len(axes) > 2 or len(axes) == 2 and not made
            continue
        above = [(n, made or at.target in MATMULS) for n in at.all_input_nodes if n in origin]
        waiting += [each for each in above if each not in seen]
        seen.update(above)
    return stored


def _looked_up(node: Node) -> bool:
    """Whether the node gathers rows of a table, such as relative positions: activations, whatever the indices are."""
    return node.target in LOOKUPS and len(shape(node.all_input_nodes[0])) < 3


def _holds_tensors(node: Node) -> bool:
    """True of a tensor or several (a split); a size alone does not make a weight into data."""
    value = node.meta.get("val")
    return hasattr(value, "shape") or isinstance(value, (list, tuple))


@graph_pass(writes=Found,
            summary="one site a forward matmul, its dgrad and wgrad by structure, its op class, what of it a mask has "
                    "made")
def find_matmuls(state: State) -> None:
    """Find the sites, and record the products that are none of ours."""
    graph = state.gm.graph
    flow = state.flow = Flow.of(graph, parameter_origins(state))
    masks = Masks({node for node in flow.origin if node.op == "placeholder"})
    products = [node for node in graph.nodes if node.op == "call_function" and node.target in MATMULS]
    backward = [node for node in products if is_backward(node)]
    spare = not_needed_in_forward(graph) if any(is_backward(node) for node in graph.nodes) else set()
    state.leave(*without_site(graph, flow.origin))
    for node in products:
        if not is_backward(node) and node not in spare:
            _find(state, node, flow, masks)
    values = Values(graph)
    early = [node for node in products if node in spare]
    gradients = _attach(state, values, early)
    for node in early:
        if node not in gradients:
            _find(state, node, flow, masks)
    gradients |= _attach(state, values, backward)
    for site in state.sites:
        site = replace(site, op_class=own_class(site) or site.op_class)
        state.advance(replace(site, aside=_aside(state, site, flow) | quantised_before(site)))
    state.leave(*(_unplanned(n, "dgrad") for n in backward if n not in gradients))


def _find(state: State, node: Node, flow: Flow, masks: Masks) -> None:
    """A site for a forward product, or the record of one that multiplies weights alone."""
    site = _site(state, node, flow, masks)
    if site is None:
        state.leave(_unplanned(node, "fprop"))
    else:
        state.advance(site)


def _attach(state: State, values: Values, candidates: list[Node]) -> set[Node]:
    """Give the sites their gradients; returns the candidates that are one."""
    sites, gradients = attach(state.gm.graph, values, state.sites, candidates)
    state.advance(*sites)
    return gradients


def _site(state: State, node: Node, flow: Flow, masks: Masks) -> Found | None:
    (a, b), origin = operands(node), flow.origin
    if a in origin and b in origin:
        return None
    batch = shape(node)[0] if len(shape(node)) == 3 else None
    weights = [n for n in (a, b) if n in origin and (batch is None or _is_stored(n, origin))]
    flipped = a in weights
    (p, q), r = shape(a)[-2:], shape(b)[-1]
    m, n = (r, p) if flipped else (p, r)
    x, w = ((b, True), (a, False)) if flipped else ((a, False), (b, True))
    fqn = module_of(node) if not weights else module_name(origin[w[0]])
    site = Found(index=len(state.sites), fqn=fqn, op_class="linear", x=x, w=w, m=m, n=n, k=q, dtype=val(node).dtype,
                 forward=Product(node, flipped), batch=batch, notes=node.meta.get(NOTES_KEY, ()))
    if not weights:
        op_class = activations_class_of(node, a)
        return replace(site, op_class=op_class, masked=masks.of_activations(node, a, b, op_class))
    if batch is None:
        site = replace(site, masked=masks.of_weight(w[0]))
    if batch is not None or _chosen(canonical(w[0])[0]):
        return replace(site, op_class="grouped")
    config, tied = state.config, embeds(w[0]) or fqn in state.config.tables
    module = _owner(origin[w[0]]) or config.alone if _has_others(state) else ""
    module = f".{module}" if module and config.block else module  # an attention's output is not the model's
    op_class = node.meta.get(OP_CLASS_KEY) or op_class_of(
        site, module, flow, flow.widths | config.widths, tied, fqn in config.parts,
        config.complete and config.layers > 0)
    return replace(site, op_class=op_class, fqn=(module_of(node) if tied else "") or fqn)


def _has_others(state: State) -> bool:
    """Whether the model has more than one layer."""
    return state.config.layers > 1 or len(set(state.flow.layers.values())) > 1


def _owner(parameter: str) -> str:
    """The module, inside of the model, whose weight a parameter is; "" where it is none or the model's own."""
    name = module_name(parameter)
    return "" if name in (parameter, "weight") else name


def _aside(state: State, site: Found, flow: Flow) -> dict[str, str]:
    """Role → why the policy's default leaves a site's product alone."""
    config, name = state.config, flow.origin.get(site.w[0], "")
    found = small(site, config)
    if site.op_class in ("linear", "lm_head", "router") and name and config.inputs:
        index = input_indices(state.gm.graph)
        inputs = {node: config.inputs[at] for node, at in index.items() if at is not None and at in config.inputs}
        why = (reads_input(site, flow, inputs, flow.written | config.written) if _owner(name) else
               projects_input(site, flow, inputs) if _is_stored_in_out(site) and name != "weight" else "")
        found |= dict.fromkeys(ROLES, why) if why else {}
    return found


def _is_stored_in_out(site: Found) -> bool:
    """Whether the parameter that W is a view or a cast of lies as ``[in, out]``."""
    base, flipped = canonical(site.w[0])
    flipped ^= site.w[1]
    while base.target is torch.ops.prims.convert_element_type.default:
        base, turned = canonical(base.all_input_nodes[0])
        flipped ^= turned
    return flipped


def _unplanned(node: Node, role: str) -> MatmulRecord:
    """The record of a product that is not one of a forward product of ours and its gradients."""
    a, _ = operands(node)
    m, n = shape(node)[-2:]
    reason = ("multiplies weights with weights" if role == "fprop" else
              "belongs to no forward product of the graph, or to one of several that are as likely")
    record = left_alone(node, "bmm", role, (m, n, shape(a)[-1]), val(node).dtype, reason)
    return replace(record, batch=plain(prod(shape(node)[:-2])))
