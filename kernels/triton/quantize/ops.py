"""Python face of the Triton kernels: tensors in, tensors out, bit-equal to the chains of ``quartet.kernels.reference``.

Supported are e2m1 elements in blocks of 32, 64 or 128 with e8m0 scales and of 16 with e4m3 scales (NVFP4), after a
Hadamard of any size or none, on float32, bfloat16 and float16 tensors of one GPU; :func:`supports` says so. Every
launch goes to the tensors' device and its current stream, and nothing waits for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quartet.kernels.reference.formats.packing import swizzled_size
from quartet.kernels.spec import QuantSpec, dtype_name
from quartet.kernels.triton.host import DTYPES, WARP, cdiv, check_given, on_device, power_of_two, warps, wide
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.quantize import columns, rows, two_level
from quartet.kernels.triton.quantize.chain import PLAIN, Chain, Form, supports
from quartet.kernels.triton.quantize.fold import inexact_blocks, table
from quartet.kernels.triton.quantize.rotations import rotate

Three = tuple[Tensor, Tensor, Tensor]


def quantize(x: Tensor, chain: Chain, *, packed: bool, folded: bool,
             form: Form = PLAIN) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``quantize(hadamard(x, …), …)`` along the last axis, in one read of ``x``.

    Args:
        x: ``[R, K]`` float32, bfloat16 or float16 on a GPU, any strides.
        packed: return codes, scales and mask. folded: return E4M3 values and row scales.
        form: of the packed results; not for folded ones.
    Returns:
        codes uint8 ``[R, Kp/2]``, scales uint8 (e4m3: float8_e4m3fn) ``[R, Kp/block]``, of tiles ``[⌈R/16⌉, Kp/16]``,
        mask uint8 ``[R, Kp/8]`` if ``spec.mask``, values float8_e4m3fn ``[R, Kp]`` and row scales float32 ``[R, 1]``
        with ``values · row scale = code · 2^e`` (see :func:`fold`); Kp = K rounded up to a multiple of
        :attr:`Chain.multiple`. What was not asked for is ``[0]``.
    Raises:
        ValueError: what :func:`supports` declines, a tensor of another device or shape, or a missing seed.
    """
    _check(x, chain)
    if folded and form != PLAIN:
        raise ValueError(f"quantize folds row-major scales of portable codes, not those of {form}; use folded=False")
    if folded and chain.spec.scale != "e8m0":
        raise ValueError(f"'{chain.spec}' does not fold to E4M3 with a scale a row; use folded=False")
    if chain.rotation and chain.spec.rule == "eden":
        x, _ = rotate(x, chain.rotation, chain.signs)
        chain = replace(chain, rotation=0, signs=None)
    if x.stride(1) != 1 and x.stride(0) == 1 and x.shape[0] > 1 and chain.spec.rule != "eden":
        codes, scales, mask = _columns(x.t(), None, chain, form)[1]
        values, row_scales = fold(codes, scales, chain.spec) if folded else (
            _none(x).view(torch.float8_e4m3fn), _none(x).view(torch.float32))
        return (*((codes, scales, mask) if packed else _nothing(x)), values, row_scales)
    (r, k), n = x.shape, chain.unit(x.shape[1])
    x = x if x.stride(1) == 1 else x.contiguous()
    units = chain.units(k)
    out = _Packed(x, r, units * n, chain.spec, form)
    values = x.new_empty((r, units * n) if folded else 0, dtype=torch.float8_e4m3fn)
    row_scales = x.new_empty((r, 1) if folded else 0, dtype=torch.float32)
    if x.numel():
        lanes = WARP // chain.spec.block if chain.spec.tile else min(power_of_two(units), WARP)
        per_program = WARP // lanes
        grid = (cdiv(r, per_program), 1 if folded else cdiv(units, lanes))
        with on_device(x):
            launch(rows.quantize_rows, grid,
                (x, chain.signs, chain.seed, out.codes.view(torch.int32), out.scales, out.mask.view(torch.int32),
                 values.view(torch.int32), row_scales, inexact_blocks(x.device), table(x.device), r, k, x.stride(0),
                 units, chain.site, chain.encode),
                CHAIN=chain.constants(n, form), FOLD=folded, WIDE=wide(x, max(n, chain.multiple)), R=per_program,
                L=lanes, num_warps=1)
    return (*(out.results if packed else _nothing(x)), values, row_scales)


