"""Decide what fprop leaves behind for backward.

Packed codes, scales and masks are results of opaque ops, which the partitioner never recomputes, and no
backward node reads the original X: so they are what is kept. With ``recompute="gemm"`` the output of a
GEMM is not kept either where backward has the codes of both operands anyway: it runs the product again. Selective
checkpointing that saves the output of such a GEMM has the codes kept, which are fewer bytes than that output. Under a
budget of bytes (option ``memory``) it is chosen for each product whether its output is kept, and for each parameter
whether its codes are, or backward quantises it again to the same (``choose``).
Where X itself is to be made again in backward, as the columns of a convolution are, so is its quantised form.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering import ir
from quartet.lowering.ir.graph import SAVED, Builder, aten, editing, is_backward, results, source_of
from quartet.lowering.ir.operands import Product, Quantizer, quantizer_of, readers
from quartet.lowering.targets.chains import REUSABLE
from quartet.passes.find.find_matmuls import input_indices
from quartet.passes.graph_pass import graph_pass
from quartet.passes.quantize.quantize import quantize_again
from quartet.passes.residuals.choose import choose
from quartet.passes.sites import SITE_KEY, Quantized, QuantizedOperand
from quartet.passes.state import State


@graph_pass(reads=Quantized, optional=True, summary="what forward leaves for backward")
def save(state: State) -> None:
    """Tag the fprop GEMMs whose output backward should compute again."""
    if not any(is_backward(node) for node in state.gm.graph.nodes):
        return
    sites = {site.index: site for site in state.at(Quantized)}
    for site in sites.values():
        if site.recomputes_x and "x" in site.operands:
            _make_again(site.operands["x"].codes)
    candidates = {}
    for node in state.gm.graph.find_nodes(op="call_function", target=ir.SCALED_MM):
        index, role = node.meta[SITE_KEY]
        site, asked = sites[index], node.meta.get("recompute")
        if role != "fprop" or not keeps_codes(site) or not (asked is None or asked in SAVED):
            continue
        if asked is None and _is_open(state, site):
            candidates[node] = site
        elif (state.config.recompute or site.recipe.recompute) == "gemm":
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            if asked is not None:
                _keep_codes(node)
    if state.config.memory is not None:
        weights = _weights(state, sites)
        chosen = choose(state, candidates, weights)
        for node in (node for node in chosen if node not in weights):
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        if any(node in weights for node in chosen):
            with editing(state.gm):
                for node in (node for node in chosen if node in weights):
                    _quantize_in_backward(weights[node])


def _is_open(state: State, site: Quantized) -> bool:
    """Whether it is to be chosen if backward runs the product of a site again."""
    memory, recompute = state.config.memory, state.config.recompute
    if memory is None or recompute == "gemm" or (recompute == "none" and memory.kind != "fastest"):
        return False
    return not memory.lossless or site.recipe.recompute == "gemm"


def _weights(state: State, sites: Mapping[int, Quantized]) -> dict[Node, list[Node]]:
    """Codes of parameters as they are, that dgrads read as a tensor of their own, and these; backward could make them.

    None where nothing is to become slower, or the user says what runs again."""
    memory, found = state.config.memory, dict[Node, list[Node]]()
    if memory is None or memory.lossless or state.config.recompute is not None:
        return found
    index = input_indices(state.gm.graph)
    for node in state.gm.graph.find_nodes(op="call_function", target=ir.SCALED_MM):
        number, role = node.meta[SITE_KEY]
        kernel, operand = sites[number].decisions[role].kernel, Product.of(node).b
        made = quantizer_of(operand.codes) if role == "dgrad" and kernel is not None and kernel.row_major else None
        if made is None or index.get(made.view.x) not in state.config.weights or "recompute" in made.node.meta:
            continue
        if not (is_backward(made.node) or operand.spec.stochastic or operand.spec.takes_amax):
            found.setdefault(results(made.node)[0], []).append(node)
    return {codes: products for codes, products in found.items() if _read_it_alone(products)}


def _read_it_alone(products: list[Node]) -> bool:
    """Whether no other product reads a quantiser's codes as these do, which all read them alike.

    Where forward does, of this weight or of one that is used in both orders, what runs again needs the tensor."""
    made = Quantizer.of(Product.of(products[0]).b.codes)
    alike = {product for product in readers(made.node) for operand in Product.of(product).operands
             if (found := quantizer_of(operand.codes)) and (found.node, found.layout) == (made.node, made.layout)}
    return alike == set(products)


def _quantize_in_backward(products: list[Node]) -> None:
    """Let products of backward read codes of a weight that are made there, once for all."""
    first, operand = products[0], Product.of(products[0]).b
    made = QuantizedOperand(operand.codes, operand.scales, None, operand.spec)
    at = Builder(first.graph, like=first, before=first, backward=True)
    first_made = Quantizer.of(operand.codes)
    again = quantize_again(at, first_made.view.x, made)
    if REUSABLE in first_made.node.meta:  # so that both have the scale that forward finds
        Quantizer.of(again.codes).node.meta[REUSABLE] = first_made.node.meta[REUSABLE]
    for product in products:
        kept = Product.of(product).b
        product.replace_input_with(kept.codes, again.codes)
        product.replace_input_with(kept.scales, again.scales)


def _keep_codes(product: Node) -> None:
    """Take what a product multiplies out of the user's checkpointing, so that it is kept as it is without."""
    for operand in Product.of(product).operands:
        made = quantizer_of(operand.codes)
        for node in (operand.codes, operand.scales) if made is None else (made.node, *made.node.users):
            for key in ("recompute", "ac_graph_id"):
                node.meta.pop(key, None)


def _make_again(codes: Node) -> None:
    """Let backward quantise X again, from what it makes X of."""
    made = Quantizer.of(codes)
    chain = [*made.node.users, made.node]
    while chain[-1].target in (ir.QUANTIZE, ir.HADAMARD, aten.constant_pad_nd.default):
        chain.append(source_of(chain[-1]))
    for node in chain:
        node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)


def keeps_codes(site: Quantized) -> bool:
    """Whether backward reads the codes of both operands of fprop, and finds them saved."""
    dgrad, wgrad = site.active("dgrad"), site.active("wgrad")
    return (dgrad is not None and wgrad is not None and dgrad.b.source == wgrad.b.source == "saved"
            and site.recipe.keep_weights and not site.recomputes_x)
