"""Python face of the CPU kernels: tensors in, tensors out, bit-equal to the chains of ``quartet.kernels.reference``.

Every function computes on CPU tensors with ``torch.get_num_threads()`` threads; the result does not depend on
their number. Supported dtypes are float32, bfloat16 and float16, elements e2m1; :func:`supports` says so.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quartet.kernels.cpu.build import BuildError, functions
from quartet.kernels.reference.hadamard import SIZES
from quartet.kernels.spec import RULES, SIGMAS, QuantSpec, dtype_name

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT, _LONG, _UNSIGNED, _FLOAT = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float)
_ROTATION = (_INT, _POINTER)  # size, signs
# spec, seed, site; codes, scales, mask, values and their type; threads
_OUTPUT = (_INT, _POINTER, _UNSIGNED, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT)
_SIGNATURES = {
    "rotate_quantize": (_POINTER, _INT, _LONG, _LONG, _LONG, _LONG, *_ROTATION, *_OUTPUT),
    "requantize": (_POINTER, _POINTER, _INT, _FLOAT, _LONG, _LONG, _INT, *_ROTATION, *_OUTPUT),
    "dequantize": (_POINTER, _POINTER, _INT, _FLOAT, _LONG, _POINTER, _INT, _INT),
    "mask_rotate": (_POINTER, _INT, _LONG, _LONG, _LONG, _FLOAT, _POINTER, _LONG, *_ROTATION, _POINTER, _LONG,
                    _INT, _INT),
}


class _Kernels:
    """The four C functions."""

    rotate_quantize: Callable[..., None]
    requantize: Callable[..., None]
    dequantize: Callable[..., None]
    mask_rotate: Callable[..., None]

    def __init__(self) -> None:
        vars(self).update(functions(_SIGNATURES))


@cache
def _kernels() -> _Kernels:
    return _Kernels()


def _called() -> _Kernels:
    """The kernels, for a graph that calls them. Raises BuildError: they cannot be loaded here."""
    try:
        return _kernels()
    except BuildError as error:
        raise BuildError("a compiled graph calls the fused CPU kernels, which are not available here. To do without "
                         'them, compile the model again in this process, or with options={"disable_kernels": ["cpp"]} '
                         f"of torch.compile. What is wrong: {error}") from error


@cache
def unavailable() -> str | None:
    """None when the kernels are built and loaded (building them the first time), else the reason, warned about once."""
    try:
        _kernels()
    except BuildError as error:
        warnings.warn(f"quartet's fused CPU kernels are not available, using the reference: {error}", stacklevel=2)
        return str(error)
    return None


def supports(spec: QuantSpec, rotation: int, dtype: torch.dtype) -> str | None:
    """None when the kernels compute ``spec`` after a Hadamard of size ``rotation`` (0: none) on ``dtype``, else why."""
    if spec.element != "e2m1" or spec.scale != "e8m0":
        return f"the fused CPU kernels encode e2m1 with e8m0 scales, not {spec.element} with {spec.scale}"
    if rotation != 0 and rotation not in SIZES:
        return f"Hadamard size {rotation} is not possible; use 0 (none) or one of {SIZES}"
    if dtype not in _TYPES:
        return f"the fused CPU kernels read and write float32, bfloat16 and float16, not {dtype_name(dtype)}"
    return None


def rotate_quantize(x: Tensor, *, rotation: int, signs: Tensor | None, spec: QuantSpec, seed: Tensor | None,
                    site: int, packed: bool, values: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``quantize(hadamard(x, rotation, signs), spec, seed, site)`` along the last axis, in one read of ``x``.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 with any strides; a ``.t()`` view is read without a copy.
        rotation: Hadamard size, or 0 for none. signs: float32 ``[rotation]`` applied before it, or None.
        seed: int64 scalar tensor, needed when ``spec.stochastic``. site: 0…2^32−1.
        packed: return codes and scales. values: return ``code · 2^e`` without the spec's gain in this dtype.
    Returns:
        codes uint8 ``[R, Kp/2]``, scales uint8 ``[R, Kp/block]``, mask uint8 ``[R, Kp/8]`` if ``spec.mask``, and
        values ``[R, Kp]``, with Kp = K rounded up to a multiple of max(rotation, block); what was not asked for
        has shape ``[0]``.
    Raises:
        ValueError: what :func:`supports` declines, a tensor of another device or shape, or a missing seed.
    """
    _check(spec, rotation, x.dtype)
    if x.dim() != 2 or not x.is_cpu:
        raise ValueError(f"rotate_quantize needs a 2-D CPU tensor, got {list(x.shape)} on {x.device}; "
                         "flatten the leading axes with x.reshape(-1, x.shape[-1])")
    rows, cols = x.shape
    row_stride, col_stride = x.stride()
    rotate, keep = _rotation(rotation, signs)
    word, draw = _spec_word(spec), _seed(spec, seed)
    outputs, pointers = _outputs(rows, cols, rotation, spec, packed, values)
    if rows and cols:
        _called().rotate_quantize(
            x.data_ptr(), _TYPES[x.dtype], row_stride, col_stride, rows, cols, *rotate, word, draw, site, *pointers,
            torch.get_num_threads())
    del keep
    return outputs