def quantize_both(x: Tensor, along_rows: Chain, along_columns: Chain,
                  form: Form = PLAIN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of ``x`` quantised along its rows, and of ``x.t()`` along its: one read of ``x`` ``[R, K]``.

    Returns:
        codes uint8 ``[R, Kp/2]``, scales ``[R, Kp/block]``; codes uint8 ``[K, Rp/2]``, scales ``[K, Rp/block]``. Errors
        as :func:`quantize`, and for tiles and the rule ``eden``.
    """
    _check(x, along_rows)
    _check(x, along_columns)
    for spec in (along_rows.spec, along_columns.spec):
        if spec.tile or spec.rule == "eden":
            raise ValueError(f"quantize_both does not take '{spec}'; use quantize")
    x = x if x.stride(1) == 1 else x.contiguous()
    (codes, scales, _), (t_codes, t_scales, _) = _columns(x, along_rows, along_columns, form)
    return codes, scales, t_codes, t_scales


def requantize(codes: Tensor, scales: Tensor, in_spec: QuantSpec, chain: Chain, form: Form = PLAIN,
               matrices: int = 1) -> tuple[Tensor, Tensor]:
    """Codes and scales of a quantised tensor's transpose: ``quantize(hadamard(v.t()))``, ``v = dequantize(codes)``.

    Args:
        codes, scales: uint8 ``[R, K/2]`` and ``[R, K/in_spec.block]``, contiguous; ``in_spec`` has no gain.
        form: of what is read and of what is returned.
        matrices: how many matrices of R / matrices rows lie below each other; each is transposed by itself.
    Returns:
        codes uint8 ``[matrices·K, Rp/2]``, scales uint8 ``[matrices·K, Rp/block]``. Errors as :func:`quantize`.
    """
    r, half = _packed_shape("requantize", codes, scales, in_spec, form.swizzled)
    if r % matrices or (form.swizzled and matrices != 1):
        raise ValueError(f"requantize turns matrices of one height, with swizzled scales one: {r} rows of {matrices}")
    r //= matrices
    if in_spec.gain != 1.0:
        raise ValueError(f"requantize reads codes without a gain, '{in_spec}' has {in_spec.gain:.3f}; dequantize it")
    _check(codes, chain, any_dtype=True)
    if chain.spec.scale != "e8m0":
        raise ValueError(f"requantize does not write '{chain.spec}'; dequantize, and quantize the transpose")
    n = chain.unit(r)
    height = cdiv(r, n)
    out = _Packed(codes, matrices * half * 2, height * n, chain.spec, form)
    if codes.numel():
        lanes, words = WARP, half // 4
        with on_device(codes):
            launch(columns.requantize_columns, (height * cdiv(words, lanes) * matrices,),
                (codes.view(torch.int32), scales, chain.signs, chain.seed, out.codes.view(torch.int32), out.scales,
                 r, words, chain.site),
                IN_BLOCK=in_spec.block, CHAIN=chain.constants(n, form, masked=False),
                ALL=r % n == 0 and words % lanes == 0, B=lanes, num_warps=1)
    return out.codes, out.scales


def fold(codes: Tensor, scales: Tensor, spec: QuantSpec, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E4M3 values and power-of-two row scales of packed rows: ``values · row scale = code · 2^e``.

    Exact where a row's blocks span at most fifteen powers of two; blocks further below the row's largest are
    rounded to the E4M3 grid and counted in :func:`inexact_blocks`. A row of zeros has a scale of no meaning.

    Args:
        codes, scales: uint8 ``[R, K/2]`` and ``[R, K/block]``, contiguous.
        ends: int32 ``[E]``, where groups of whole blocks end along K; each part of a row then has a scale of its own.
    Returns:
        float8_e4m3fn ``[R, K]`` and float32 ``[R, 1]``, or ``[R, E]`` with ends.
    """
    r, half = _packed_shape("fold", codes, scales, spec)
    groups = 1 if ends is None else ends.shape[0]
    values = codes.new_empty(r, half * 2, dtype=torch.float8_e4m3fn)
    row_scales = codes.new_empty(r, groups, dtype=torch.float32)
    if codes.numel():
        units = half // 16
        lanes = min(power_of_two(cdiv(units, groups)), 512)
        per_program = max(1, 128 // lanes)
        with on_device(codes):
            launch(rows.fold_rows, (cdiv(r, per_program), groups),
                (codes.view(torch.int32), scales, values.view(torch.int32), row_scales, inexact_blocks(codes.device),
                 table(codes.device), ends, r, units, groups),
                PER_SCALE=spec.block // 32, GROUPED=ends is not None, R=per_program, L=lanes,
                num_warps=warps(per_program * lanes))
    return values, row_scales


def dequantize(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """``code · scale`` without the spec's gain or the factor of the tensor, ``[R, K]`` of ``dtype``.

    Args:
        codes: uint8 ``[R, K/2]``, contiguous. scales: uint8 ``[R, K/block]``, or float8_e4m3fn ``[R, K/16]``, of tiles
            ``[⌈R/16⌉, K/16]``; contiguous.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dequantize writes float32, bfloat16 and float16, not {dtype_name(dtype)}")
    if spec.scale == "e4m3":
        return _dequantize_two_level(codes, scales, spec, dtype)
    r, half = _packed_shape("dequantize", codes, scales, spec)
    out = codes.new_empty(r, half * 2, dtype=dtype)
    if codes.numel():
        blocks, lanes = codes.numel() // 16, 128
        with on_device(codes):
            launch(rows.dequantize_rows, (cdiv(blocks, lanes),), (codes.view(torch.int32), scales, out, blocks),
                   PER_SCALE=spec.block // 32, B=lanes, num_warps=warps(lanes))
    return out


def _dequantize_two_level(codes: Tensor, scales: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    r, half = codes.shape if codes.dim() == 2 else (0, 1)
    if (codes.dim() != 2 or half % 8 or scales.shape != (cdiv(r, 16) if spec.tile else r, half // 8)
            or codes.dtype != torch.uint8 or scales.dtype != torch.float8_e4m3fn or codes.device != scales.device
            or not codes.is_contiguous() or not scales.is_contiguous() or codes.data_ptr() % 8):
        raise ValueError(f"dequantize of '{spec}' needs contiguous uint8 codes [R, K/2] at a multiple of 8 bytes and "
                         f"float8_e4m3fn scales of their blocks of 16 on one device, got {dtype_name(codes.dtype)} "
                         f"{list(codes.shape)} and {dtype_name(scales.dtype)} {list(scales.shape)}")
    out = codes.new_empty(r, half * 2, dtype=dtype)
    if codes.numel():
        n = 32 if half % 16 == 0 else 16
        units = half * 2 // n
        lanes = min(power_of_two(units), 4 * WARP)
        per_program = 4 * WARP // lanes
        with on_device(codes):
            launch(rows.dequantize_blocks, (cdiv(r, per_program), cdiv(units, lanes)),
                   (codes.view(torch.int32), scales.view(torch.uint8), out, r, half * 2, units), N=n, TILE=spec.tile,
                   R=per_program, L=lanes, num_warps=4)
    return out


class _Packed:
    """Result tensors of a packed quantiser; scales as bytes, or those that were given."""

    def __init__(self, like: Tensor, r: int, padded: int, spec: QuantSpec, form: Form,
                 given: Tensor | None = None) -> None:
        def empty(*shape: int) -> Tensor:
            return like.new_empty(shape, dtype=torch.uint8)

        blocks = padded // spec.block
        self.codes = empty(r, padded // 2)
        if form.swizzled:
            self.scales = empty(swizzled_size(r, blocks))
            if r % 128 or blocks % 4:
                self.scales.zero_()
        else:
            self.scales = empty(cdiv(r, spec.block) if spec.tile else r, blocks) if given is None else given
        self.mask = empty(r, padded // 8) if spec.mask else _none(like)
        self.typed = spec.scale == "e4m3" and not form.swizzled

    @property
    def results(self) -> Three:
        return self.codes, self.scales.view(torch.float8_e4m3fn) if self.typed else self.scales, self.mask


def _columns(x: Tensor, along_rows: Chain | None, chain: Chain, form: Form) -> tuple[Three, Three]:
    (r, k), n = x.shape, chain.unit(x.shape[0])
    height, given = chain.units(r), _tiles(x.t(), chain)
    mine, theirs, rn = _Packed(x, k, height * n, chain.spec, form, given), None, n
    if along_rows is not None:
        rn = along_rows.unit(k)
        theirs = _Packed(x, r, along_rows.units(k) * rn, along_rows.spec, form)
    if x.numel():
        size = x.element_size()
        words = k * size % 4 == 0 and x.data_ptr() % 4 == 0 and x.stride(0) * size % 4 == 0 and x.stride(0) < 2**29
        per = 4 // size if words else 1
        lanes = max(WARP, rn // per)
        with on_device(x):
            launch(columns.quantize_both, (height, cdiv(k, lanes * per)),
                (x, r, k, x.stride(0), *_side(along_rows, theirs), *_side(chain, mine, given), *_given(given)),
                ROWS=None if along_rows is None else along_rows.constants(rn, form), COLUMNS=chain.constants(n, form),
                WIDE=along_rows is not None and wide(x, rn), WORDS=words, ALL=r % n == 0 and k % (lanes * per) == 0,
                L=lanes, num_warps=warps(lanes))
    return _nothing(x) if theirs is None else theirs.results, mine.results


def _side(chain: Chain | None, out: _Packed | None, given: Tensor | None = None) -> tuple[Tensor | int | None, ...]:
    """The arguments of :func:`columns.quantize_both` for one direction."""
    if chain is None or out is None:
        return None, None, None, None, None, 0, None
    return (chain.signs, chain.seed, out.codes.view(torch.int32), None if out.scales is given else out.scales,
            out.mask.view(torch.int32), chain.site, chain.encode)


def _tiles(x: Tensor, chain: Chain) -> Tensor | None:
    """uint8 ``[⌈R/16⌉, Kp/16]``: the scale bytes of tiles, which no thread sees whole; None for other scales."""
    if not chain.spec.tile:
        return None
    if x.stride(1) != 1 and x.stride(0) == 1:
        return _tiles(x.t(), chain).t().contiguous()
    (r, k), n = x.shape, chain.unit(x.shape[1])
    units, lanes = chain.units(k), WARP // chain.spec.block
    out = x.new_empty(cdiv(r, chain.spec.block), units * n // chain.spec.block, dtype=torch.uint8)
    if x.numel():
        with on_device(x):
            launch(two_level.tile_scales, (cdiv(r, chain.spec.block), cdiv(units, lanes)),
                   (x, chain.encode, out, r, k, x.stride(0), units), N=n, WIDE=wide(x, n), B=lanes, num_warps=1)
    return out


def _given(tiles: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if tiles is None else (tiles, tiles.stride(0), tiles.stride(1))


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
    check_given("signs", chain.signs, chain.rotation, torch.float32, x)
    check_given("seed", chain.seed, 1, torch.int64, x)
    if chain.spec.stochastic and chain.seed is None:
        raise ValueError(f"quantiser '{chain.spec}' rounds stochastically and needs a seed")
    check_given("encode", chain.encode, 1, torch.float32, x)
    if (chain.spec.scale == "e4m3") != (chain.encode is not None):
        raise ValueError(f"e4m3 scales, and no others, take the tensor's multiplier: encode of '{chain.spec}' is "
                         f"{'missing' if chain.encode is None else 'given'}")


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
