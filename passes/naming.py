"""What the modules and parameters of a graph are called.

Names are those of ``named_modules()`` of the model, which the front door finds by identity. Dynamo writes where it has
a module from instead, ``L['self']._modules['layers']._modules['0'].q``, and that names a module which nobody has found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch.fx import Graph, GraphModule, Node

from quartet.lowering.ir.graph import MODULE_KEY


def name_modules(graph: Graph, names: Mapping[str, str]) -> None:
    """Write on each node the name of the module that computes it, by ``names``: what dynamo writes → name."""
    for node in graph.nodes:
        path = next((path for _, path in reversed(module_stack(node))), None)
        if path is not None:
            node.meta[MODULE_KEY] = names[path] if path in names else module_path(path)


def module_of(node: Node) -> str:
    """Name of the innermost module that computes ``node``; empty for none, and for the model itself."""
    if MODULE_KEY in node.meta:
        return str(node.meta[MODULE_KEY])
    return module_path(next((path for _, path in reversed(module_stack(node))), ""))


def module_stack(node: Node) -> list[tuple[str, str]]:
    """The modules around a node, the outermost first: dynamo's key, the module's ``id``, and what dynamo writes."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return [(str(key).partition("@")[0], str(entry[0])) for key, entry in stack.items()]


def stacks(gm: GraphModule) -> Iterator[tuple[str, str]]:
    """All entries of the module stacks of a graph and of the regions in it."""
    for part in gm.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                yield from module_stack(node)


def module_name(parameter: str) -> str:
    """``layers.0.q`` of its weight, also of a parametrised one; other parameters keep their own name."""
    return re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", parameter).removesuffix(".weight")


def module_path(path: str) -> str:
    """A dotted name from how dynamo writes one, without the variable that it starts from; empty for that alone."""
    text = re.sub(r"getattr\((.*), '([^']*)'\)", r"\1.\2", path)
    text = re.sub(r"^[LG]\[(['\"])\w*\1\](\.__self__|\.__closure__\[\d+\]\.cell_contents)?", "", text)
    text = re.sub(r"(\.__dict__\[['\"]|\.)_(modules|parameters|buffers)(['\"]\])?(?=\[)", "", text)
    text = re.sub(r"\[(['\"]?)(.*?)\1\]", r".\2", text)
    return text.strip(".")


def parameter_path(path: str) -> str:
    """The same for a parameter, with a variable that says more than ``self`` where nothing else names the layer: ``w``
    of ``L['w']``, ``ws.0`` of ``L['ws'][0]``, ``layer.weight`` of ``L['layer'].weight``."""
    name = module_path(path)
    found = re.match(r"[LG]\[(['\"])(?!self\1|___)(\w+)\1\]", path)
    if found is None or ("." in name and not name[0].isdecimal()):
        return name
    return f"{found[2]}.{name}".strip(".")
