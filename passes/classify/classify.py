"""The op class of a matmul, found by structure: output head, router, attention, or plain."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import aten, is_backward, shape, source
from quartet.passes.classify.by_name import class_by_name
from quartet.passes.classify.gates import is_gate
from quartet.passes.classify.heads import is_head
from quartet.passes.classify.mixing import mixed_heads
from quartet.passes.flow import Flow
from quartet.passes.sites import Found
from quartet.runtime.sizes import same
from quartet.runtime.view_ops import VIEWS

_PASS = VIEWS | {aten.expand.default, aten.clone.default, aten.constant_pad_nd.default, aten._to_copy.default,
                 aten.index.Tensor, aten.tanh.default}
_PASS_NAMES = ("prims.convert_element_type", "aten.mul.", "aten.div.", "aten.add.")
_VOCABULARY = {"unembed", "logits", "to_logits", "score", "qa_outputs"}
_CHOICES = ("aten.topk", "aten.sort")
_LOGARITHMS = ("aten.log.", "aten.log_", "aten._log_softmax", "aten.logsumexp")
_DEPTH = 24
LOOKUPS = (aten.index.Tensor, aten.index_select.default, aten.embedding.default)


def _transparent(node: Node, source: Node) -> bool:
    """Views, casts, scalar arithmetic and a broadcast bias: what may stand between logits and their softmax."""
    if node.target in _PASS:
        return True
    if not str(node.target).startswith(_PASS_NAMES):
        return False
    return all(i is source or len(shape(i)) <= 1 for i in node.all_input_nodes if hasattr(i.meta.get("val"), "shape"))


def _reach(node: Node) -> tuple[set[Node], bool]:
    """Nodes that the values reach unmixed, the first other nodes included, and whether they leave the graph."""
    seen: set[Node] = set()
    frontier, leaves = [(node, 0)], False
    while frontier:
        at, depth = frontier.pop()
        for user in at.users:
            if user in seen or is_backward(user):
                continue
            if user.op == "output":
                leaves = True
                continue
            seen.add(user)
            if depth < _DEPTH and _transparent(user, at):
                frontier.append((user, depth + 1))
    return seen, leaves


def _softmax_like(reached: set[Node]) -> Node | None:
    """The first max of a (log-)softmax, decomposed or not, over the reached values."""
    wanted = ("aten.amax", "aten._log_softmax", "aten._softmax", "prims.prepare_softmax_online", "aten.logsumexp")
    return next((n for n in reached if str(n.target).startswith(wanted)), None)


def _feeds(sources: set[Node], names: tuple[str, ...], flow: Flow, depth: int) -> bool:
    """Whether one of the ops comes so few steps behind ``sources``, and no layer before it."""
    frontier = [(n, 0) for n in sources]
    seen = set(sources)
    while frontier:
        at, d = frontier.pop(0)
        if str(at.target).startswith(names):
            return True
        if d < depth:
            users = [u for u in at.users if u in flow.order and u.op == "call_function" and u not in flow.layers]
            frontier += [(user, d + 1) for user in users if user not in seen]
            seen.update(users)
    return False


_MIXED = ("aten.where", "aten.masked_fill", "aten.maximum", "aten.clamp", "aten.native_dropout", "aten.sub", "aten.exp",
          "aten.cat.")
_ALONG_ROWS = ("aten.mul.", "aten.div.", "aten.add.", "aten.sub.", "aten.where", "aten.maximum", "aten.expand.")


def activations_class_of(node: Node, a: Node) -> str:
    """``attention_qk``: a softmax of its results follows; ``attention_pv``: ``a`` comes from one; else ``bmm``."""
    if _comes_from_softmax(a):
        return "attention_pv"
    frontier, seen = [(node, 0)], {node}
    while frontier:
        at, depth = frontier.pop()
        for user in at.users:
            if user in seen or user.op != "call_function" or is_backward(user):
                continue
            seen.add(user)
            if _softmax_like({user}) is not None:
                return "attention_qk"
            if depth < _DEPTH and (_passes(user) or mixed_heads(user) is not None):
                frontier.append((user, depth + 1))
    return "bmm"


def _passes(node: Node) -> bool:
    """Whether scores or probabilities go through a node one by one."""
    return node.target in (*_PASS, operator.getitem) or str(node.target).startswith((*_PASS_NAMES, *_MIXED))


def _comes_from_softmax(node: Node) -> bool:
    """Whether ``node`` holds the results of a softmax, decomposed or not, one by one: through views, casts, a dropout
    and a mixing of heads, and not by what they have weighed, as a router's scores weigh experts."""
    frontier, seen = [(node, 0)], {node}
    while frontier:
        at, depth = frontier.pop()
        name, above = str(at.target), at.all_input_nodes
        if name.startswith(("aten._softmax", "aten._safe_softmax")):
            return True
        if name.startswith("aten.div") and any(str(n.target).startswith("aten.exp") for n in _above_views(above[0])):
            return True
        if at.op != "call_function" or depth == _DEPTH:
            continue
        scores = mixed_heads(at)
        given = [scores] if scores is not None else _of_its_size(at, above) if _passes(at) else []
        frontier += [(n, depth + 1) for n in given if n not in seen]
        seen.update(given)
    return False


