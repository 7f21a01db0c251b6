"""Which model a graph belongs to, and what its parameters and modules are called there.

Names are those of ``named_modules()`` of the module that was compiled, found by identity, so that it does not matter by
which way a graph has reached a module: from the stack after a graph break, through a wrapper's ``__getattr__``, as a
variable of a function. For a function the module is the first on that way. What is in no module keeps the name of the
variable. Nothing here outlives the compilation but weak references to modules.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quartet.model.flat import all_parameters, is_view, own_parameters, path_in_model
from quartet.model.parts import parts_of
from quartet.model.scope import compiling, source_bases, source_name
from quartet.passes import pipeline
from quartet.passes.naming import module_name, module_path, parameter_path, stacks
from quartet.runtime import compat
from quartet.runtime.frames import calls

_seen: dict[int, ref[nn.Module]] = {}  # modules that have given names, the latest last


@dataclass(frozen=True)
class Names:
    """What one graph's inputs and modules are called.

    Attributes:
        weights: index of each input that is a parameter → its name.
        modules: what dynamo writes for a module → its name.
        regions: of each ``nested_compile_region`` by signature: parameter name by input, as its first call has them.
        widths: how many features the layers of the model read, those that are in no graph included.
        written: how many features they make.
        alone: name in the model of the layer that was compiled by itself; empty where more was.
        tables: names of the layers in the graph whose weights are those of embeddings.
        parts: names of layers of blocks whose results only the block reads, where the graph is a part of the model.
        block: what was compiled is in an entry of a list of modules, and no single layer.
        layers: how many parameters of the model are matrices or more.
        inputs: index → name of the floating-point inputs of the model; none where the graph is a part of the model, as
            after a graph break or of a block that is compiled by itself, or the model is a single layer.
        compiled: the module that was compiled, or for a function the first that gave names.
        place: of the compiled module in the model whose call compiles it, ``"layers.0"``; empty where it is the model.
        model: the largest module that is known around the graph. known: names of all its modules and parameters, the
            latter as modules where they are their weight. matrices: those of its parameters with two axes or more.
        twins: layer of a region's first call → what it is called in the other calls, which share its code.
        serves: name of the module in ``model`` whose code the graph is of. alike: names of others of its class.
        unbroken: nothing of what was compiled is still to come. complete: nor of the model.
        plain: name of a tensor that is the weight of a linear layer and no parameter; empty where there is none.
        views: parameters are views that FSDP version 1 makes anew for each forward.
    """

    weights: Mapping[int, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    regions: Mapping[pipeline.Signature, Mapping[int, str]] = field(default_factory=dict)
    widths: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    alone: str = ""
    tables: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()
    block: bool = False
    layers: int = 0
    inputs: Mapping[int, str] = field(default_factory=dict)
    compiled: nn.Module | None = None
    place: str = ""
    model: nn.Module | None = None
    known: frozenset[str] = frozenset()
    matrices: frozenset[str] = frozenset()
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    serves: str = ""
    alike: tuple[str, ...] = ()
    unbroken: bool = True
    complete: bool = True
    plain: str = ""
    views: bool = False

    def full(self, name: str) -> str:
        """The name in ``model`` of what is called ``name`` in the compiled module."""
        return ".".join(filter(None, (self.place, name)))

    def others(self, name: str) -> list[tuple[str, str]]:
        """What the code of a module in the graph serves too: the name of each in ``model``, and its place."""
        whole, own = self.full(name), self.serves == self.place
        alike = self.alike if whole.startswith(self.serves) else ()
        return [(module_name(other + whole[len(self.serves):]), other if own else self.place) for other in alike] + [
            (self.full(twin), self.place) for twin in self.twins.get(name, ())]


def names_of(gm: GraphModule, example_inputs: Sequence[Any]) -> Names:
    """The names for a graph that dynamo has captured, and is compiling now if they are to be those of the model."""
    models = _Models()
    weights = {index: models.parameter(node, value) for index, (node, value) in enumerate(
        zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)) if models.is_parameter(node, value)}
    modules = {path: models.module(key, path) for key, path in stacks(gm)}
    regions, twins = _regions(gm, weights)
    inputs = dict(models.inputs(gm, example_inputs))
    return models.around(Names(weights, modules, regions, models.widths(), models.written(), layers=models.layers(),
                               inputs=inputs, compiled=models.compiled(), place=models.place(), twins=twins,
                               plain=_plain(gm, weights), views=bool(models.views)))


def _holds(path: str, other: str) -> bool:
    """Whether the module of one name holds that of another, or is it."""
    return not path or f"{other}.".startswith(f"{path}.")


class _Members:
    """A module, and the names of its parameters and submodules by identity; of several names the first."""

    def __init__(self, root: nn.Module) -> None:
        self.root, self.names = root, dict[int, str]()
        for wrapped, module in nn.Module.named_modules(root):
            path = path_in_model(wrapped)
            self.names.setdefault(id(module), path)
            for name, parameter in own_parameters(module).items():
                self.names.setdefault(id(parameter), f"{path}.{name}" if path else name)


class _Models:
    """The modules that a graph's parameters can be of, found from what dynamo compiles and from the calls around it."""

    def __init__(self) -> None:
        self.scope = compiling()
        outside, inside, part = calls(sys._getframe())
        self.outside, self.inside = _unwrapped(outside), _unwrapped(inside)
        self.bucketed = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in (*outside, *inside))
        self.part = None if part is None else unwrapped(part)
        self._members: dict[int, _Members] = {}
        self.roots: dict[int, nn.Module] = {}  # those that have given names
        self.views: list[str] = []  # names of the inputs that are parameters and views

    def is_parameter(self, node: Node, value: Any) -> bool:
        """Whether an input of dynamo's graph is a parameter, or a view of FSDP's that stands for one."""
        if isinstance(value, nn.Parameter) or node.name in self.views:
            return True
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is None or self.scope is None or not is_view(value):
            return False
        held = id(self.scope.value(source))
        if any(held in self._of(root).names for root in self._candidates(source)):
            self.views.append(node.name)
        return node.name in self.views

    def parameter(self, node: Node, value: torch.Tensor) -> str:
        """The name of a parameter, the input ``node`` of dynamo's graph."""
        source = getattr(node.meta.get("grapharg"), "source", None)
        seen = None if self.scope is None or source is None else self.scope.value(source)
        for root in self._candidates(source):
            names = self._of(root).names
            for parameter in (value, seen):
                if id(parameter) in names:
                    self._remember(root)
                    lone = "." not in names[id(parameter)] and all(root is not module for module in self._compiled())
                    return (parameter_path(source_name(source)) if lone else "") or names[id(parameter)]
        return parameter_path(source_name(source)) or node.name

    def module(self, key: str, path: str) -> str:
        """The name of a module by its ``id`` in text, or from what dynamo writes for it."""
        if key.isdecimal():
            for root in (*self._compiled(), *self.roots.values()):
                if int(key) in self._of(root).names:
                    return self._of(root).names[int(key)]
        return module_path(path)

    def widths(self) -> frozenset[int]:
        """The last sizes of all matrices that layers of the model multiply."""
        return frozenset(width for root in self._whole() for width in _read(root))

    def written(self) -> frozenset[int]:
        """The widths of what all layers of the model make."""
        return frozenset(width for root in self._whole() for width in _made(root))

    def layers(self) -> int:
        """How many parameters of the model have two dimensions or more."""
        return sum(map(_matrices, self._whole()))

    def inputs(self, gm: GraphModule, values: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """The inputs that are the model's own floating-point arguments, where the graph starts with the model, or those
        of a function of several models."""
        roots, compiled = list(self._whole()), self._compiled()
        own = all(m is roots[0] for m in compiled) if compiled else all(map(operator.is_, roots, self.roots.values()))
        if self.scope is None or self.scope.resumed or not own or not any(_matrices(root) > 1 for root in roots):
            return
        for index, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), values, strict=False)):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not self.is_parameter(node, value):
                source = getattr(node.meta.get("grapharg"), "source", None)
                if source is not None and self._first_module(source) is None:
                    yield index, parameter_path(source_name(source)) or node.name

    def compiled(self) -> nn.Module | None:
        """What was compiled, or for a function the first module that gave names."""
        return next(iter([*self._compiled(), *self.roots.values()]), None)

    def place(self) -> str:
        """Where the compiled module is in the outermost one that is being called."""
        for compiled in [self.part] if self.part is not None else list(self.roots.values()):
            for root in self.outside:
                if root is not compiled and id(compiled) in self._of(root).names:
                    return self._of(root).names[id(compiled)]
        return ""

    def around(self, names: Names) -> Names:
        """``names`` with what is known of the model beyond the graph."""
        model = next(iter(self._whole()), None)
        if model is None:
            return names
        members, scope = self._of(model).names, self.scope
        matrices = [members[id(p)] for p in all_parameters(model) if p.dim() > 1 and id(p) in members]
        compiled = self._compiled()
        unbroken = (scope is None or not scope.broken) and not self.bucketed and all(m is compiled[0] for m in compiled)
        running = compiled[-1] if compiled else model
        serves = members.get(id(running), "")
        alike = [path_in_model(path) for path, module in nn.Module.named_modules(model) if type(module) is type(running)
                 and module is not running and not _holds(path, serves)
                 and not _holds(serves, path)] if serves else []
        complete = unbroken and not names.place
        own = {module_name(names.full(name)): module_name(name) for name in names.weights.values()}
        tables = set(_tables(model))
        parts = frozenset() if complete else parts_of(model, own)
        return replace(names, parts=frozenset(map(own.__getitem__, parts)), model=model,
                       alone=names.place if names.place in own else "",
                       block=names.place not in own and any(map(str.isdecimal, names.place.split("."))),
                       tables=frozenset(own[table] for table in tables & own.keys()),
                       known=frozenset(map(module_name, members.values())),
                       matrices=frozenset(matrices), serves=serves, alike=tuple(alike), unbroken=unbroken,
                       complete=complete)

    def _of(self, root: nn.Module) -> _Members:
        if id(root) not in self._members:
            self._members[id(root)] = _Members(root)
        return self._members[id(root)]

    def _remember(self, root: nn.Module) -> None:
        if id(root) not in self.roots:
            self.roots[id(root)] = root
            _seen.pop(id(root), None)
            _seen[id(root)] = ref(root)

    def _compiled(self) -> list[nn.Module]:
        """What was compiled, and for a function what it calls, the outermost first."""
        return ([] if self.part is None else [self.part]) + self.inside

    def _candidates(self, source: Any) -> Iterator[nn.Module]:
        """Modules that may hold a parameter, in the order in which they name it."""
        yield from self._compiled()
        first = self._first_module(source)
        if self.scope is not None and self.scope.resumed:  # the way to it may start from the stack
            earlier = [module for made in reversed(_seen.values()) if (module := made()) is not None]
            yield from (module for module in earlier if first is None or id(first) in self._of(module).names)
        if first is not None:
            yield first

    def _first_module(self, source: Any) -> nn.Module | None:
        """The first module on the way from a variable to a parameter."""
        if self.scope is None:
            return None
        values = (self.scope.value(base) for base in source_bases(source))
        return next((unwrapped(value) for value in values if isinstance(value, nn.Module)), None)

    def _whole(self) -> Iterable[nn.Module]:
        """The largest modules that are known around the graph."""
        compiled = self._compiled()[:1] or list(self.roots.values())
        for module in compiled:
            yield next((root for root in self.outside if id(module) in self._of(root).names), module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside of what torch.compile and data parallelism put around it."""
    while (inner := compat.inside(module)) is not None:
        module = inner
    return module


def _matrices(root: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in all_parameters(root))


def _unwrapped(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in map(unwrapped, modules)}.values())


def _read(root: nn.Module) -> Iterator[int]:
    """How many features each layer with a matrix of weights reads; an embedding reads none.

    Only what is stored is looked at: a parametrised weight would be computed, and may change what it is computed from.
    """
    for module in nn.Module.modules(root):
        width = vars(module).get("in_features")
        weight = own_parameters(module).get("weight")
        if isinstance(width, int):
            yield width
        elif weight is not None and weight.dim() == 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield int(weight.shape[0 if "nf" in vars(module) else 1])  # Conv1D of GPT-2 is stored [in, out]


def _tables(root: nn.Module) -> Iterator[str]:
    """The names of embeddings, and of the heads that have their weights."""
    layers = [(path_in_model(path), module, own_parameters(module).get("weight"))
              for path, module in nn.Module.named_modules(root)]
    tables = {id(weight) for _, module, weight in layers if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    return (path for path, _, weight in layers if weight is not None and id(weight) in tables)


def _plain(gm: GraphModule, weights: Mapping[int, str]) -> str:
    """The first input that is a linear layer's weight and no parameter."""
    index = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    for node in gm.graph.find_nodes(op="call_function", target=nn.functional.linear):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if isinstance(weight, Node) and weight in index and index[weight] not in weights:
            source = getattr(weight.meta.get("grapharg"), "source", None)
            return parameter_path(source_name(source)) or weight.name
    return ""


def _made(root: nn.Module) -> Iterator[int]:
    """How many features each layer makes; of what is stored, as of those that it reads."""
    for module in nn.Module.modules(root):
        known = (vars(module).get(name) for name in ("out_features", "embedding_dim", "out_channels", "hidden_size"))
        width = next((size for size in known if isinstance(size, int)), None)
        weight = own_parameters(module).get("weight")
        if width is not None:
            yield width
        elif weight is not None and weight.dim() == 2:
            yield int(weight.shape["nf" in vars(module)])


def _regions(gm: GraphModule, weights: Mapping[int, str]) -> tuple[dict[pipeline.Signature, dict[int, str]],
                                                                   dict[str, tuple[str, ...]]]:
    """Parameter name by input of each region, and what the layers of its first call are called in the others. Where
    calls of one signature disagree, an input is a parameter only if it is one in all of them."""
    names = {node: weights[i] for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if i in weights}
    found: dict[pipeline.Signature, dict[int, str]] = {}
    twins: dict[str, dict[str, None]] = {}
    for call in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        operands = call.args[2:]
        body = pipeline.signature(o.meta.get("example_value") if isinstance(o, Node) else o for o in operands)
        own = {i: names[o] for i, o in enumerate(operands) if o in names}
        known = found.setdefault(body, own)
        found[body] = {i: name for i, name in known.items() if i in own}
        for i, name in found[body].items():
            if own[i] != name:
                twins.setdefault(module_name(name), {})[module_name(own[i])] = None
    return found, {name: tuple(others) for name, others in twins.items()}
