"""Gates: layers whose few scores choose or weigh what other layers compute, such as the router of a mixture of experts.

A gate has fewer outputs than inputs. What is computed from its scores alone, past a softmax, a sigmoid, a rectifier,
a comparison or an argmax, does one of these:

    scale    one score times the whole vector of a token:   p[:, i:i+1] · expert_i(x),   Σ_i p[:, i, None] · y[:, i]
    mix      contract the scores with other layers' results: einsum("te,ted->td", p, y), or fewer scores than a block
             has elements over the tokens, as a pooling by attention does: pᵀ·v
    choose   index, gather, scatter or mask other activations, or a stack of weights

Elementwise gates of full width (GLU, SwiGLU, LSTM) and products of queries with keys do none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from quartet.lowering.ir.graph import is_backward, shape, source, val
from quartet.passes.compilation import LEAST
from quartet.passes.flow import Flow, contracted
from quartet.passes.matrices import MATMULS, operands

_SCORES = ("aten.exp.", "aten._softmax", "aten._safe_softmax", "aten.sigmoid", "aten.hardsigmoid", "aten.argmax",
           "aten.argmin", "aten.max.", "aten.min.", "aten.gt.", "aten.ge.", "aten.lt.", "aten.le.", "aten.eq.")
_RECTIFIED = ("aten.relu", "aten.clamp")
_CHOICES = ("aten.index", "aten.gather", "aten.scatter", "aten.masked", "aten.nonzero", "aten._unsafe_index",
            "aten._unsafe_masked_index")


def is_gate(node: Node, n: Any, k: Any, flow: Flow) -> bool:
    """Whether the product ``node`` of a layer with ``k`` inputs and ``n`` outputs makes such scores."""
    if not (isinstance(n, int) and isinstance(k, int) and n < k):
        return False
    own = flow.own(node)
    scores: set[Node] = set()
    rectified: set[Node] = set()
    for at in own:
        name, above = str(at.target), at.all_input_nodes
        if name.startswith(_SCORES) or any(i in scores for i in above):
            scores.add(at)
        elif name.startswith(_RECTIFIED) or any(i in rectified for i in above):
            rectified.add(at)
    return any(_scales(at, user, own, flow) or at in scores and (
                   _mixes(at, user, n, own, flow) or _chooses(at, user, own, flow))
               for at in (*scores, *rectified) for user in at.users if user not in own and not is_backward(user))


def _scales(scores: Node, user: Node, own: dict[Node, None], flow: Flow) -> bool:
    """Whether one score a vector multiplies, or decides by ``where``, the vectors that another layer has made."""
    if not str(user.target).startswith(("aten.mul.", "aten.where.")) or not _is_column(scores):
        return False
    return any(i not in own and i in flow.made and shape(i) and not _is_column(i) for i in user.all_input_nodes)


def _is_column(node: Node) -> bool:
    """Whether the last axis is of size 1 and is there to be broadcast."""
    size = shape(node) if isinstance(node.meta.get("val"), torch.Tensor) else ()
    return len(size) > 1 and isinstance(size[-1], int) and size[-1] == 1


def _mixes(scores: Node, user: Node, n: int, own: dict[Node, None], flow: Flow) -> bool:
    """Whether a product contracts the ``n`` scores of a token, or few scores of all tokens, with activations that other
    layers have made."""
    if user.target not in MATMULS:
        return False
    left, right = operands(user)
    other = right if left is scores else left
    return (contracted(user) == n or n < LEAST) and other in flow.made and other not in own


def _chooses(scores: Node, user: Node, own: dict[Node, None], flow: Flow) -> bool:
    """Whether integers or booleans made of scores pick among activations, or matrices of a stack of weights."""
    if "grouped_mm" in str(user.target):
        return True
    if not str(user.target).startswith(_CHOICES) or val(scores).is_floating_point():
        return False
    chosen = source(user)
    if chosen is None or chosen in own:
        return False
    return chosen not in flow.origin or len(shape(chosen)) > 2
