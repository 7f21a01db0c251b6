"""``check="finite"``: whether the operands and the result of each product are finite, in forward and backward.

The products are those that the model has, whether they are quantised or not; the operands are looked at before any
quantiser, so a result that is not finite of operands that are shows an overflow of the product.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from quartet.lowering.ir.graph import editing, val
from quartet.lowering.ir.ops.inspect import CHECK_FINITE
from quartet.passes.graph_pass import graph_pass
from quartet.passes.inspect.originals import Originals
from quartet.passes.inspect.watching import after, layers_of, token_of
from quartet.passes.sites import Quantized
from quartet.passes.state import State
from quartet.runtime.inspect.program import shown
from quartet.runtime.inspect.recorder import RESULT

_LETTERS = {"fprop": "xw", "dgrad": "e", "wgrad": "e"}


@graph_pass(reads=Quantized, unplanned=True,
            summary="whether operands and results of products are finite is noted, for the option `check`")
def check(state: State) -> None:
    """Put an op behind each product."""
    token = token_of(state)
    if state.config.check is None or token is None:
        return
    with editing(state.gm):
        for layer, role, named in _products(state):
            nodes = list(named.values())
            after(state, nodes)(CHECK_FINITE, token, nodes, shown(layer), role, "|".join(named))


def _products(state: State) -> Iterator[tuple[str, str, dict[str, Node]]]:
    """Layer and role of each product, and its tensors by name: of a gradient E alone, X and W have been looked at."""
    originals, layers = Originals(state), layers_of(state)
    for site in state.sites:
        for role, product in site.products.items():
            operands = [originals.of(site, letter) for letter in _LETTERS[role]]
            named = {letter.upper(): operand[0] for letter, operand in zip(_LETTERS[role], operands, strict=True)
                     if operand is not None and val(operand[0]).dtype.itemsize > 1}  # codes are bounded
            if (out := originals.now(product.node)) is not None:
                named[RESULT] = out
            if named:
                yield layers[site.index], role, named
