"""Python face of the Triton kernels: tensors in, tensors out, bit-equal to the chains of ``quartet.kernels.reference``.

Supported are e2m1 elements in blocks of 32, 64 or 128 after a Hadamard of any size or none, on float32, bfloat16 and
float16 tensors of one GPU; :func:`supports` says so. Every launch goes to the tensors' device and its current stream,
and nothing waits for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.hadamard import SIZES
from quartet.kernels.reference.packing import swizzled_size
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.kernels.triton import columns, rows
from quartet.kernels.triton.fold import inexact_blocks, table
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARP = 32
Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Chain:
    """hadamard → quantize of one operand.

    Args:
        spec: the quantiser. rotation: Hadamard size, or 0 for none. signs: float32 ``[rotation]``, or None.
        seed: int64 scalar tensor, needed when ``spec.stochastic``. site: 0…2^32−1.
    """

    spec: QuantSpec
    rotation: int = 0
    signs: Tensor | None = None
    seed: Tensor | None = None
    site: int = 0

    @property
    def unit(self) -> int:
        """Elements that one thread owns: what a Hadamard or a scale spans."""
        return max(32, self.rotation, self.spec.block)


@dataclass(frozen=True)
class Form:
    """How the quantisers write scales and round.

    Args:
        swizzled: scales are ``[swizzled_size(R, Kp/block)]`` in the layout of ``reference.swizzle_scales``, padding 0.
        conversions: the roundings, of ``spec.ROUNDINGS``, that are left to the GPU's conversion instructions; to
            nearest their codes are the same, stochastic ones only have the same expectation.
    """

    swizzled: bool = False
    conversions: tuple[str, ...] = ()


PLAIN = Form()


@cache
def supports(spec: QuantSpec, rotation: int, dtype: torch.dtype) -> str | None:
    """None when the kernels compute ``spec`` after a Hadamard of size ``rotation`` (0: none) on ``dtype``, else why."""
    if spec.element != "e2m1" or spec.scale != "e8m0":
        return f"the Triton quantisers write e2m1 with e8m0 scales, not {spec.element} with {spec.scale}"
    if spec.block not in (32, 64, 128):
        return f"the Triton quantisers take blocks of 32, 64 and 128, not {spec.block}"
    if 0 < rotation < max(32, spec.block):
        return (f"the Triton quantisers rotate whole blocks: a Hadamard of {rotation} is shorter than "
                f"{max(32, spec.block)}")
    if rotation != 0 and rotation not in SIZES:
        return f"Hadamard size {rotation} is not possible; use 0 (none) or one of {SIZES}"
    if dtype not in DTYPES:
        return f"the Triton quantisers read and write float32, bfloat16 and float16, not {dtype_name(dtype)}"
    return None


def quantize(x: Tensor, chain: Chain, *, packed: bool, folded: bool,
             form: Form = PLAIN) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``quantize(hadamard(x, …), …)`` along the last axis, in one read of ``x``.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU, any strides.
        packed: return codes, scales and mask. folded: return E4M3 values and row scales.
        form: of the packed results; not for folded ones.
    Returns:
        codes uint8 ``[R, Kp/2]``, scales uint8 ``[R, Kp/block]``, mask uint8 ``[R, Kp/8]`` if ``spec.mask``, values
        float8_e4m3fn ``[R, Kp]`` and row scales float32 ``[R, 1]`` with ``values · row scale = code · 2^e``
        (see :func:`fold`); Kp = K rounded up to a multiple of max(rotation, block). What was not asked for is ``[0]``.
    Raises:
        ValueError: what :func:`supports` declines, a tensor of another device or shape, or a missing seed.
    """
    _check(x, chain)
    if folded and form != PLAIN:
        raise ValueError(f"quantize folds row-major scales of portable codes, not those of {form}; use folded=False")
    if x.stride(1) != 1 and x.stride(0) == 1 and x.shape[0] > 1:
        codes, scales, mask = _columns(x.t(), None, chain, form)[1]
        values, row_scales = fold(codes, scales, chain.spec) if folded else (_none(x), _none(x))
        return (*((codes, scales, mask) if packed else _nothing(x)), values, row_scales)
    n, (r, k) = chain.unit, x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    units = cdiv(k, n)
    out = _Packed(x, r, units * n, chain.spec, True, form)
    values = x.new_empty((r, units * n) if folded else 0, dtype=torch.float8_e4m3fn)
    row_scales = x.new_empty((r, 1) if folded else 0, dtype=torch.float32)
    if x.numel():
        lanes = min(power_of_two(units), WARP)
        per_program = WARP // lanes
        grid = (cdiv(r, per_program), 1 if folded else cdiv(units, lanes))
        with on_device(x):
            launch(rows.quantize_rows, grid,
                (x, chain.signs, chain.seed, out.codes.view(torch.int32), out.scales, out.mask.view(torch.int32),
                 values.view(torch.int32), row_scales, inexact_blocks(x.device), table(x.device), r, k, x.stride(0),
                 units, chain.site),
                **_constants(chain, form), MASK=chain.spec.mask, FOLD=folded, SWIZZLED=form.swizzled,
                WIDE=_wide(x, n), R=per_program, L=lanes, num_warps=1)
    return (*((out.codes, out.scales, out.mask) if packed else _nothing(x)), values, row_scales)


