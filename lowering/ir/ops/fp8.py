"""Graph ops of the FP8 lowering whose results have a fixed, row-major layout.

    amax_of_each    tensors of one dtype, not empty → the largest magnitude of each, fp32 [tensors, 1, 1]
    amax_of_weights the same of parameters, once an optimizer step
    fp8_scale       largest magnitudes fp32 → multipliers and scales of the same shape, which Inductor inlines
    fp8_scales      magnitudes of several tensors, such as the largest of each row → their multipliers and scales, fp32
                    [tensors, APART, 1]
    fp8_cast        x, one multiplier or one a row → codes of x, and of its transpose, from one read; NaN where x is
                    not finite, of which a scale from earlier steps (rule ``delayed``) knows nothing
    fp8_cast_rows   x, one multiplier, ``index`` → codes of the rows of x that the index names, zeros where it is −1,
                    and of their transpose, from one read
    fp8_casts       several x and the multipliers of ``fp8_scales`` → codes of all, and of all their transposes
    fp8_cast_by_rows    x and few magnitudes whose largest is its own, such as those of its rows → codes of x and of
                    its transpose, and its scale, fp32 [1, 1], from one launch
    fp8_casts_by_rows   the same of several x and magnitudes of each → codes of all, of all their transposes, and
                    behind them the scales, fp32 [tensors, APART, 1]
    fp8_casts_by_known  several x and for each the largest magnitude of earlier steps, fp32 of one element → the same by
                    2^margin times those, by its own of an x of which it is not positive; behind them the scales, fp32
                    [tensors, APART, 1], and what the largest magnitudes are, [tensors, 1, 1]
    fp8_cast_groups x [R, tokens], ends [E] → codes with a scale for the part of a row in each group, and these [R, E]
    fp8_mm          A · Bᵀ of [M, K] and [N, K], scales [M, 1] and [1, N] → [M, N], for an M or K that only the data
                    decides: ``aten._scaled_mm`` asks whether the one is 1, and which stride is the larger
    fp8_bmm         A · Bᵀ of [batch, M, K] and [batch, N, K], scales [batch, M] and [batch, N] → [batch, M, N]
    fp8_row_major   codes that lie in another order → a row-major copy

Inductor chooses the layout of what it computes itself; a matrix product of one-byte operands takes only this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import fp8_encode
from quartet.kernels.reference.formats.scales import APART, scale_of_amax
from quartet.kernels.reference.products import grouped
from quartet.kernels.reference.quantize import largest_magnitude
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir import FLOAT8, store
from quartet.lowering.ir.op import op
from quartet.runtime.devices import Target
from quartet.runtime.slots.weights import REUSED

MOST_GROUPS = 1023  # that PyTorch's grouped product takes at a time
CODES_KEY = "quartet_codes"  # node.meta of a cast, and of its scale: (quantiser, a name that the two share)

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def _one_each(xs: list[Tensor]) -> Tensor:
    return xs[0].new_empty(len(xs), 1, 1, dtype=torch.float32)


@op(fake=_one_each, strides="any")
def amax_of_each(xs: list[Tensor]) -> Tensor:
    made = _one_each(xs)
    return made.copy_(torch.stack([largest_magnitude(x) for x in xs]))


@amax_of_each.provider("triton", "cuda", replayed=True)
def _amax_triton(xs: list[Tensor]) -> Tensor:
    from quartet.kernels.triton.bytes import tensors

    return tensors.largest_magnitudes(xs)


@op(fake=_one_each, strides="any")
def amax_of_weights(xs: list[Tensor]) -> Tensor:
    return amax_of_each.reference(xs)


@amax_of_weights.provider("triton", "cuda", ahead=_amax_triton)
def _amax_once(xs: list[Tensor]) -> Tensor:
    first, *others = xs
    return _one_each(xs).copy_(REUSED.share(first, "amax_of_weights", lambda: _amax_launched(xs), others))


def _amax_launched(xs: list[Tensor]) -> Tensor:
    """By the launcher in C++: from Python seven launches of eight tensors take the host 1.4 ms."""
    return torch.ops.quartet.amax_of_each.triton(xs)


def _scale_inlined(amax: Tensor, spec: str) -> Two:
    multiplier, scale = scale_of_amax(amax, QuantSpec.parse(spec))
    return store(multiplier), store(scale)


@op(fake=lambda amax, spec: (amax.new_empty(amax.shape), amax.new_empty(amax.shape)), decompose=_scale_inlined,
    strides="any")
def fp8_scale(amax: Tensor, spec: str) -> Two:
    multiplier, scale = scale_of_amax(amax, QuantSpec.parse(spec))
    return multiplier.contiguous(), scale.contiguous()


def _scales_fake(magnitudes, spec):
    first = magnitudes[0]
    return tuple(first.new_empty(len(magnitudes), APART, 1, dtype=torch.float32) for _ in range(2))


@op(fake=_scales_fake, strides="any")
def fp8_scales(magnitudes: list[Tensor], spec: str) -> Two:
    amax = torch.cat([largest_magnitude(x) for x in magnitudes]).reshape(-1, 1, 1)
    multipliers, scales = scale_of_amax(amax.expand(-1, APART, 1), QuantSpec.parse(spec))
    return multipliers.contiguous(), scales.contiguous()


@fp8_scales.provider("triton", "cuda", replayed=True)
def _scales_triton(magnitudes: list[Tensor], spec: str) -> Two:
    from quartet.kernels.triton.bytes import tensors

    return tensors.scales_of(magnitudes, QuantSpec.parse(spec))


def _cast_fake(x, multiplier, element, plain, transposed):
    rows, cols = x.shape
    dtype = FLOAT8[element]
    return (x.new_empty((rows, cols) if plain else 0, dtype=dtype),
            x.new_empty((cols, rows) if transposed else 0, dtype=dtype))


@op(fake=_cast_fake)
def fp8_cast(x: Tensor, multiplier: Tensor, element: str, plain: bool, transposed: bool) -> Two:
    scaled = torch.where(x.isfinite(), x.to(torch.float32) * multiplier, float("nan"))
    codes = fp8_encode(scaled, element)
    none = codes.new_empty(0)
    return codes.contiguous() if plain else none, codes.t().contiguous() if transposed else none


@fp8_cast.provider("triton", "cuda", replayed=True)
def _cast_triton(x: Tensor, multiplier: Tensor, element: str, plain: bool, transposed: bool) -> Two:
    from quartet.kernels.triton.quantize import cast

    if multiplier.numel() == 1:
        return cast.cast(x, multiplier, FLOAT8[element], plain=plain, transposed=transposed)
    if x.stride(0) != 1 or x.dtype is torch.float32:
        return fp8_cast.reference(x, multiplier, element, plain, transposed)
    transposed_codes, codes = cast.cast(x.t(), multiplier, FLOAT8[element], plain=False, transposed=True)
    return codes, codes.t().contiguous() if transposed else transposed_codes


def _listed(made: list[Two], plain: bool, transposed: bool) -> list[Tensor]:
    """Codes of all, then transposes of all, as far as they are wanted."""
    return [codes[i] for i, wanted in enumerate((plain, transposed)) if wanted for codes in made]


def _casts_fake(xs, multipliers, element, plain, transposed):
    return _listed([_cast_fake(x, multipliers, element, plain, transposed) for x in xs], plain, transposed)


@op(fake=_casts_fake)
def fp8_casts(xs: list[Tensor], multipliers: Tensor, element: str, plain: bool, transposed: bool) -> list[Tensor]:
    made = [fp8_cast.reference(x, multipliers[i, :1], element, plain, transposed) for i, x in enumerate(xs)]
    return _listed(made, plain, transposed)


@fp8_casts.provider("triton", "cuda", replayed=True)
def _casts_triton(xs: list[Tensor], multipliers: Tensor, element: str, plain: bool, transposed: bool) -> list[Tensor]:
    from quartet.kernels.triton.bytes import tensors

    return tensors.cast(xs, multipliers, FLOAT8[element], plain=plain, turned=transposed)


def _by_rows_fake(xs, magnitudes, spec, plain, transposed):
    scales = xs[0].new_empty(len(xs), APART, 1, dtype=torch.float32)
    return [*_casts_fake(xs, scales, QuantSpec.parse(spec).element, plain, transposed), scales]


@op(fake=_by_rows_fake)
def fp8_casts_by_rows(xs: list[Tensor], magnitudes: list[Tensor], spec: str, plain: bool,
                      transposed: bool) -> list[Tensor]:
    multipliers, scales = fp8_scales.reference(magnitudes, spec)
    return [*fp8_casts.reference(xs, multipliers, QuantSpec.parse(spec).element, plain, transposed), scales]


@fp8_casts_by_rows.provider("triton", "cuda", replayed=True)
def _by_rows_triton(xs: list[Tensor], magnitudes: list[Tensor], spec: str, plain: bool,
                    transposed: bool) -> list[Tensor]:
    from quartet.kernels.triton.bytes import tensors

    return tensors.cast_by_magnitudes(xs, magnitudes, QuantSpec.parse(spec), plain=plain, turned=transposed)


def _one_by_rows(x: Tensor, made: list[Tensor], plain: bool, transposed: bool) -> Three:
    none = x.new_empty(0, dtype=made[0].dtype)
    return made[0] if plain else none, made[-2] if transposed else none, made[-1][0, :1]


@op(fake=lambda x, magnitudes, spec, plain, transposed: (
        *_cast_fake(x, magnitudes, QuantSpec.parse(spec).element, plain, transposed),
        x.new_empty(1, 1, dtype=torch.float32)))
def fp8_cast_by_rows(x: Tensor, magnitudes: Tensor, spec: str, plain: bool, transposed: bool) -> Three:
    return _one_by_rows(x, fp8_casts_by_rows.reference([x], [magnitudes], spec, plain, transposed), plain, transposed)


@fp8_cast_by_rows.provider("triton", "cuda", replayed=True)
def _one_by_rows_triton(x: Tensor, magnitudes: Tensor, spec: str, plain: bool, transposed: bool) -> Three:
    return _one_by_rows(x, _by_rows_triton([x], [magnitudes], spec, plain, transposed), plain, transposed)


def _cast_rows_fake(x, multiplier, element, plain, transposed, index):
    return _cast_fake(x.new_empty(index.shape[0], x.shape[1]), multiplier, element, plain, transposed)


@op(fake=_cast_rows_fake)
def fp8_cast_rows(x: Tensor, multiplier: Tensor, element: str, plain: bool, transposed: bool, index: Tensor) -> Two:
    return fp8_cast.reference(grouped.gather_rows(x, index), multiplier, element, plain, transposed)


@fp8_cast_rows.provider("triton", "cuda", replayed=True)
def _cast_rows_triton(x: Tensor, multiplier: Tensor, element: str, plain: bool, transposed: bool, index: Tensor) -> Two:
    from quartet.kernels.triton.quantize import cast

    return cast.cast(x, multiplier, FLOAT8[element], plain=plain, transposed=transposed, index=index)


def _by_known_fake(xs, known, spec, margin, plain, transposed):
    scales = xs[0].new_empty(len(xs), APART, 1, dtype=torch.float32)
    return [*_casts_fake(xs, scales, QuantSpec.parse(spec).element, plain, transposed), scales, _one_each(xs)]


@op(fake=_by_known_fake)
def fp8_casts_by_known(xs: list[Tensor], known: list[Tensor], spec: str, margin: int, plain: bool,
                       transposed: bool) -> list[Tensor]:
    q = QuantSpec.parse(spec)
    seen = amax_of_each.reference(xs)
    given = torch.stack([value.reshape(1, 1) for value in known])
    amax = torch.where(given > 0, given, seen) * 2.0**margin
    multipliers, scales = scale_of_amax(amax.expand(-1, APART, 1), q)
    return [*fp8_casts.reference(xs, multipliers, q.element, plain, transposed), scales.contiguous(), seen]


@fp8_casts_by_known.provider("triton", "cuda", replayed=True)
def _by_known_triton(xs: list[Tensor], known: list[Tensor], spec: str, margin: int, plain: bool,
                     transposed: bool) -> list[Tensor]:
    from quartet.kernels.triton.bytes import tensors

    q = QuantSpec.parse(spec)
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    multipliers, scales, seen = tensors.scales_by_known(xs, known, q, margin)
    if all(x.shape[0] % tensors.WORD == 0 for x in xs):
        made = tensors.cast(xs, multipliers, FLOAT8[q.element], plain=plain, turned=transposed, seen=seen)
        return [*made, scales, seen]
    alone = [_cast_triton(x, multipliers[i, :1], q.element, plain, transposed) for i, x in enumerate(xs)]
    return [*_listed(alone, plain, transposed), scales, tensors.largest_magnitudes(xs)]


def _cast_groups_fake(x, spec, ends):
    codes = x.new_empty(x.shape, dtype=FLOAT8[QuantSpec.parse(spec).element])
    return codes, x.new_empty(x.shape[0], ends.shape[0], dtype=torch.float32)


@op(fake=_cast_groups_fake)
def fp8_cast_groups(x: Tensor, spec: str, ends: Tensor) -> Two:
    codes, scales = grouped.quantize_groups(x, QuantSpec.parse(spec), ends)
    return codes.contiguous(), scales.contiguous()


@fp8_cast_groups.provider("triton", "cuda", replayed=True)
def _cast_groups_triton(x: Tensor, spec: str, ends: Tensor) -> Two:
    from quartet.kernels.triton.quantize import groups

    return groups.quantize_groups(x, QuantSpec.parse(spec), ends)


def unavailable(target: Target) -> str | None:
    """Why a device has no FP8, which the products and Triton's conversions need; None where it has."""
    return None if target.capability is None else target.lacks("fp8 tensor cores")


