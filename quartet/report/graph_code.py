"""An FX graph as a Python module that a person can read and run.

Each line carries the dtype and shape of its value; a heading names the module that it comes from and
where forward ends and backward begins. ``python file.py`` runs it on random inputs of the right shapes.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from quartet.kernels.spec import dtype_name
from quartet.passes.naming import module_of
from quartet.runtime.compat import OperatorBase, OpOverload
from quartet.runtime.sizes import hint

OP_MODULE = "quartet.lowering"
STAND_IN = 16
DTYPE_NAMES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "b8",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
}
COMMENT_COLUMN = 100


def describe(value: Any) -> str:
    """``"bf16[s0, 64]"`` for a tensor; a tuple of those for several."""
    if isinstance(value, torch.Tensor):
        dtype = DTYPE_NAMES.get(value.dtype, dtype_name(value.dtype))
        return f"{dtype}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(describe(v) for v in value)})"
    return f"{value} (here {hint(value, STAND_IN)})" if isinstance(value, torch.SymInt) else str(value)


def is_backward(node: fx.Node) -> bool:
    """True for a node of the backward pass, by the tag that AOTAutograd gives it."""
    return "backward" in str(node.meta.get("partitioner_tag", ""))


def op_name(node: fx.Node) -> str:
    """``"aten.mm"``, ``"quartet.quantize"``, ``"operator.getitem"``: the operation without its overload."""
    target = node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket)
    return str(target) if isinstance(target, str) else _callable(target)[1].removeprefix("torch.ops.")


def _callable(target: Any) -> tuple[str, str]:
    """The module to import for a call target, and its expression."""
    if isinstance(target, OperatorBase):
        name = str(target)
        home = OP_MODULE if name.startswith("quartet.") else "torch"
        return home, f"torch.ops.{name}" if "." in name else f"torch.ops.higher_order.{name}"
    name = getattr(target, "__name__", type(target).__name__)
    for module in (operator, math, torch, torch.nn.functional):
        if getattr(module, name, None) is target:
            home = module.__name__.removeprefix("_")
            return home, f"{home}.{name}"
    home = getattr(target, "__module__", None) or "builtins"
    return home, f"{home}.{getattr(target, '__qualname__', name)}"


@dataclass
class GraphCode:
    """The printed module: its source, the tensors it needs beside it, and what stops it from running.

    Args:
        source: the Python text.
        constants: tensors of ``get_attr`` nodes, to be saved with ``torch.save`` beside the module.
        obstacles: arguments that have no Python form; empty when the module runs.
    """

    source: str
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    obstacles: tuple[str, ...] = ()


class _Printer:
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.imports = {"torch"}
        self.constants: dict[str, torch.Tensor] = {}
        self.obstacles: list[str] = []
        self.classes: list[str] = []

    def literal(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return arg.name
        if isinstance(arg, torch.SymInt):
            return repr(hint(arg, STAND_IN))
        if isinstance(arg, (torch.SymFloat, torch.SymBool)):
            return repr(arg.node.hint)
        if isinstance(arg, torch.Size):
            return self.literal(list(arg))
        if isinstance(arg, tuple):
            return f"({', '.join(map(self.literal, arg))}{',' if len(arg) == 1 else ''})"
        if isinstance(arg, list):
            return f"[{', '.join(map(self.literal, arg))}]"
        if isinstance(arg, dict):
            return f"{{{', '.join(f'{k!r}: {self.literal(v)}' for k, v in arg.items())}}}"
        if isinstance(arg, slice):
            return f"slice({self.literal(arg.start)}, {self.literal(arg.stop)}, {self.literal(arg.step)})"
        if isinstance(arg, float) and not math.isfinite(arg):
            return f'float("{arg}")'
        if arg is None or arg is ... or isinstance(arg, (bool, int, float, complex, str, bytes)):
            return "..." if arg is ... else repr(arg)
        if isinstance(arg, torch.device):
            return f"torch.device({str(arg)!r})"
        if isinstance(arg, (torch.dtype, torch.layout, torch.memory_format)):
            return str(arg)
        if isinstance(arg, OperatorBase) or inspect.isbuiltin(arg) or inspect.isfunction(arg):
            return self.name_of(arg)
        self.obstacles.append(f"an argument of type {type(arg).__qualname__}: {str(arg)[:80]}")
        return repr(str(arg))

    def name_of(self, target: Any) -> str:
        home, name = _callable(target)
        if "<" in name:
            self.obstacles.append(f"the local function {name}")
            return "None"
        self.imports.add(home)
        return name

    def expression(self, node: fx.Node, module: torch.nn.Module) -> str:
        if node.op == "get_attr":
            return self.attribute(str(node.target), module)
        args = [self.literal(a) for a in node.args] + [f"{k}={self.literal(v)}" for k, v in node.kwargs.items()]
        if node.op == "call_function":
            if node.target is operator.getitem:
                return f"{args[0]}[{args[1]}]"
            return f"{self.name_of(node.target)}({', '.join(args)})"
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:])})"
        self.obstacles.append(f"a call of the module {node.target}")
        return f"self.{node.target}({', '.join(args)})"

    def attribute(self, target: str, module: torch.nn.Module) -> str:
        value: Any = module
        for part in target.split("."):
            value = getattr(value, part)
        if isinstance(value, fx.GraphModule):
            name = "Graph_" + re.sub(r"\W", "_", target)
            self.classes.append(self.graph_class(name, value))
            return f"{name}()"
        if isinstance(value, torch.Tensor):
            if type(value) in (torch.Tensor, torch.nn.Parameter):
                self.constants[target] = value.detach()
                return f"CONSTANTS[{target!r}]"
            return self.random_input(value)
        return self.literal(value)

    def random_input(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            shape, stride = [hint(s, STAND_IN) for s in value.shape], [hint(s, STAND_IN) for s in value.stride()]
            device = "" if value.device.type == "cpu" else f", {str(value.device)!r}"
            return f"random({shape}, {stride}, {value.dtype}{device})"
        return self.literal(value)

    def graph_class(self, class_name: str, gm: fx.GraphModule) -> str:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        lines = [f"class {class_name}(torch.nn.Module):", "    def forward(", "        self,"]
        lines += [f"        {n.name},".ljust(40) + f"  # {describe(n.meta.get('val'))}  {self.names.get(n.name, '')}"
                  .rstrip() for n in placeholders]
        lines.append("    ):")
        last_use: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            for used in node.all_input_nodes:
                last_use[used] = node
        dying: dict[fx.Node, list[str]] = {}
        for used, user in last_use.items():
            dying.setdefault(user, []).append(used.name)
        section, place = None, ""
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                lines += ["", f"        return {self.literal(node.args[0])}"]
                continue
            now = is_backward(node) if "partitioner_tag" in node.meta else section
            if now is not None and now != section:
                section = now
                lines += ["", f"        # ━━━━━━━━ {'backward' if now else 'forward'} ━━━━━━━━"]
                place = ""
            if (name := module_of(node)) and name != place:
                place = name
                lines += ["", f"        # {name}"]
            text = f"        {node.name} = {self.expression(node, gm)}"
            if dead := [*dying.get(node, ()), *([] if node.users else [node.name])]:
                text += f"; del {', '.join(dead)}"
            comment = f"  # {describe(node.meta['val'])}" if "val" in node.meta else ""
            lines.append(text.ljust(COMMENT_COLUMN) + comment if comment else text)
        return "\n".join(lines)


RANDOM = '''
def random(shape, stride, dtype, device="cpu"):
    """A random tensor with these strides; integers are 0 or 1, so that they are valid indices."""
    once = [1 if step == 0 else size for size, step in zip(shape, stride)]
    out = torch.empty_strided(once, stride, dtype=dtype, device=device)
    if "e8m0" in str(dtype) or "float4" in str(dtype):
        out.view(torch.uint8).copy_(torch.randint(120, 128, once, device=device))
    elif dtype.is_floating_point or dtype.is_complex:
        wide = dtype if dtype.itemsize > 1 else torch.float32
        out.copy_(torch.randn(once, dtype=wide, device=device).to(dtype))
    else:
        out.copy_(torch.randint(0, 2, once, device=device))
    return out.expand(shape)
'''

RUNS = ("Run it: random inputs of the traced shapes, or `python FILE inputs.pt` with yours, a tuple that torch.save",
        "wrote: one value a placeholder, in the order and of the shapes that inputs() has.")
MAIN = '''
if __name__ == "__main__":
    import sys

    torch.manual_seed(0)
    given = torch.load(sys.argv[1], weights_only=True) if len(sys.argv) > 1 else inputs()
    with torch.no_grad():
        results = Graph()(*given)
    for index, result in enumerate(results if isinstance(results, (list, tuple)) else [results]):
        if isinstance(result, torch.Tensor):
            print(f"{index:4d}  {str(result.dtype).removeprefix('torch.'):14s} {str(tuple(result.shape)):24s}"
                  f" finite {bool(result.float().isfinite().all())}")
        else:
            print(f"{index:4d}  {result}")
'''


def print_graph(gm: fx.GraphModule, title: str, constants_file: str = "constants.pt",
                names: Mapping[str, str] | None = None) -> GraphCode:
    """Print ``gm`` as a module with a class ``Graph``, a function ``inputs()`` and a main part.

    Args:
        gm: a graph with ``meta["val"]`` on its placeholders; symbolic sizes become their hints.
        title: first line of the module's docstring.
        constants_file: name, beside the module, from which it loads the tensors of ``get_attr`` nodes.
        names: of the parameters behind placeholders, by the placeholder's.
    """
    printer = _Printer(names or {})
    graph = printer.graph_class("Graph", gm)
    values = [(n.name, printer.random_input(n.meta.get("val"))) for n in gm.graph.nodes if n.op == "placeholder"]
    obstacles = tuple(dict.fromkeys(printer.obstacles))
    doc = [title, "", *([f"Does not run as it stands; it has {o}." for o in obstacles] or RUNS)]
    parts = ['"""' + "\n".join(doc).replace("\\", "\\\\").replace('"""', "'''") + '\n"""', ""]
    parts += [f"import {name}" + ("  # defines torch.ops.quartet" if name == OP_MODULE else "")
              for name in sorted(printer.imports)]
    if printer.constants:
        parts += ["from pathlib import Path", "",
                  f"CONSTANTS = torch.load(Path(__file__).with_name({constants_file!r}), weights_only=True)"]
    parts += ["", RANDOM, ""]
    for nested in printer.classes:
        parts += [nested, "", ""]
    parts += [graph, "", "", "def inputs():", '    """One value a placeholder, in order."""', "    return ("]
    parts += [f"        {text},".ljust(72) + f"  # {name}  {printer.names.get(name, '')}".rstrip()
              for name, text in values]
    parts += ["    )", "", MAIN.rstrip(), ""]
    return GraphCode("\n".join(parts), printer.constants, obstacles)
