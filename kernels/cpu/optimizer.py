"""Python face of the optimizer kernel for CPUs, bit-equal to ``quartet.kernels.reference.optim.optimizers``.

Computes with ``torch.get_num_threads()`` threads; the result does not depend on their number.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.build_cache import BuildError
from quartet.kernels.cpu import build
from quartet.kernels.reference.optim import states as ref
from quartet.kernels.reference.optim.optimizers import ALGORITHMS, Kind, check
from quartet.kernels.reference.optim.states import Layout

SOURCE = build.SOURCE.with_name("optimizer.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ELEMENTS = ("fp32", "bf16", "fp16", "e4m3", "e5m2", "signed", "unsigned")
_FIELDS = 13  # of the C++ struct Tensor
_GRADIENT, _ROWS, _WIDTH = 1, 8, 10


@cache
def _kernel() -> Callable[..., None]:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    signature = (pointer, ctypes.c_int64, pointer, pointer, pointer, ctypes.c_uint64, number, number)
    return build.functions({"optimizer": signature}, SOURCE)["optimizer"]


@cache
def unavailable() -> str | None:
    """None when the kernel is built and loaded (building it the first time), else the reason, warned about once."""
    try:
        _kernel()
    except BuildError as error:
        warnings.warn(f"quartet's optimizer kernel for CPUs is not available, using the reference: {error}",
                      stacklevel=2)
        return str(error)
    return None


@cache
def _constants() -> Any:
    values = (*ref.LOG2_P, *ref.EXP2_Q, *ref.POWERS, *ref.INVERSES, *ref.MIDPOINTS[True], *ref.MIDPOINTS[False],
              ref.LOG2_448, ref.EXPANDED_BITS * 16.0, ref.SHIFT, ref.TOP_SIGNIFICAND)
    return (ctypes.c_float * len(values))(*values)


@cache
def _kind(kind: Kind, param: torch.dtype, grad: torch.dtype) -> Any:
    elements = [("signed" if s else "unsigned") if f.element == "dynamic" else f.element
                for f, s in zip(kind.formats, kind.signed, strict=True)]
    modes = [0 if f.plain else (1 if f.scaling == "delayed" else 2) if f.per_tensor else 4 if f.expand else 3
             for f in kind.formats]
    pad = [0] * (3 - len(elements))
    words = (ALGORITHMS.index(kind.algorithm), kind.nesterov, kind.master, kind.stochastic, kind.share, kind.tile,
             len(elements), TYPES[param], TYPES[grad], *(_ELEMENTS.index(e) for e in elements), *pad, *modes, *pad)
    return (ctypes.c_int32 * len(words))(*words)


def pointers(kind: Kind, layout: Layout, param: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor | None],
             site: int, first_group: int) -> list[int]:
    """One tensor's row of the table that :func:`run` takes, still without its gradient (:func:`set_gradients`).

    The tensors are contiguous ones on the CPU, shaped as :mod:`quartet.kernels.reference.optim.states` says; ``param``
    is float32, bfloat16 or float16. ``site``, ``first_group``: of ``reference.optimizers.random_halves``.

    Raises:
        ValueError: tensors that are not those of ``kind`` in ``layout``.
    """
    check(kind, layout, param, codes, scales)
    if param.dtype not in TYPES or param.device.type != "cpu":
        raise ValueError(f"the optimizer kernel takes float32, bfloat16 and float16 weights on the CPU, not "
                         f"{param.dtype} on {param.device}")
    pad = [0] * (3 - len(codes))
    at = [0 if s is None else s.data_ptr() for s in scales]
    row = [param.data_ptr(), 0, *(c.data_ptr() for c in codes), *pad, *at, *pad, layout.rows, layout.tiles,
           layout.width, site, first_group]
    assert len(row) == _FIELDS
    return row


def set_gradients(table: Sequence[list[int]], grads: Sequence[Tensor]) -> None:
    """Give each tensor of a table its gradient: contiguous, on the CPU, all of one dtype; the caller keeps them alive.

    Raises:
        ValueError: a gradient of another number of elements than its parameter.
    """
    for row, grad in zip(table, grads, strict=True):
        if grad.numel() != row[_ROWS] * row[_WIDTH]:
            raise ValueError(f"a gradient of {grad.numel()} elements is not that of a parameter of {row[_ROWS]} rows "
                             f"and {row[_WIDTH]} columns")
        row[_GRADIENT] = grad.data_ptr()


def run(kind: Kind, table: Sequence[Sequence[int]], numbers: Sequence[Sequence[float]], param: torch.dtype,
        grad: torch.dtype, seed: int, *, measure: bool) -> None:
    """One step of all tensors of the table, or with ``measure`` only the largest magnitudes that are not known.

    Args:
        table: :func:`pointers` of each tensor, after :func:`set_gradients`. numbers: nine coefficients and
            the step of each. param, grad: dtypes of the weights and the gradients.
        seed: of 64 bits, used if ``kind.stochastic``.
    """
    flat = [value for row in table for value in row]
    values = [value for row in numbers for value in row]
    rows, reals = (ctypes.c_int64 * len(flat))(*flat), (ctypes.c_float * len(values))(*values)
    _kernel()(rows, len(table), reals, _kind(kind, param, grad), _constants(), seed, measure, torch.get_num_threads())
