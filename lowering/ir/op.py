"""An op of the IR is one object, declared on its reference function.

    @op(fake=_hadamard_fake, decompose=decompositions.hadamard, strides="any", mergeable=True)
    def hadamard(x: Tensor, n: int, signs: Tensor | None, inverse: bool, dtype: torch.dtype) -> Tensor:
        return reference.hadamard(x, n, signs, inverse, dtype)

    @hadamard.provider("triton", "cuda")
    def _hadamard_triton(x, n, signs, inverse, dtype): ...

The schema follows from the annotations of the reference. ``torch.library.infer_schema`` writes the same but for sizes:
to it every int is a SymInt, here those that are annotated as :data:`Size`.

**Providers** are the implementations of an op, in order of preference and the reference last. ``quartet::hadamard``
runs the first that supports the device of its arguments; each can be called by its name too, as
``quartet::hadamard.triton``. Where the first takes every device of its type it is called without a detour through here,
and one that is ``replayed`` without Python (``quartet.runtime.replay``) from the third call of a kind on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from quartet.runtime.compat import OpOverload
from quartet.runtime.devices import Target
from quartet.runtime.replay.library import LAUNCHER
from quartet.runtime.replay.recorder import tensors_of

Size = Annotated[int, "SymInt"]
"""Annotates an argument that may be symbolic."""

Implementation = Callable[..., Any]
Supports = Callable[[Target], str | None]

NAMESPACE, REFERENCE = "quartet", "reference"
_library = torch.library.Library(NAMESPACE, "DEF")
_TYPES: dict[Any, str] = {Tensor: "Tensor", int: "int", Size: "SymInt", float: "float", bool: "bool", str: "str",
                          torch.dtype: "ScalarType", torch.device: "Device"}
_STRIDES = {  # what Inductor may do to the layout of arguments
    "any": (torch.Tag.flexible_layout,), "exact": (torch.Tag.needs_exact_strides,), None: ()}


class DeclarationError(TypeError):
    """An op or provider that cannot be declared so; the message says what of it."""


def everywhere(target: Target) -> str | None:
    """``Provider.supports`` of what takes every device of its type."""
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Attributes:
        name: an identifier, of which an op has each once.
        device: the type of device whose tensors it takes, None for any.
        run: the implementation. What it needs it imports when it first runs.
        supports: target → None, or why not. Asked once a process and device.
        foresees: the same as far as it is told at once, where ``supports`` may build something; else None.
        replayed: see :meth:`Op.provider`.
        exact: it gives the reference's bits, not only what ``kernels.reference.tolerance`` allows.
        ahead: launches the kernels of such a call and does nothing else, so that they can be compiled by it for tensors
            without memory; None for what is compiled when it first runs. It gets no owner.
    """

    name: str
    device: str | None
    run: Implementation
    supports: Supports = everywhere
    replayed: bool = False
    exact: bool = True
    ahead: Implementation | None = None
    foresees: Supports | None = None

    def declines(self, target: Target, at_once: bool = False) -> str | None:
        """Why it does not run on a target, None where it does; ``at_once``: as it ``foresees``."""
        if self.device not in (None, target.type):
            return f"runs on {self.device}, not on {target.type}"
        return (at_once and self.foresees or self.supports)(target)


