"""What a policy's default leaves in the model's dtype whatever its recipe, until a rule names the class or the module.

A product that contracts fewer elements than a block has nothing to gain. For wgrad, which contracts tokens, the batch
counts that the layer was first trained with, so that a short last one gets what the others got. A layer that reads the
model's own numbers meets columns of unlike units in one block: a single large one takes the others' bits, as it would
an embedding's rows. A parameter that is no layer's weight, such as the frequencies of Fourier features, is not known to
train with less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.fx import Node

from quartet.lowering.ir.graph import shape
from quartet.lowering.recipe.types import ROLES
from quartet.passes.compilation import LEAST, Compilation
from quartet.passes.flow import Flow
from quartet.passes.sites import Found
from quartet.runtime.sizes import hint


def tokens(site: Found, config: Compilation) -> int:
    """The tokens that a layer is decided by: those that it was first trained with, or else those of the graph."""
    return config.tokens.get(site.fqn) or hint(site.m)


def small(site: Found, config: Compilation) -> dict[str, str]:
    """Role → why its product contracts too little; a symbolic number of features is taken to be large."""
    depths = {role: site.dims(role)[2] for role in ROLES} | {"wgrad": tokens(site, config)}
    reasons = {role: f"contracts {depth} elements, fewer than the {LEAST} of a block" for role, depth in depths.items()
               if isinstance(depth, int) and depth < LEAST}
    if "wgrad" in reasons and site.fqn in config.tokens and (not isinstance(site.m, int) or site.m != depths["wgrad"]):
        reasons["wgrad"] += ", in the batch that the layer was first trained with"
    return reasons


def quantised_all_the_same(site: Found, config: Compilation) -> str:
    """Why wgrad contracts less than a block and is not left alone; empty where it is, or contracts more."""
    few = isinstance(site.m, int) and site.m < LEAST <= tokens(site, config)
    return f"decided for the {tokens(site, config)} tokens that the layer was first trained with" if few else ""


def reads_input(site: Found, flow: Flow, inputs: Mapping[Node, str], written: Collection[int]) -> str:
    """Why a layer of a module reads what the model was given; empty where it does not, or may read its own results.

    Views, casts, elementwise functions and norms may stand between. A vector of the width of an input is taken to be a
    hidden state where a layer of the model writes that width, as in a block that is compiled by itself.

    Args:
        inputs: floating-point inputs of the model → name. written: the output widths of the model's layers.
    """
    read = _read(site, flow, inputs)
    whole = any(shape(node)[-1:] == (site.k,) for node in read)
    return "" if not read or whole and site.k in written else f"reads {_named(inputs, read)}"


def projects_input(site: Found, flow: Flow, inputs: Mapping[Node, str]) -> str:
    """Why a parameter that is no layer's weight multiplies what the model was given; empty where it does not."""
    read = _read(site, flow, inputs)
    return f"multiplies {_named(inputs, read)} by a parameter that is no layer's weight" if read else ""


def _read(site: Found, flow: Flow, inputs: Mapping[Node, str]) -> list[Node]:
    """The inputs that X is made of, where no layer is among its makers."""
    if site.x[0] in flow.made:
        return []
    seen, waiting = {site.x[0]}, [site.x[0]]
    while waiting:
        above = [node for node in waiting.pop().all_input_nodes if node not in seen]
        seen.update(above)
        waiting += above
    return [node for node in inputs if node in seen]


def _named(inputs: Mapping[Node, str], read: list[Node]) -> str:
    return f"a floating-point input of the model ({', '.join(dict.fromkeys(inputs[node] for node in read))})"
