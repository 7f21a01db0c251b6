"""Running a compilation only to look at it: no code is generated and the model's state is put back."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quartet.runtime.compat import any_number_of_compilations, compiled_settings, no_sizes_seen
from quartet.runtime.in_place import inside_wrappers, not_compiled
from quartet.runtime.sizes import hint
from quartet.runtime.slots.amax import frozen
from quartet.runtime.view_ops import ORDERS, RESHAPES, aten


class Capture:
    """An ``inner_compile`` for compile_fx that runs graphs eagerly and counts what forward leaves for backward."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.saved_bytes = 0
        self.notes: tuple[str, ...] = ()

    def __call__(self, gm: GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        self.graphs.append(gm)
        if not kwargs.get("is_backward"):
            self.saved_bytes += 0 if kwargs.get("is_inference") else saved_bytes(gm)
            if len(self.graphs) > 1:
                self.notes = (f"{len(self.graphs)} graphs: the model has graph breaks",)
        run = self._runner(gm)

        def boxed(args: list[Any]) -> Any:
            flat = list(args)
            args.clear()
            return run(*flat)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def _runner(self, gm: GraphModule) -> Callable[..., Any]:
        return gm.forward


class Pretence(Capture):
    """A ``Capture`` whose graphs give zeros of the right kind: what they hold may run on no device that is here."""

    def _runner(self, gm: GraphModule) -> Callable[..., Any]:
        made = [node.meta["val"] if isinstance(node, Node) else node for node in gm.graph.output_node().args[0]]

        def zero(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.zeros([hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
            return None if value is None else hint(value)

        return lambda *inputs: [zero(value) for value in made]


def saved_bytes(forward: GraphModule) -> int:
    """Bytes of the storages that a partitioned forward graph returns and that are not inputs.

    The user's own outputs are counted too when they are kept; views of one storage count once.
    """
    output = forward.graph.output_node().args[0]
    seen: set[Node] = set()
    total = 0
    for node in output if isinstance(output, (list, tuple)) else [output]:
        if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        origin = storage_origin(node)
        if origin.op == "placeholder" or origin in seen:
            continue
        seen.add(origin)
        value = origin.meta["val"]
        total += hint(value.numel()) * value.element_size()
    return total


_SHARING = RESHAPES | ORDERS | {aten.alias.default, aten.expand.default}


def storage_origin(node: Node) -> Node:
    """The node that allocates what ``node`` views."""
    while node.target in _SHARING:
        node = node.all_input_nodes[0]
    return node


def settings_of(model: Any) -> tuple[Any, str | None, dict[str, Any] | None]:
    """(the module itself, mode, options) of a compiled or plain module; of a function it is the function."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.Module):
        inner = inside_wrappers(inner)
    found = compiled_settings(model)
    return inner, *(found if any(found) else compiled_settings(inner))


def referred_to(model: Any) -> list[nn.Module]:
    """The module itself; of a function the modules that it is a method of, closes over, names or has as defaults, the
    largest of those that hold each other."""
    if isinstance(model, nn.Module):
        return [model]
    found = {id(value): value for value in _variables(model) if isinstance(value, nn.Module)}
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for module in found.values() if id(module) not in inner]


def _variables(function: Any) -> Iterator[Any]:
    """What a function refers to: its variables and theirs where they are compiled or plain functions."""
    seen: set[int] = set()
    left = [function]
    while left:
        value = left.pop(0)
        value = getattr(value, "_torchdynamo_orig_callable", value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if inspect.ismethod(value):
            left += [value.__self__, *vars(value.__self__).values()] if hasattr(value.__self__, "__dict__") else []
            value = value.__func__
        if isinstance(value, functools.partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif inspect.isfunction(value):
            known = inspect.getclosurevars(value)
            left += [*known.nonlocals.values(), *known.globals.values(), *(value.__defaults__ or ())]


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Put buffers, gradients and the random state back afterwards, and of a function what its optimizers have stepped;
    compile as if for the first time, whatever of the model is compiled in place, and without using up dynamo's limits.

    The histories of delayed scaling are not written meanwhile.
    """
    roots = referred_to(model)
    buffers = [(b, b.detach().clone()) for root in roots for b in root.buffers()]
    gradients = [(p, p.grad) for root in roots for p in root.parameters()]
    if not isinstance(model, nn.Module):
        gradients = [(p, None if grad is None else grad.clone()) for p, grad in gradients]
    optimizers = [] if isinstance(model, nn.Module) else [
        (value, copy.deepcopy(value.state_dict())) for value in _variables(model)
        if isinstance(value, torch.optim.Optimizer)]
    stepped = [(p, p.detach().clone()) for optimizer, _ in optimizers for g in optimizer.param_groups
               for p in g["params"]]
    in_place = not_compiled(model) if isinstance(model, nn.Module) else nullcontext()
    with torch.random.fork_rng(), any_number_of_compilations(), no_sizes_seen(), frozen(), in_place:
        try:
            yield
        finally:
            with torch.no_grad():
                for value, kept in (*buffers, *stepped):
                    value.copy_(kept)
            for parameter, grad in gradients:
                parameter.grad = grad
            for optimizer, state in optimizers:
                optimizer.load_state_dict(state)
