"""The user's model and inputs, by the name of the function that makes them. Nothing here imports PyTorch."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from quartet.cli.usage import UsageError
from quartet.nearest import did_you_mean

T = TypeVar("T")


class CodeError(Exception):
    """The user's own code raised; the message has its frames and a sentence."""


def factory_of(target: str) -> Callable[[], Any]:
    """The function that ``"MODULE:FACTORY"`` names, found without importing PyTorch for it."""
    module_name, _, name = target.partition(":")
    with _own_code(f"importing {module_name!r}"):
        module = _import(module_name)
    factory = _factory(module, name)
    _check_callable(target, factory)
    return factory


def made_by(target: str, factory: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs and model that the function of :func:`factory_of` returns."""
    with _own_code(target):
        made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, Mapping))):
        shape = (f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple)
                 else type(made).__name__)
        raise UsageError(f"{target} returned {shape}; expected (model, inputs) with inputs a tuple or a dict, "
                         "for example 'return model, (tokens,)'")
    model, inputs = made
    return ((), dict(inputs), model) if isinstance(inputs, Mapping) else (inputs, {}, model)


def running(target: str, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], work: Callable[[], T]) -> T:
    """What ``work`` returns; where it raises and so does the model by itself, CodeError for what a compiler says."""
    try:
        return work()
    except Exception as error:
        failed = error
    with _own_code(f"the model of {target}, run by itself with these inputs,"):
        model(*args, **kwargs)
    raise failed


@contextmanager
def _own_code(what: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        said = "".join(_own_frames(traceback.TracebackException.from_exception(error)).format())
        raise CodeError(f"{said}quartet: {what} raised {type(error).__name__}") from None


def _own_frames(error: traceback.TracebackException) -> traceback.TracebackException:
    """Without the frames of this package, of PyTorch and of the import system, in causes too."""
    torch = sys.modules.get("torch")
    others = tuple(f"{os.path.dirname(path)}{os.sep}" for path in (
        sys.modules["quartet"].__file__, importlib.__file__, getattr(torch, "__file__", None)) if path)
    error.stack = traceback.StackSummary.from_list(
        [frame for frame in error.stack if not frame.filename.startswith((*others, "<frozen importlib"))])
    for cause in filter(None, (error.__cause__, error.__context__)):
        _own_frames(cause)
    return error


def _check_callable(target: str, factory: Callable[[], Any]) -> None:
    """Refuse a factory that needs arguments."""
    try:
        parameters = inspect.signature(factory)
    except (TypeError, ValueError):  # of a builtin that does not say
        return
    try:
        parameters.bind()
    except TypeError as error:
        raise UsageError(f"{target} takes {parameters} and is called without arguments: {error}; give them defaults, "
                         "or name a function that needs none") from None


def _import(name: str) -> ModuleType:
    if not all(name.split(".")):
        raise UsageError(f"{name!r} is not a module's name: write it from {os.getcwd()} or the Python path on, with a "
                         "dot between folders, for example 'package.my_model'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise
        parent = Path(*name.split(".")[:-1])
        beside = [".".join((*parent.parts, path.stem)) for path in sorted(parent.iterdir())
                  if path.suffix == ".py" or (path / "__init__.py").exists()] if parent.is_dir() else []
        raise UsageError(f"no module {name!r} (searched {os.getcwd()} and the Python path); "
                         f"{did_you_mean(name, beside)}write it with dots and without '.py'") from None


def _factory(module: ModuleType, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
    wrong = f"is not a function but {type(found).__name__}" if found is not None else "does not exist"
    raise UsageError(f"{name!r} {wrong} in module {module.__name__}; {did_you_mean(name, own)}"
                     f"possible: {', '.join(own) or 'nothing, it defines no function'}")