class Op:
    """An op and all that is known of it; made by :func:`op`.

    Attributes:
        name, schema: ``hadamard``, and what stands behind the name in its declaration.
        reference: the specification, in plain PyTorch.
        fake: the reference for shapes and dtypes only.
        decompose: the reference as Inductor inlines it; None where Inductor calls the op.
        mergeable: two nodes of one direction with equal arguments are one.
        overload: the target of its nodes.
        providers: its implementations, the preferred one first and the reference last.
    """

    def __init__(self, reference: Implementation, name: str, schema: str, fake: Implementation,
                 decompose: Implementation | None, tags: Sequence[torch.Tag], mergeable: bool,
                 supports: Supports = everywhere) -> None:
        self.reference, self.name, self.schema, self.fake = reference, name, schema, fake
        self.decompose, self.mergeable = decompose, mergeable
        self._tags = tuple(tags)
        self.providers: tuple[Provider, ...] = (Provider(REFERENCE, None, reference, supports),)
        self._overloads: dict[str, OpOverload] = {}
        self._registrations: list[torch.library.Library] = []  # each lasts as long as its object
        self._by_device: dict[str, Implementation] = {}  # what C++ may come before, which takes the key of its device
        self._owner: int = -1
        self.overload = self._define("default")
        _library.impl(name, self._run, "CompositeExplicitAutograd")

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def provider(self, name: str, device: str, supports: Supports = everywhere, before: str = REFERENCE,
                 replayed: bool = False, owner: str | None = None, exact: bool = True,
                 ahead: Implementation | None = None,
                 foresees: Supports | None = None) -> Callable[[Implementation], Implementation]:
        """Declare the decorated function an implementation, preferred to the provider called ``before``.

        Args:
            replayed: on a GPU, C++ may repeat what it launches: it does so by ``quartet.kernels.launcher`` or
                ``quartet.kernels.triton.launch`` alone, and what it returns and launches depends on nothing but its
                arguments' values and, of tensors, their dtypes, devices, sizes, strides and alignment.
            owner: a tensor among the arguments for which results may be kept (``quartet.runtime.slots.weights``); the
                rest holds where it is None.
            exact: see :class:`Provider`.
            ahead: see there; what is ``replayed`` is its own.
            foresees: see there.

        Raises:
            DeclarationError: a name that is taken or no identifier, or no provider called ``before``.
        """
        names = [provider.name for provider in self.providers]
        if name in names or not name.isidentifier() or name == "default":
            raise DeclarationError(f"op {self.name!r}: {name!r} is "
                                   f"{'taken' if name in names else 'no name of a provider'}")
        if before not in names:
            raise DeclarationError(f"op {self.name!r} has no provider {before!r}; possible: {', '.join(names)}")

        def declare(run: Implementation) -> Implementation:
            at = names.index(before)
            if owner is not None:
                self._owner = list(inspect.signature(self.reference).parameters).index(owner)
            made = Provider(name, device, run, supports, replayed, exact, run if replayed else ahead, foresees)
            self._provide((*self.providers[:at], made, *self.providers[at:]))
            return run

        return declare

    def withdraw(self, name: str) -> None:
        """Forget the provider of a name. Its overload stays declared: graphs may hold it."""
        if name == REFERENCE or name not in [provider.name for provider in self.providers]:
            raise DeclarationError(f"op {self.name!r} has no provider {name!r} to withdraw")
        self._provide(tuple(provider for provider in self.providers if provider.name != name))

    def choose(self, target: Target, disabled: Collection[str] = (),
               exact: bool = False) -> tuple[Provider | None, dict[str, str]]:
        """The first provider that supports a target, and why those before it do not.

        Args:
            disabled: names that are left out, each of an op and its provider, ``"hadamard.triton"``.
            exact: so are providers that do not give the reference's bits.
        """
        reasons: dict[str, str] = {}
        for provider in self.providers:
            name = f"{self.name}.{provider.name}"
            reason = f"disabled: disable_kernels names {name!r}" if name in disabled else provider.declines(target)
            if reason is None and exact and not provider.exact:
                reason = "adds up in another order than the reference; portable_rounding asks for the reference's bits"
            if reason is None:
                return provider, reasons
            reasons[provider.name] = reason
        return None, reasons

    def ahead(self, overload: OpOverload, target: Target) -> Implementation | None:
        """:attr:`Provider.ahead` of what computes an overload on a target."""
        if overload is self.overload:
            provider, _ = self.choose(target)
        else:
            provider = next(p for p in self.providers if self._overloads.get(p.name) is overload)
        return None if provider is None else provider.ahead

    @property
    def owner(self) -> str | None:
        """The argument for which results may be kept."""
        return None if self._owner < 0 else list(inspect.signature(self.reference).parameters)[self._owner]

    def overload_of(self, provider: Provider) -> OpOverload:
        """What calls a provider whatever is preferred to it."""
        return self._overloads[provider.name]

    def _define(self, overload: str) -> OpOverload:
        name = self.name if overload == "default" else f"{self.name}.{overload}"
        _library.define(name + self.schema, tags=self._tags)
        torch.library.register_fake(f"{NAMESPACE}::{name}", self.fake, lib=_library)
        defined = getattr(getattr(getattr(torch.ops, NAMESPACE), self.name), overload)
        _OPS[defined] = self
        return defined

    def _provide(self, providers: tuple[Provider, ...]) -> None:
        self.providers = providers
        self._registrations.clear()
        self._by_device.clear()
        for called in (self.name, *(f"{self.name}.{name}" for name in self._overloads)):
            LAUNCHER.withdraw(called)
        for provider in providers:
            if provider.name not in self._overloads:
                self._overloads[provider.name] = self._define(provider.name)
            called, run = f"{self.name}.{provider.name}", provider.run
            if provider.replayed and provider.device is not None:
                run = LAUNCHER.offer(called, self.schema, run, provider.device, self._owner)
            self._register(called, run, "CompositeExplicitAutograd")
        for device in sorted({provider.device for provider in providers if provider.device is not None}):
            taking = [provider for provider in providers if provider.device in (None, device)]
            run = taking[0].run if taking[0].supports is everywhere else self._run_first_supported()
            if all(provider.replayed or provider.name == REFERENCE for provider in taking):
                self._by_device[device] = LAUNCHER.offer(self.name, self.schema, run, device, self._owner)
            else:
                self._register(self.name, run, device.upper())

    def _run(self, *args: Any) -> Any:
        """What the first provider of the arguments' device computes, for devices without a kernel of their own."""
        for x in tensors_of(args) if self._by_device else ():
            if x.device.type in self._by_device:
                return self._by_device[x.device.type](*args)
        return self.reference(*args)

    def _register(self, name: str, run: Implementation, key: str) -> None:
        library = torch.library.Library(NAMESPACE, "IMPL")
        library.impl(name, run, key)
        self._registrations.append(library)

    def _run_first_supported(self) -> Implementation:
        chosen: dict[torch.device, Implementation] = {}

        def run(*args: Any) -> Any:
            device = next(x.device for x in tensors_of(args))
            known = chosen.get(device)
            if known is None:
                provider, _ = self.choose(Target.of(device))
                assert provider is not None, "the reference takes what is left"
                known = chosen[device] = provider.run
            return known(*args)

        return run