def _of_its_size(node: Node, above: list[Node]) -> list[Node]:
    """What a node takes whose rows are as long as its own: not what it repeats along them."""
    if not str(node.target).startswith(_ALONG_ROWS):
        return above
    return [n for n in above if isinstance(n.meta.get("val"), torch.Tensor) and shape(n)
            and same(shape(n)[-1], shape(node)[-1])]


def _above_views(node: Node) -> list[Node]:
    found = [node]
    while node.target in _PASS or str(node.target).startswith("prims.convert_element_type"):
        node = node.all_input_nodes[0]
        found.append(node)
    return found


def embeds(weight: Node) -> bool:
    """Whether the weight is (computed from) a table whose rows are looked up: an embedding's, or a codebook's."""
    root = weight
    while root.op == "call_function" and root.all_input_nodes:
        root = root.all_input_nodes[0]
    return any(user.target in LOOKUPS and source(user) is root and len(shape(root)) == 2 for user in root.users)


def op_class_of(site: Found, module: str, flow: Flow, read: Collection[int], tied: bool = False,
                part: bool = False, complete: bool = False) -> str:
    """The class of a product of an activation with a weight: of the layer, whatever graph it is in.

    Args:
        module: whose weight it is; "" of a parameter that is no module's ``weight``, and of a model's only layer.
        flow: the facts of the graph. read: the input widths of the model's layers, those of other graphs included.
        tied: its weight is an embedding's. part: what it computes is read inside of its block, in another graph.
        complete: what the graph returns, the model does.
    Returns:
        ``router``: its scores go to top-k or a sort, or are those of a gate (``quartet.passes.classify.gates``).
        ``lm_head``: it feeds the log-softmax of a loss, its weight is the embedding's, or it is a module's and a head
        by structure (``quartet.passes.classify.heads``), or by a name that is given to nothing else: where the
        vocabulary is as large as the model is wide, and the loss is elsewhere, structure does not tell. Else
        ``linear``.
    """
    node = site.forward.node
    reached, leaves = _reach(node)
    scores = _softmax_like(reached)
    chooses = _feeds({node} if scores is None else {scores, *reached}, _CHOICES, flow, 6)
    if chooses or is_gate(node, site.n, site.k, flow):
        return "router"
    logits = scores is not None and _feeds({scores}, _LOGARITHMS, flow, 8)
    named = leaves and (module.rpartition(".")[2] in _VOCABULARY or class_by_name(module) == "lm_head")
    if logits or tied or named or module and not part and is_head(node, site.n, flow, read, complete):
        return "lm_head"
    return "linear"
