"""A launch is data: a function on a device, a grid, and arguments in the order of the function's parameters.

:func:`launch` launches what nvcc built, or any function that the driver has loaded; Triton launches what it compiled by
itself. What records launches on a thread, to repeat them without Python, learns of both (:func:`recorded_by`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

DRIVER = "libcuda.so.1"
_POINTER = ctypes.c_void_p
_SCALARS: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double}

Argument = Tensor | int | float | None


@dataclass(frozen=True)
class Function:
    """A kernel that the driver has loaded.

    Args:
        name: for messages. handle: its ``CUfunction``.
        threads: of a block. shared: bytes of dynamic shared memory; what takes more than 48 KiB was allowed to.
        parameters: ``"*"`` a pointer; ``"i32"``, ``"u64"``, ``"fp32"`` and so on a number.
        owner: what unloads the function when it goes; kept as long as this object is.
    Raises:
        ValueError: a parameter of another type.
    """

    name: str
    handle: int
    threads: int
    shared: int
    parameters: tuple[str, ...]
    owner: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.parameters if kind != "*" and kind not in _SCALARS]
        if unknown:
            raise ValueError(f"{self.name} has a parameter of type {unknown[0]!r}; a launch passes '*' and "
                             f"{', '.join(_SCALARS)}")


class Recorder(Protocol):
    """What learns of the launches on a thread."""

    def launched(self, function: Function, grid: tuple[int, int, int], arguments: Sequence[Argument]) -> None: ...

    def refuse(self, reason: str) -> None:
        """Something was launched that no :class:`Function` describes."""


class _Active(threading.local):
    recorder: Recorder | None = None
    compiling: bool = False


_active = _Active()


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """``recorder`` learns of the launches on this thread."""
    before, _active.recorder = _active.recorder, recorder
    try:
        yield
    finally:
        _active.recorder = before


def active_recorder() -> Recorder | None:
    return _active.recorder


@contextmanager
def compiling_only() -> Iterator[None]:
    """What this thread would launch is compiled and loaded, and not launched: tensors need no memory."""
    before, _active.compiling = _active.compiling, True
    try:
        yield
    finally:
        _active.compiling = before


def only_compiles() -> bool:
    return _active.compiling


def launch(function: Function, grid: tuple[int, ...], arguments: Sequence[Argument]) -> None:
    """Launch a function on the current device and stream.

    Args:
        grid: programs along one to three axes; nothing is launched if there are none.
        arguments: one a parameter: a tensor, whose first element is pointed to, None, or a number.
    Raises:
        ValueError: another number of arguments. RuntimeError: the driver declines; the message has its word for it.
    """
    if len(arguments) != len(function.parameters):
        raise ValueError(f"{function.name} takes {len(function.parameters)} arguments, not {len(arguments)}")
    x, y, z = (*grid, 1, 1)[:3]
    if not x * y * z or _active.compiling:
        return
    values = [packed(kind, argument) for kind, argument in zip(function.parameters, arguments, strict=True)]
    pointers = (_POINTER * len(values))(*(ctypes.addressof(value) for value in values))
    stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else None
    library = driver(DRIVER)
    status = library.cuLaunchKernel(function.handle, x, y, z, function.threads, 1, 1, function.shared, stream, pointers,
                                    None)
    if status:
        said = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(said))
        raise RuntimeError(f"the launch of {function.name} failed with "
                           f"{said.value.decode() if said.value else 'an unknown error'} ({status})")
    if _active.recorder is not None:
        _active.recorder.launched(function, (x, y, z), arguments)


def packed(kind: str, argument: Argument) -> Any:
    """An argument as the parameter of that type, in memory of its own."""
    made: Any = _POINTER if kind == "*" else _SCALARS[kind]
    return made(argument.data_ptr() if isinstance(argument, Tensor) else argument)


@cache
def driver(path: str) -> ctypes.CDLL:
    """The CUDA driver. Raises OSError: there is none."""
    library = ctypes.CDLL(path)
    number = ctypes.c_uint
    library.cuLaunchKernel.argtypes = (_POINTER, *(number,) * 7, _POINTER, _POINTER, _POINTER)
    library.cuGetErrorName.argtypes = (ctypes.c_int, _POINTER)
    return library