_OPS: dict[OpOverload, Op] = {}  # by every overload


def op(*, fake: Implementation, decompose: Implementation | bool = False, name: str | None = None,
       strides: Literal["any", "exact"] | None = None, mergeable: bool = False, random: bool = False,
       cudagraph_safe: bool = True, mutates: Collection[str] = (),
       supports: Supports = everywhere) -> Callable[[Implementation], Op]:
    """Declare the decorated function the reference of an op.

    Args:
        fake, mergeable: see :class:`Op`.
        decompose: what Inductor inlines; True, the reference itself; False, nothing, Inductor calls the op.
        name: that of the function unless given.
        strides: of arguments: ``"any"``, Inductor need not realise them in a fixed layout; ``"exact"``, as traced.
        random: draws from PyTorch's generator.
        cudagraph_safe: a CUDA graph can hold it.
        mutates: arguments that it writes to.
        supports: see :class:`Provider`, of the reference.

    Raises:
        DeclarationError: an annotation that no schema has, or an argument to write to that there is not.
    """
    tags = [*_STRIDES[strides]]
    if random:
        tags.append(torch.Tag.nondeterministic_seeded)
    if not cudagraph_safe:
        tags.append(torch.Tag.cudagraph_unsafe)

    def declare(reference: Implementation) -> Op:
        called = name or reference.__name__
        inlined = reference if decompose is True else decompose or None
        return Op(reference, called, schema_of(reference, mutates), fake, inlined, tags, mergeable,
                  supports)

    return declare


def ops() -> tuple[Op, ...]:
    """All that are declared, in the order of their declaration."""
    return tuple(dict.fromkeys(_OPS.values()))


def op_of(target: Any) -> Op | None:
    """The op whose overload, or that of one of its providers, a graph calls; None for what is not of this IR."""
    return _OPS.get(target)


def schema_of(function: Implementation, mutates: Collection[str] = ()) -> str:
    """``(Tensor x, int n=1) -> Tensor`` from a function's annotations."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    unknown = [name for name in mutates if name not in parameters]
    missing = [name for name in (*parameters, "return") if name not in hints]
    if unknown or missing:
        raise DeclarationError(f"{function.__name__}: {f'no argument {unknown[0]!r}' if unknown else ''}"
                               f"{f'no annotation of {missing[0]!r}' if missing else ''}")
    arguments = []
    aliases = iter("abcdef")
    for name, parameter in parameters.items():
        written = _written(hints[name], function)
        if name in mutates:
            written = written.replace("Tensor", f"Tensor({next(aliases)}!)", 1)
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default}"
        arguments.append(f"{written} {name}{default}")
    return f"({', '.join(arguments)}) -> {_written(hints['return'], function)}"


def _written(annotation: Any, function: Implementation) -> str:
    """An annotation in the language of schemas."""
    if annotation in _TYPES:
        return _TYPES[annotation]
    if annotation is NoneType:
        return "()"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        (given,) = (kind for kind in inner if kind is not NoneType)
        return f"{_written(given, function)}?"
    if origin is list:
        return f"{_written(inner[0], function)}[]"
    if origin is tuple:
        return f"({', '.join(_written(kind, function) for kind in inner)})"
    raise DeclarationError(f"{function.__name__}: no schema has {annotation!r}")