def quantize_both(x: Tensor, along_rows: Chain, along_columns: Chain,
                  form: Form = PLAIN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of ``x`` quantised along its rows, and of ``x.t()`` along its: one read of ``x`` ``[R, K]``.

    Returns:
        codes uint8 ``[R, Kp/2]``, scales uint8 ``[R, Kp/block]``; codes uint8 ``[K, Rp/2]``, scales uint8
        ``[K, Rp/block]``. Errors as :func:`quantize`.
    """
    _check(x, along_rows)
    _check(x, along_columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    (codes, scales, _), (t_codes, t_scales, _) = _columns(x, along_rows, along_columns, form)
    return codes, scales, t_codes, t_scales


def requantize(codes: Tensor, scales: Tensor, in_spec: QuantSpec, chain: Chain,
               form: Form = PLAIN) -> tuple[Tensor, Tensor]:
    """Codes and scales of a quantised tensor's transpose: ``quantize(hadamard(v.t()))``, ``v = dequantize(codes)``.

    Args:
        codes, scales: uint8 ``[R, K/2]`` and ``[R, K/in_spec.block]``, contiguous; ``in_spec`` has no gain.
        form: of what is read and of what is returned.
    Returns:
        codes uint8 ``[K, Rp/2]`` and scales uint8 ``[K, Rp/block]``. Errors as :func:`quantize`.
    """
    r, half = _packed_shape("requantize", codes, scales, in_spec, form.swizzled)
    if in_spec.gain != 1.0:
        raise ValueError(f"requantize reads codes without a gain, '{in_spec}' has {in_spec.gain:.3f}; dequantize it")
    _check(codes, chain, any_dtype=True)
    n = chain.unit
    height = cdiv(r, n)
    out = _Packed(codes, half * 2, height * n, chain.spec, True, form)
    if codes.numel():
        lanes, words = WARP, half // 4
        with on_device(codes):
            launch(columns.requantize_columns, (height, cdiv(words, lanes)),
                (codes.view(torch.int32), scales, chain.signs, chain.seed, out.codes.view(torch.int32), out.scales,
                 r, words, chain.site),
                IN_BLOCK=in_spec.block, **_constants(chain, form), SWIZZLED=form.swizzled,
                ALL=r % n == 0 and words % lanes == 0, B=lanes, num_warps=1)
    return out.codes, out.scales


def fold(codes: Tensor, scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """E4M3 values and power-of-two row scales of packed rows: ``values · row scale = code · 2^e``.

    Exact where a row's blocks span at most fifteen powers of two; blocks further below the row's largest are
    rounded to the E4M3 grid and counted in :func:`inexact_blocks`. A row of zeros has a scale of no meaning.

    Args:
        codes, scales: uint8 ``[R, K/2]`` and ``[R, K/block]``, contiguous.
    Returns:
        float8_e4m3fn ``[R, K]`` and float32 ``[R, 1]``.
    """
    r, half = _packed_shape("fold", codes, scales, spec)
    values = codes.new_empty(r, half * 2, dtype=torch.float8_e4m3fn)
    row_scales = codes.new_empty(r, 1, dtype=torch.float32)
    if codes.numel():
        units = half // 16
        lanes = min(power_of_two(units), 512)
        per_program = max(1, 128 // lanes)
        with on_device(codes):
            launch(rows.fold_rows, (cdiv(r, per_program),),
                (codes.view(torch.int32), scales, values.view(torch.int32), row_scales, inexact_blocks(codes.device),
                 table(codes.device), r, units),
                PER_SCALE=spec.block // 32, R=per_program, L=lanes, num_warps=_warps(per_program * lanes))
    return values, row_scales


def dequantize(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """``code · 2^e`` without the spec's gain, ``[R, K]`` of ``dtype``; arguments as :func:`fold`."""
    r, half = _packed_shape("dequantize", codes, scales, spec)
    if dtype not in DTYPES:
        raise ValueError(f"dequantize writes float32, bfloat16 and float16, not {dtype_name(dtype)}")
    out = codes.new_empty(r, half * 2, dtype=dtype)
    if codes.numel():
        blocks, lanes = codes.numel() // 16, 128
        with on_device(codes):
            launch(rows.dequantize_rows, (cdiv(blocks, lanes),), (codes.view(torch.int32), scales, out, blocks),
                   PER_SCALE=spec.block // 32, B=lanes, num_warps=_warps(lanes))
    return out


def random_signs(seed: Tensor, site: int, n: int) -> Tensor:
    """``reference.random_signs`` in one launch: float32 ``[n]`` of ±1, n ≤ 128, for an int64 seed on the GPU."""
    out = seed.new_empty(n, dtype=torch.float32)
    with on_device(seed):
        launch(rows.draw_signs, (1,), (seed, out, site, n), N=128, num_warps=4)
    return out


def mask_rotate(x: Tensor, mask: Tensor | None, *, rotation: int, signs: Tensor | None, gain: float, cols: int,
                dtype: torch.dtype) -> Tensor:
    """``hadamard(apply_mask(x · gain, mask), rotation, signs, inverse=True, dtype)[:, :cols]``.

    Args:
        x: ``[R, Kp]`` float32, bfloat16 or float16; Kp a multiple of max(32, rotation). mask: uint8 ``[R, Kp/8]``, or
            None. signs: float32 ``[rotation]`` applied after the transform, or None.
        gain: one fp32 multiplication before everything else. cols: at most Kp.
    Returns:
        ``[R, cols]`` of ``dtype``, rounded to nearest even.
    """
    n = max(32, rotation)
    r, width = x.shape if x.dim() == 2 else (0, 1)
    if (x.dim() != 2 or x.dtype not in DTYPES or dtype not in DTYPES or width % n or not 0 <= cols <= width
            or rotation not in (0, *SIZES)):
        raise ValueError(f"mask_rotate needs a 2-D tensor of a width divisible by {n} and cols from 0 to it, got "
                         f"{dtype_name(x.dtype)} {list(x.shape)} on {x.device}, cols={cols}, "
                         f"dtype={dtype_name(dtype)}, rotation={rotation}")
    _check_given("signs", signs, rotation, torch.float32, x)
    if mask is not None and (mask.shape != (r, width // 8) or mask.dtype != torch.uint8 or not mask.is_contiguous()
                             or mask.device != x.device):
        raise ValueError(f"the mask of x {list(x.shape)} must be contiguous uint8 [{r}, {width // 8}], got "
                         f"{dtype_name(mask.dtype)} {list(mask.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(r, cols, dtype=dtype)
    if out.numel():
        units = width // n
        lanes = min(128, power_of_two(units))
        with on_device(x):
            launch(rows.unrotate_rows, (r, cdiv(units, lanes)),
                (x, None if mask is None else mask.view(torch.int32), signs, out, r, cols, x.stride(0), units, gain),
                N=n, ROTATION=rotation, SIGNED=signs is not None, MASK=mask is not None, GAIN=gain != 1.0,
                WIDE=_wide(x, n) and cols == width, B=lanes, num_warps=_warps(lanes))
    return out


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own is made for its kernels and takes microseconds on the host.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


class _Packed:
    """Result tensors of a packed quantiser, empty where not wanted."""

    def __init__(self, like: Tensor, r: int, padded: int, spec: QuantSpec, wanted: bool, form: Form) -> None:
        def empty(*shape: int) -> Tensor:
            return like.new_empty(shape if wanted else 0, dtype=torch.uint8)

        blocks = padded // spec.block
        self.codes = empty(r, padded // 2)
        self.scales = empty(swizzled_size(r, blocks)) if form.swizzled else empty(r, blocks)
        if form.swizzled and (r % 128 or blocks % 4):
            self.scales.zero_()
        self.mask = empty(r, padded // 8) if spec.mask else _none(like)


def _columns(x: Tensor, along_rows: Chain | None, chain: Chain, form: Form) -> tuple[Three, Three]:
    n, (r, k) = chain.unit, x.shape
    rn = n if along_rows is None else along_rows.unit
    row_spec = chain.spec if along_rows is None else along_rows.spec
    height, units = cdiv(r, n), cdiv(k, rn)
    mine = _Packed(x, k, height * n, chain.spec, True, form)
    theirs = _Packed(x, r, units * rn, row_spec, along_rows is not None, form)
    if x.numel():
        size = x.element_size()
        words = k * size % 4 == 0 and x.data_ptr() % 4 == 0 and x.stride(0) * size % 4 == 0 and x.stride(0) < 2**29
        per = 4 // size if words else 1
        lanes = max(WARP, rn // per)
        other = along_rows or chain
        with on_device(x):
            launch(columns.quantize_both, (height, cdiv(k, lanes * per)),
                (x, r, k, x.stride(0), other.signs, other.seed, theirs.codes.view(torch.int32), theirs.scales,
                 theirs.mask.view(torch.int32), other.site, chain.signs, chain.seed, mine.codes.view(torch.int32),
                 mine.scales, mine.mask.view(torch.int32), chain.site),
                ROWS=along_rows is not None, **_constants(other, form, row=True), RM=row_spec.mask,
                **_constants(chain, form), MASK=chain.spec.mask, SWIZZLED=form.swizzled, WIDE=_wide(x, rn),
                WORDS=words, ALL=r % n == 0 and k % (lanes * per) == 0, L=lanes, num_warps=_warps(lanes))
    return (theirs.codes, theirs.scales, theirs.mask), (mine.codes, mine.scales, mine.mask)


def _constants(chain: Chain, form: Form, row: bool = False) -> dict[str, Any]:
    return _chain_constants(chain.spec, chain.rotation, chain.signs is not None,
                            chain.spec.rounding in form.conversions, row)


@cache
def _chain_constants(spec: QuantSpec, rotation: int, signed: bool, hardware: bool, row: bool) -> dict[str, Any]:
    values = (max(32, rotation, spec.block), rotation, signed, spec.block, spec.rule, spec.sigma, spec.power,
              spec.stochastic, hardware)
    names = (("RN", "RR", "RS", "RB", "RRULE", "RSIGMA", "RPOWER", "RSR", "RHW") if row else
             ("N", "ROTATION", "SIGNED", "BLOCK", "RULE", "SIGMA", "POWER", "STOCHASTIC",
              "HARDWARE"))
    return dict(zip(names, values, strict=True))


def _wide(x: Tensor, n: int) -> bool:
    """Whether units of n elements can be read 16 bytes at a time."""
    size = x.element_size()
    return x.shape[1] % n == 0 and x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0


def _warps(lanes: int) -> int:
    return max(1, min(16, lanes // 32))


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """The tensor's device as the current one; in Triton's interpreter that may be the CPU."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if INTERPRETED.value:
        return nullcontext()
    raise ValueError(f"the Triton kernels run on a GPU, and the tensor {list(x.shape)} is on {x.device}")


def _nothing(like: Tensor) -> Three:
    return _none(like), _none(like), _none(like)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


def _check(x: Tensor, chain: Chain, any_dtype: bool = False) -> None:
    reason = supports(chain.spec, chain.rotation, torch.float32 if any_dtype else x.dtype)
    if reason is not None:
        raise ValueError(reason)
    if x.dim() != 2:
        raise ValueError(f"the Triton quantisers need a 2-D tensor, got {list(x.shape)}; flatten the leading axes with "
                         "x.reshape(-1, x.shape[-1])")
    _check_given("signs", chain.signs, chain.rotation, torch.float32, x)
    _check_given("seed", chain.seed, 1, torch.int64, x)
    if chain.spec.stochastic and chain.seed is None:
        raise ValueError(f"quantiser '{chain.spec}' rounds stochastically and needs a seed")


def _check_given(what: str, value: Tensor | None, size: int, dtype: torch.dtype, x: Tensor) -> None:
    if value is not None and (value.device != x.device or value.numel() != size or value.dtype != dtype
                              or not value.is_contiguous() or value.data_ptr() % max(1, min(16, 4 * size))):
        raise ValueError(f"{what} must be {size} contiguous {dtype_name(dtype)} on {x.device}, got "
                         f"{dtype_name(value.dtype)} {list(value.shape)} on {value.device}")


def _packed_shape(what: str, codes: Tensor, scales: Tensor, spec: QuantSpec, swizzled: bool = False) -> tuple[int, int]:
    shape = "[swizzled_size(R, K/{})]" if swizzled else "[R, K/{}]"
    if codes.dim() == 2 and spec.element == "e2m1":
        r, half = codes.shape
        blocks = half * 2 // spec.block
        if (half * 2 % spec.block == 0 and scales.shape == ((swizzled_size(r, blocks),) if swizzled else (r, blocks))
                and codes.dtype == scales.dtype == torch.uint8 and codes.is_contiguous() and scales.is_contiguous()
                and codes.device == scales.device and spec.block >= 32 and codes.data_ptr() % 16 == 0):
            return r, half
    raise ValueError(
        f"{what} of '{spec}' needs contiguous uint8 codes [R, K/2] at a multiple of 16 bytes and scales "
        f"{shape.format(spec.block)} of e2m1 in blocks of 32 or more on one device, got {dtype_name(codes.dtype)} "
        f"{list(codes.shape)} and {dtype_name(scales.dtype)} {list(scales.shape)} on {codes.device}")
