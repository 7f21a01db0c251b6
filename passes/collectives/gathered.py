"""Put the codes that were gathered in place of the quantisers that would make them.

    Q(H·W) on each rank = the rows of Q(H·W) that FSDP2 has gathered, where Q is row-local or has its scale given

A weight that is gathered as codes stands in a graph as ``quartet::gathered_weight``, and forward and the transposes of
backward quantise it or start from what was quantised. Afterwards nothing of the matrix may be left: there is none.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from quartet.lowering import ir
from quartet.lowering.ir.graph import Builder, aten, editing, is_backward, replace_all, results
from quartet.lowering.ir.views import FixedSigns, GatheredWeight, Hadamard, Quantize
from quartet.passes.graph_pass import graph_pass
from quartet.passes.matrices import canonical
from quartet.passes.quantize.quantize import saved_bytes
from quartet.passes.sites import Found, Planned, Quantized
from quartet.passes.state import State


class GatheredAsCodes(ValueError):
    """A weight that data parallelism gathers as codes is read as something else."""


@graph_pass(reads=Quantized, writes=Quantized,
            summary="codes that data parallelism has gathered, in place of what would quantise the weight")
def gathered(state: State) -> None:
    """Replace the quantisers of gathered weights. Raises GatheredAsCodes where one is read otherwise."""
    graph = state.gm.graph
    if not graph.find_nodes(op="call_function", target=GatheredWeight.op):
        return
    planes: dict[Node, Node] = {}
    with editing(state.gm):
        for node in graph.find_nodes(op="call_function", target=ir.QUANTIZE):
            planes |= _replace(node)
        _note(state, planes)
        for node in graph.find_nodes(op="call_function", target=ir.AMAX):
            x, _ = canonical(node.all_input_nodes[0])
            if x.target is GatheredWeight.op and (amax := GatheredWeight.of(x).amax) is not None:
                node.replace_all_uses_with(amax)
    for node in graph.find_nodes(op="call_function", target=GatheredWeight.op):
        raise GatheredAsCodes(_complaint(state, node))


def _note(state: State, planes: dict[Node, Node]) -> None:
    """Tell the sites what their weights are now; an input of the graph is not kept for backward."""
    for site in state.at(Quantized):
        w = site.operands.get("w")
        if w is not None and w.codes in planes:
            mask = w.mask and planes[w.mask]
            w = replace(w, codes=planes[w.codes], scales=planes[w.scales], mask=mask)
            operands = {**site.operands, "w": w}
            state.advance(replace(site, operands=operands, saved_bytes=saved_bytes(site, operands["x"], w)))


def _replace(quantizer: Node) -> dict[Node, Node]:
    """The planes of a gathered weight for the results of a quantiser that would make the same: result → plane."""
    made = Quantize.of(quantizer)
    x, rotation, signs = made.x, 0, None
    if (rotated := Hadamard.into(x)) is not None:
        x, rotation = rotated.x, rotated.n
        if rotated.signs is not None:
            if rotated.signs.target is not FixedSigns.op:
                return {}
            signs = list(FixedSigns.of(rotated.signs).signs)
    x, flipped = canonical(x)
    if x.target is not GatheredWeight.op or flipped and not made.spec.commutes_with_transpose:
        return {}
    weight = GatheredWeight.of(x)
    own = None if weight.signs is None else list(weight.signs)
    if (weight.spec, weight.rotation, own) != (made.spec, rotation, signs):
        return {}
    planes = (_turned(quantizer, weight.codes) if flipped else weight.codes, weight.scales, weight.mask)
    found = {item: plane for index, item in results(quantizer).items() if (plane := planes[index]) is not None}
    for item, plane in found.items():
        item.replace_all_uses_with(plane)
    return found


def _turned(quantizer: Node, codes: Node) -> Node:
    """The transpose of codes, where a quantiser is; what turns its results back reads them as they are."""
    (item,) = (item for index, item in results(quantizer).items() if index == 0)
    for user in [user for user in item.users if user.target is aten.permute.default]:
        replace_all(user, codes)
    return Builder(quantizer.graph, like=quantizer, before=quantizer, backward=is_backward(quantizer)).transpose(codes)


def _complaint(state: State, node: Node) -> str:
    weight, name = GatheredWeight.of(node), state.flow.origin.get(node) or "a weight"
    how = f" after a Hadamard transform of {weight.rotation}" if weight.rotation else ""
    reasons = [f"{role}: {reason}" for site in state.sites if state.flow.origin.get(site.w[0]) == name
               for role, reason in _reasons(site).items()]
    readers = ", ".join(str(user) for user in node.users)
    return (f"{name} is gathered as codes of '{weight.spec}'{how}, and {readers} of the compiled graph reads it "
            f"otherwise ({'; '.join(reasons) or 'quantised in another way, or cast before it is'}). Give "
            "quartet.distributed.pack_all_gather the policy that its module is compiled with, or leave it out by skip=")


def _reasons(site: Found) -> dict[str, str]:
    """Why products of a site are in high precision; wgrad reads no weight."""
    if not isinstance(site, Planned):
        return {role: reason for role, reason in getattr(site, "reasons", {}).items() if role != "wgrad"}
    return {role: site.reasons.get(role, "in high precision") for role in ("fprop", "dgrad")
            if role in site.products and site.active(role) is None}
