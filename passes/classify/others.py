"""Products that no pass takes: inside of fused operators, and written as something else by PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch.fx import Graph, Node

from quartet.kernels.spec import dtype_name
from quartet.lowering.ir.graph import argument, aten, is_backward, remaining, shape, source_of, val
from quartet.lowering.recipe.records import MatmulRecord
from quartet.passes.classify.already import CODED
from quartet.passes.matrices import canonical
from quartet.passes.naming import module_name, module_of

_FUSED = {"aten._scaled_dot_product_":
          "inside of scaled_dot_product_attention; the option open_attention=True writes it as matmuls",
          "flex_attention": "inside of flex_attention; written as matmuls and a softmax it is found"}
_GRADIENT_FIRST = "aten._scaled_dot_product_"  # in the arguments of its backward
_SUMS = (aten.sum.dim_IntList, aten.sum.default)
_WRITTEN_AS_SUMS = {f"aten.{name}.default" for name in ("mv", "addmv", "dot", "vdot", "mm", "addmm", "bmm", "baddbmm")}
OF_CODES = "its operands are quantised by the model itself"


def without_site(graph: Graph, origin: Mapping[Node, str]) -> Iterator[MatmulRecord]:
    """Records of the products of a graph that are no matmul of it; ``origin``: weight → name of its parameter."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        fused = next((name for name in _FUSED if str(node.target).startswith(name)), None)
        if fused is not None:
            yield from _attention(node, fused)
        elif str(node.target).startswith(CODED):
            (m, k), n = shape(node.all_input_nodes[0])[-2:], shape(node)[-1]
            yield left_alone(node, "linear", "dgrad" if is_backward(node) else "fprop", (m, n, k), val(node).dtype,
                             f"{OF_CODES}, for {node.target}")
        elif node.target is aten.addbmm.default:
            a, b = argument(node, "batch1"), argument(node, "batch2")
            (batch, m, k), n = shape(a), shape(node)[-1]
            yield _of_weights(node, (a, b), (m, n, k), batch,
                              "adds up a batch; only mm, addmm, bmm and baddbmm are quantised", origin)
        elif node.target is aten._trilinear.default:
            yield _bilinear(node, origin)
        elif node.target in _SUMS and str(node.meta.get("original_aten")) in _WRITTEN_AS_SUMS:
            product = source_of(node)
            (*batch, m, n), k = (1, 1, *shape(node))[-max(2, len(shape(node))):], shape(product)[-1]
            yield _of_weights(node, product.all_input_nodes, (m, n, k), prod(batch),
                              "a product with a vector, which PyTorch writes as a multiplication and a sum", origin)


def _bilinear(node: Node, origin: Mapping[Node, str]) -> MatmulRecord:
    """A record of ``Y[m, n] = Σ X₁[m, i] W[n, i, j] X₂[m, j]``, or of one of its gradients."""
    backward, (first, *last) = is_backward(node), shape(node)
    weight = next((x for x in node.all_input_nodes if len(shape(x)) == 3), None)
    if weight is None:
        sizes, role = (first, prod(last), shape(node.all_input_nodes[0])[0]), "wgrad"
    else:
        sizes = first, prod(last), prod(shape(weight)) // prod(last)
        role = "dgrad" if backward else "fprop"
    fqn = None if weight is None or weight not in origin else module_name(origin[weight])
    return left_alone(node, "linear", role, sizes, val(node).dtype,
                      "a product of three tensors; only products of two are quantised", fqn)


def _of_weights(node: Node, operands: Any, mnk: tuple[Any, Any, Any], batch: Any, reason: str,
                origin: Mapping[Node, str]) -> MatmulRecord:
    """A record under the name and in the class of the matrix that is a weight, if one is."""
    matrices = [canonical(x)[0] for x in operands if len(shape(x)) > 1]
    weights = [origin[x] for x in matrices if x in origin]
    op_class = "bmm" if not weights else "linear" if batch == 1 else "grouped"
    fqn = module_name(weights[0]) if weights else None
    role = "dgrad" if is_backward(node) else "fprop"
    return replace(left_alone(node, op_class, role, mnk, val(node).dtype, reason, fqn), batch=plain(batch))


def _attention(node: Node, fused: str) -> list[MatmulRecord]:
    """Records of the products inside of a fused attention: of ``[batch, heads, length, width]`` q, k and v."""
    backward = is_backward(node)
    q, k, v = (*([] if backward and fused == _GRADIENT_FIRST else [source_of(node)]), *remaining(node))[:3]
    (*batch, m, d), n, width = shape(q), shape(k)[-2], shape(v)[-1]
    each = {"attention_qk": {"fprop": (m, n, d), "dgrad": (m, d, n), "wgrad": (n, d, m)},
            "attention_pv": {"fprop": (m, width, n), "dgrad": (m, n, width), "wgrad": (width, n, m)}}
    records = [left_alone(node, op_class, role, sizes, val(q).dtype, _FUSED[fused])
               for op_class, roles in each.items() for role, sizes in roles.items() if (role == "fprop") != backward]
    return [replace(record, batch=plain(prod(batch))) for record in records]


def left_alone(node: Node, op_class: str, role: str, mnk: tuple[Any, Any, Any], dtype: Any, reason: str,
               fqn: str | None = None) -> MatmulRecord:
    """The record of a product that no pass takes; ``fqn``: its module where ``node`` does not tell."""
    m, n, k = map(plain, mnk)
    return MatmulRecord(site=-1, fqn=module_of(node) if fqn is None else fqn, op_class=op_class, role=role,
                        m=m, n=n, k=k, dtype=dtype_name(dtype), reason=reason)


def plain(size: Any) -> int | str:
    """A size as a record has it."""
    return size if isinstance(size, int) else str(size)