def _mm_fake(a, b, a_scales, b_scales, dtype, fast):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@op(fake=_mm_fake, supports=unavailable)
def fp8_mm(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return torch.ops.aten._scaled_mm.default(a, b.t(), a_scales, b_scales, out_dtype=dtype, use_fast_accum=fast)


def _bmm_fake(a, b, a_scales, b_scales, dtype, fast):
    return a.new_empty(a.shape[0], a.shape[1], b.shape[1], dtype=dtype)


@op(fake=_bmm_fake, supports=unavailable)
def fp8_bmm(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    parts = zip(*(t.split(MOST_GROUPS) for t in (a, b.mT, a_scales, b_scales)), strict=True)
    multiply = torch.ops.aten._scaled_grouped_mm.default
    made = [multiply(*part, out_dtype=dtype, use_fast_accum=fast) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made)


@op(fake=lambda codes: codes.new_empty(codes.shape))
def fp8_row_major(codes: Tensor) -> Tensor:
    return codes.clone(memory_format=torch.contiguous_format)


@fp8_row_major.provider("triton", "cuda", replayed=True)
def _row_major_triton(codes: Tensor) -> Tensor:
    if codes.dim() in (2, 3) and codes.stride(-2) == 1 and codes.element_size() == 1:
        from quartet.kernels.triton.quantize import cast

        return cast.transpose(codes.mT)
    return fp8_row_major.reference(codes)


AMAX_OF_EACH, AMAX_OF_WEIGHTS, SCALE = amax_of_each.overload, amax_of_weights.overload, fp8_scale.overload
SCALES, CASTS = fp8_scales.overload, fp8_casts.overload
CAST, CAST_ROWS, CASTS_BY_KNOWN = fp8_cast.overload, fp8_cast_rows.overload, fp8_casts_by_known.overload
CAST_BY_ROWS, CASTS_BY_ROWS = fp8_cast_by_rows.overload, fp8_casts_by_rows.overload
CAST_GROUPS, ROW_MAJOR = fp8_cast_groups.overload, fp8_row_major.overload
MM, BMM = fp8_mm.overload, fp8_bmm.overload
