"""Products whose operands the model has quantised itself: quantisation-aware training, FP8 linear layers, weights that
are tensors of codes. Our format on top would round what lies on one grid to another one.

They are told by what the operand is computed from through views, casts and elementwise arithmetic: codes of eight bits
or fewer, a rounding to integers, an op that quantises by its name.
"""

from __future__ import annotations

from torch.fx import Node

from quartet.kernels.spec import dtype_name
from quartet.lowering.ir.graph import aten, val
from quartet.lowering.recipe.types import ROLES
from quartet.passes.sites import Found
from quartet.runtime.view_ops import COPIES, PASSED_ON

CODED = ("aten._scaled_mm", "aten._scaled_grouped_mm", "aten._int_mm")  # products of codes
_THROUGH = PASSED_ON | COPIES | {aten.expand.default, aten.view.dtype, aten.cat.default, aten.stack.default}
_ELEMENTWISE = ("aten.mul", "aten.div", "aten.add", "aten.sub", "aten.rsub", "aten.neg", "aten.clamp", "aten.minimum",
                "aten.maximum", "aten.where", "aten.bitwise_", "aten.__", "aten._to_copy", "aten.expand")
_ROUNDED = ("aten.round.", "aten.sign.")
_MOST = 64  # nodes that are looked at


def quantised_before(site: Found) -> dict[str, str]:
    """Role → why a site's product has no need of another format; empty where its operands are in full precision."""
    weighted = site.op_class not in ("bmm", "attention_qk", "attention_pv")
    for name, (node, _), of_parameters in (("W", site.w, weighted), ("X", site.x, False)):
        if (mark := _mark(node, of_parameters)) is not None:
            return dict.fromkeys(ROLES, f"{name} is quantised by the model itself, {mark}")
    return {}


def _mark(operand: Node, of_parameters: bool) -> str | None:
    """What shows that an operand is on a grid, or None."""
    waiting, seen = [operand], {operand}
    while waiting and len(seen) < _MOST:
        node = waiting.pop(0)
        if (mark := _shows(node, of_parameters)) is not None:
            return mark
        name = str(node.target)
        if node.op != "call_function" or not (node.target in _THROUGH or name.startswith(_ELEMENTWISE)
                                              or (of_parameters and node.target is aten.index.Tensor)):
            continue
        above = [n for n in node.all_input_nodes if n not in seen]
        waiting += above
        seen.update(above)
    return None


def _shows(node: Node, of_parameters: bool) -> str | None:
    name, value = str(node.target), node.meta.get("val")
    if node.op == "call_function" and "quantize" in name and not name.startswith("quartet."):
        return f"by {name}"
    if name.startswith(_ROUNDED if of_parameters else _ROUNDED[:1]):
        return f"by {name}"
    dtype = getattr(value, "dtype", None)
    if dtype is None or dtype.itemsize > 1 or dtype_name(dtype) == "bool":
        return None
    coded = dtype.is_floating_point or of_parameters or (
        node.op == "call_function" and val(node.all_input_nodes[0]).is_floating_point())
    return f"to {dtype_name(dtype)}" if coded else None
