"""Launches that find their compiled kernel by themselves.

Triton's own launch binds, specialises and prints every argument and compares every global that the kernel reads, each
time. What it would find is decided by the constants, the devices, and the kind of each argument; so the first launch
of a combination is Triton's, unless it was compiled ahead, and later ones call what that returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.launcher import Function, active_recorder, only_compiles

_LIMIT = 65535  # of programs along the second and the third axis of a grid
_WARP = 32
_COMPILED: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
_UNDER_WAY: dict[Any, Lock] = {}  # what is compiled just now: another thread that needs it waits


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current device and stream, without fused multiply-adds.

    Args:
        kernel: a ``triton.jit`` function.
        arguments: its parameters up to the first constexpr: tensors, None, ints, floats, and tuples of them; the first
            a tensor, or a tuple that begins with one.
        constants: its constexpr parameters, all of them, and ``num_warps``.
    Raises:
        ValueError: more programs along the grid's second or third axis than CUDA launches.
    """
    full = _, y, z = (*grid, 1, 1)[:3]
    if y > _LIMIT or z > _LIMIT:
        raise _too_wide(kernel, full, arguments)
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    key = id(kernel), torch.cuda.current_device() if first.is_cuda else -1, *constants.values(), *map(_kind, arguments)
    known = _COMPILED.get(key)
    if known is None:
        with _UNDER_WAY.setdefault(key, Lock()):
            known = _COMPILED.get(key)
            if known is None:
                _first(key, kernel, grid, arguments, constants)
                return
    if not only_compiles():
        compiled, values = known
        compiled[full](*arguments, *values)
        _note(compiled, kernel.arg_names, full, arguments)


def _first(key: Any, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...],
           constants: Mapping[str, Any]) -> None:
    """Have Triton launch a kernel, or compile and load it where that is all that is wanted."""
    full, ahead = (*grid, 1, 1)[:3], only_compiles()
    if ahead:
        compiled = kernel.warmup(*arguments, grid=grid, **constants, enable_fp_fusion=False)
    else:
        compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=False)
    if compiled is not None:  # the interpreter returns nothing
        if ahead:
            compiled[full]  # which loads it
        names = kernel.arg_names[len(arguments):]
        _COMPILED[key] = compiled, tuple(constants[name] for name in names)
        if not ahead:
            _note(compiled, kernel.arg_names, full, arguments)
    _UNDER_WAY.pop(key, None)


def _note(compiled: Any, names: Sequence[str], grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Tell what records launches of one that Triton has made."""
    recorder = active_recorder()
    if recorder is None:
        return
    about = compiled.metadata
    if (about.num_ctas != 1 or about.global_scratch_size or about.profile_scratch_size or about.launch_pdl
            or about.launch_cooperative_grid):
        recorder.refuse(f"{about.name} is launched with scratch memory or in clusters")
        return
    kinds = flat([compiled.src.signature[name] for name in names[:len(arguments)]])
    given = flat(arguments)
    passed = [i for i, kind in enumerate(kinds) if kind != "constexpr"]  # not None, nor an integer that is 1
    try:
        function = Function(about.name, compiled.function, about.num_warps * _WARP, about.shared,
                            (*("*" if kinds[i][0] == "*" else kinds[i] for i in passed), "*", "*"), compiled)
    except ValueError as error:
        recorder.refuse(str(error))
        return
    recorder.launched(function, (grid[0], grid[1], grid[2]), (*(given[i] for i in passed), None, None))


def flat(values: Sequence[Any]) -> list[Any]:
    """Values, and those that tuples among them hold, in their order."""
    return [each for value in values for each in (value if isinstance(value, tuple) else (value,))]


def _too_wide(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> ValueError:
    shapes = ", ".join(str(list(x.shape)) for x in flat(arguments) if isinstance(x, Tensor) and x.dim() > 1)
    return ValueError(f"{kernel.__name__} on {shapes} needs a grid of {' × '.join(map(str, grid))} programs, and CUDA "
                      f"launches at most {_LIMIT} along its second and third axis; split the tensor along its columns "
                      f"into {-(-max(grid[1:]) // _LIMIT)} parts or more")


def _kind(value: Any) -> Any:
    """What Triton specialises an argument by: a pointer's type and alignment, an integer's divisibility and width."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if isinstance(value, int):
        return 1 if value == 1 else (value & 15 == 0, -(2**31) <= value < 2**31)
    return None if value is None else type(value)