def requantize(codes: Tensor, scales: Tensor, in_spec: QuantSpec, *, transpose: bool, rotation: int,
               signs: Tensor | None, spec: QuantSpec, seed: Tensor | None, site: int, packed: bool,
               values: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``quantize(hadamard(v, rotation, signs), spec, seed, site)`` of the values ``v`` of a quantised tensor.

    Args:
        codes, scales: uint8 ``[A, B/2]`` and ``[A, B/in_spec.block]``, contiguous, as ``quantize`` returns them;
            ``v = dequantize(codes, scales, in_spec)``, gain included, or its transpose.
        transpose: True quantises ``v.t()`` (contracts A, B rows out), False ``v``.
    Returns, other arguments and errors: as :func:`rotate_quantize`.
    """
    _check(spec, rotation, torch.float32)
    rows, cols = _quantized_shape("requantize", codes, scales, in_spec)
    rotate, keep = _rotation(rotation, signs)
    word, draw = _spec_word(spec), _seed(spec, seed)
    outputs, pointers = _outputs(*((cols, rows) if transpose else (rows, cols)), rotation, spec, packed, values)
    if rows and cols:
        _called().requantize(
            codes.data_ptr(), scales.data_ptr(), in_spec.block, in_spec.gain, rows, cols, transpose, *rotate, word,
            draw, site, *pointers, torch.get_num_threads())
    del keep
    return outputs


def dequantize(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32,
               gain: bool = True) -> Tensor:
    """Values ``[R, Kp]`` of ``dtype``: ``code · 2^e``, times ``spec.gain`` if ``gain``.

    Shapes and errors as :func:`requantize`.
    """
    _check(spec, 0, dtype)
    rows, cols = _quantized_shape("dequantize", codes, scales, spec)
    values = torch.empty(rows, cols, dtype=dtype, device="cpu")
    if rows and cols:
        _called().dequantize(codes.data_ptr(), scales.data_ptr(), spec.block, spec.gain if gain else 1.0, rows * cols,
                              values.data_ptr(), _TYPES[dtype], torch.get_num_threads())
    return values


def mask_rotate(x: Tensor, mask: Tensor | None, *, rotation: int, signs: Tensor | None, gain: float, cols: int,
                dtype: torch.dtype) -> Tensor:
    """``hadamard(apply_mask(x · gain, mask), rotation, signs, inverse=True, dtype)[:, :cols]``.

    Args:
        x: ``[R, Kp]`` float32, bfloat16 or float16, any strides. mask: uint8 ``[R, Kp/8]``, or None.
        rotation: Hadamard size, or 0 for none. signs: float32 ``[rotation]`` applied after it, or None.
        gain: one fp32 multiplication before everything else. cols: at most Kp.
    Returns:
        ``[R, cols]`` of ``dtype``, rounded to nearest even.
    """
    _check(QuantSpec(), rotation, x.dtype)
    _check(QuantSpec(), rotation, dtype)
    if x.dim() != 2 or not x.is_cpu or not 0 <= cols <= x.shape[1]:
        raise ValueError(f"mask_rotate needs a 2-D CPU tensor and cols from 0 to its width, got {list(x.shape)} on "
                         f"{x.device} and cols={cols}")
    rows, width = x.shape
    mask_pointer = None
    if mask is not None:
        if mask.dtype != torch.uint8 or mask.shape != (rows, width // 8) or width % 8:
            raise ValueError(f"mask of x {list(x.shape)} must be uint8 [{rows}, {-(-width // 8)}] and x's width a "
                             f"multiple of 8, got {dtype_name(mask.dtype)} {list(mask.shape)}")
        mask = mask.contiguous()
        mask_pointer = mask.data_ptr()
    if x.stride(1) != 1:
        x = x.contiguous()
    rotate, keep = _rotation(rotation, signs)
    out = torch.empty(rows, cols, dtype=dtype, device="cpu")
    if rows and cols:
        _called().mask_rotate(x.data_ptr(), _TYPES[x.dtype], x.stride(0), rows, width, gain, mask_pointer, width // 8,
                               *rotate, out.data_ptr(), cols, _TYPES[dtype], torch.get_num_threads())
    del keep
    return out


def _check(spec: QuantSpec, rotation: int, dtype: torch.dtype) -> None:
    if spec.element != "e2m1" or (rotation and rotation not in SIZES) or dtype not in _TYPES:
        raise ValueError(supports(spec, rotation, dtype))


def _rotation(n: int, signs: Tensor | None) -> tuple[tuple[int, int | None], Tensor | None]:
    """C arguments, and the tensor to keep alive during the call."""
    if n == 0 or signs is None:
        return (n, None), None
    if signs.numel() != n or not signs.is_cpu:
        raise ValueError(f"rotation of size {n} needs {n} signs on the CPU, got {list(signs.shape)} on {signs.device}")
    if signs.dtype != torch.float32 or not signs.is_contiguous():
        signs = signs.to(torch.float32).contiguous()
    return (n, signs.data_ptr()), signs


@cache
def _spec_word(spec: QuantSpec) -> int:
    return (spec.block | RULES.index(spec.rule) << 8 | SIGMAS.index(spec.sigma) << 11
            | (spec.power == "nearest") << 13 | spec.stochastic << 14 | spec.mask << 15)


def _seed(spec: QuantSpec, seed: Tensor | None) -> int | None:
    if not spec.stochastic:
        return None
    if seed is None:
        raise ValueError(f"quantiser '{spec}' rounds stochastically and needs a seed")
    if seed.dtype != torch.int64 or seed.numel() != 1 or not seed.is_cpu:
        raise ValueError(f"a seed is one int64 on the CPU, got {dtype_name(seed.dtype)} {list(seed.shape)} on "
                         f"{seed.device}")
    return seed.data_ptr()


def _outputs(rows: int, cols: int, rotation: int, spec: QuantSpec, packed: bool, values: torch.dtype | None,
             ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[int | None, ...]]:
    group = max(rotation, spec.block)
    padded = -(-cols // group) * group
    codes_at = scales_at = mask_at = values_at = None
    kind = 0
    if packed:
        codes = torch.empty(rows, padded // 2, dtype=torch.uint8, device="cpu")
        scales = torch.empty(rows, padded // spec.block, dtype=torch.uint8, device="cpu")
        codes_at, scales_at = codes.data_ptr(), scales.data_ptr()
    else:
        codes, scales = (torch.empty(0, dtype=torch.uint8, device="cpu") for _ in range(2))
    if spec.mask:
        mask = torch.empty(rows, padded // 8, dtype=torch.uint8, device="cpu")
        mask_at = mask.data_ptr()
    else:
        mask = torch.empty(0, dtype=torch.uint8, device="cpu")
    if values is None:
        out = torch.empty(0, dtype=torch.float32, device="cpu")
    elif values in _TYPES:
        out = torch.empty(rows, padded, dtype=values, device="cpu")
        values_at, kind = out.data_ptr(), _TYPES[values]
    else:
        raise ValueError(supports(spec, rotation, values))
    return (codes, scales, mask, out), (codes_at, scales_at, mask_at, values_at, kind)


def _quantized_shape(what: str, codes: Tensor, scales: Tensor, spec: QuantSpec) -> tuple[int, int]:
    if codes.dim() == 2:
        rows, half = codes.shape
        cols = 2 * half
        if (spec.element == "e2m1" and cols % spec.block == 0 and scales.shape == (rows, cols // spec.block)
                and codes.dtype == scales.dtype == torch.uint8 and codes.is_contiguous() and scales.is_contiguous()
                and codes.is_cpu and scales.is_cpu):
            return rows, cols
    raise ValueError(
        f"{what} of '{spec}' needs contiguous CPU uint8 codes [R, K/2] and scales [R, K/{spec.block}] of e2m1, got "
        f"{dtype_name(codes.dtype)} {list(codes.shape)} and {dtype_name(scales.dtype)} {list(scales.shape)} on "
        f"{codes.device}")
