"""Find the grouped products of mixture-of-experts layers: tokens in groups, each times the weights of its expert.

    fprop   Y[g]  = X[g] · W[g]ᵀ       X [tokens, in], W [E, out, in], offs [E]: where each group ends
    dgrad   gX[g] = E[g] · W[g]
    wgrad   gW[g] = E[g]ᵀ · X[g]       contracts the tokens of one group

``aten._grouped_mm`` writes all three; its gradients are ops of the same kind, a 3-D result is wgrad's. Hugging Face has
an op of its own where PyTorch's does not do, with one op for both gradients.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from quartet.lowering.ir.graph import (
    BY_HAND,
    argument,
    arguments,
    aten,
    is_backward,
    remaining,
    results,
    shape,
    source,
    val,
)
from quartet.lowering.recipe.op_classes import own_class
from quartet.lowering.recipe.records import MatmulRecord
from quartet.passes.classify.already import quantised_before
from quartet.passes.classify.aside import small
from quartet.passes.find.find_matmuls import left_alone, parameter_origins
from quartet.passes.graph_pass import graph_pass
from quartet.passes.matrices import canonical
from quartet.passes.naming import module_name, module_of
from quartet.passes.plan.plan import UnsupportedMatmul
from quartet.passes.sites import Found, Gradient, Groups, Product
from quartet.passes.state import State
from quartet.runtime.view_ops import COPIES

GROUPED_MM = aten._grouped_mm.default
_FALLBACK, _FALLBACK_BACKWARD = "transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback_backward"
_ROLES_OF_RESULTS = {0: "dgrad", 1: "wgrad"}  # of the fallback's backward


@graph_pass(writes=Found, summary="the same for products of groups of tokens with a matrix each")
def find_grouped(state: State) -> None:
    """Find the grouped products with expert weights, and record all others.

    Raises UnsupportedMatmul when strict.
    """
    nodes = [node for node in state.gm.graph.nodes if node.op == "call_function" and "grouped_mm" in str(node.target)]
    if not nodes:
        return
    origin = parameter_origins(state)
    claimed: set[Node] = set()
    for node in nodes:
        if is_backward(node):
            continue
        obstacle = _obstacle(node, origin)
        if obstacle is not None:
            _refuse(state, node, obstacle)
            state.leave(*_left(node, obstacle))
            continue
        site = _site(state, node, origin)
        for other in nodes:
            numbered = other.meta.get("seq_nr") == node.meta.get("seq_nr") or BY_HAND in other.meta
            if is_backward(other) and numbered and other not in claimed:
                gradients = _gradients(site, other)
                claimed |= {other} if gradients else set()
                for role, gradient in gradients.items():
                    site = site.with_gradient(role, gradient)
        site = replace(site, op_class=own_class(site) or site.op_class)
        state.advance(replace(site, aside=small(site, state.config) | quantised_before(site)))
    for node in nodes:
        if is_backward(node) and node not in claimed:
            state.leave(*_left(node, "belongs to no grouped product that is planned"))


def _obstacle(node: Node, origin: dict[Node, str]) -> str | None:
    """Why a forward node is no product of tokens with expert weights."""
    if not str(node.target).startswith((_FALLBACK, "aten._grouped_mm")):
        return f"is {node.target}, which is not known; aten._grouped_mm is"
    x, w = node.all_input_nodes[:2]
    if len(shape(x)) != 2 or len(shape(w)) != 3:
        return (f"multiplies {len(shape(x))}-D with {len(shape(w))}-D operands; only tokens [tokens, in] with weights "
                "[experts, in, out] are quantised")
    if arguments(node).get("offs") is None:
        return "has no offsets of groups"
    if arguments(node).get("bias") is not None or arguments(node).get("out_dtype") not in (None, val(x).dtype):
        return "adds a bias or changes the dtype; only plain products are quantised"
    if x in origin or w not in origin:
        return "multiplies activations with activations; only expert weights are quantised"
    return None


def _refuse(state: State, node: Node, obstacle: str) -> None:
    """Under ``strict=True``, raise for a product that the policy quantises and that is none of ours."""
    (record, *_) = _left(node, obstacle)
    fqn = module_of(node)
    if state.config.strict and state.config.resolve("grouped", fqn, record.m, record.n, record.k).quantizes:
        raise UnsupportedMatmul(f"strict=True, and the grouped product {fqn or node.name} (m={record.m} n={record.n} "
                                f"k={record.k}, {record.dtype}) cannot be quantised: it {obstacle}")


def stack(node: Node) -> tuple[Node, bool]:
    """Walk up through transposes of each matrix of a stack: (origin, whether ``node`` is its transpose)."""
    flipped = False
    while (above := source(node)) is not None:
        swaps = ((node.target is aten.permute.default and list(argument(node, "dims")) == [0, 2, 1])
                 or (node.target is aten.transpose.int and {int(d) % 3 for d in remaining(node)} == {1, 2}))
        if not swaps and node.target not in COPIES:
            break
        flipped = flipped != swaps
        node = above
    return node, flipped


def _site(state: State, node: Node, origin: dict[Node, str]) -> Found:
    x, w = node.all_input_nodes[:2]
    (tokens, width), (count, _, out) = shape(x), shape(w)
    return Found(index=len(state.sites), fqn=module_name(origin[w]), op_class="grouped", x=(x, False), w=(w, True),
                 m=tokens, n=out, k=width, dtype=val(node).dtype, forward=Product(node, flipped=False),
                 groups=Groups(argument(node, "offs"), count))


def _gradients(site: Found, node: Node) -> dict[str, Gradient]:
    """Which gradients of a site a node computes, by the operand that it shares with the site; all have the same E."""
    operands = node.all_input_nodes
    x, w = site.x[0], site.w[0]
    if str(node.target).startswith(_FALLBACK_BACKWARD):
        if operands[0] is not x or operands[1] is not w:
            return {}
        roles = {_ROLES_OF_RESULTS[index]: user for index, user in results(node).items()}
        return {role: Gradient(user, role == "wgrad", (operands[3], False), site.dtype) for role, user in roles.items()}
    left, right = operands[:2]
    if len(shape(node)) == 2 and "dgrad" not in site.gradients and stack(right)[0] is stack(w)[0]:
        role, flipped, gradient = "dgrad", False, (left, False)
    elif len(shape(node)) == 3 and "wgrad" not in site.gradients and canonical(left) == _flipped(canonical(x)):
        role, flipped, gradient = "wgrad", True, (right, False)
    elif len(shape(node)) == 3 and "wgrad" not in site.gradients and canonical(right) == canonical(x):
        role, flipped, gradient = "wgrad", False, (left, True)
    else:
        return {}
    base, turned = canonical(gradient[0])
    e = base, turned != gradient[1]
    if any(other.e != e for other in site.gradients.values()):
        return {}
    return {role: Gradient(node, flipped, e, site.dtype)}


def _flipped(operand: tuple[Node, bool]) -> tuple[Node, bool]:
    return operand[0], not operand[1]


def _left(node: Node, reason: str) -> list[MatmulRecord]:
    """A record for each product of a node that stays."""
    a, b = (shape(i) for i in node.all_input_nodes[:2])
    made = node.meta["val"]
    if isinstance(made, (tuple, list)):
        sizes = {"dgrad": (a[0], a[1], b[-1]), "wgrad": (a[1], b[-1], a[0])}
        made = made[0]
    else:
        m, n = tuple(made.shape)[-2:]
        sizes = {"fprop" if not is_backward(node) else "wgrad" if made.dim() == 3 else "dgrad": (m, n, a[-1])}
    return [left_alone(node, "grouped", role, mnk, made.dtype, reason, module_of(node)) for role, mnk in sizes.items()]
