"""What the Triton kernels must return, by the reference and on the tensors' device, and inputs to ask them of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quartet.kernels import reference as ref
from quartet.kernels.reference.philox import GROUP, WINDOWS, philox4x32
from quartet.kernels.spec import QuantSpec
from quartet.recipes import recipes

if TYPE_CHECKING:
    from quartet.kernels.triton.quantize.chain import Chain

LOW = 0xFFFFFFFF
FLT_MAX = torch.finfo(torch.float32).max
FORWARD = recipes()["quartet"].fprop  # the default: what users run
DEFAULT, ROTATION = FORWARD.a.spec, FORWARD.rotation.n
SIGNS = torch.tensor(FORWARD.rotation.signs, dtype=torch.float32)


def rotated(x: Tensor, chain: Chain) -> Tensor:
    """fp32 ``[R, Kp]`` as the quantiser of the chain sees it."""
    x = ref.hadamard(x, chain.rotation, chain.signs) if chain.rotation else x.float()
    return ref.pad_last(x, chain.multiple)


def quantize(x: Tensor, chain: Chain, first_row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and mask. ``first_row``: where ``x`` starts in the tensor whose rows number the random bits."""
    values = rotated(x, chain)
    random = None
    if chain.spec.stochastic:
        random = random_bits(chain.seed, chain.site, first_row, *values.shape)
    return ref.quantize(values, chain.spec, chain.seed, random=random)


def random_bits(seed: Tensor, site: int, first_row: int, rows: int, cols: int) -> Tensor:
    """Rows ``first_row``… of ``ref.random_bits``."""
    groups = cols // GROUP
    group = torch.arange(first_row * groups, (first_row + rows) * groups, device=seed.device)
    zero = torch.zeros_like(group)
    words = torch.stack(philox4x32((group & LOW, group >> 32, zero + site, zero), (seed & LOW, (seed >> 32) & LOW)), -1)
    return ((words.unsqueeze(-1) >> torch.tensor(WINDOWS, device=seed.device)) & 0x1FF).reshape(rows, cols)


def requantize(codes: Tensor, scales: Tensor, spec: QuantSpec, chain: Chain,
               matrices: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`quantize` makes of the transposes, below each other, of the dequantised matrices."""
    values = ref.dequantize(codes, scales, spec)
    return quantize(values.reshape(matrices, len(values) // matrices, values.shape[1]).mT.flatten(0, 1), chain)


def fold(codes: Tensor, scales: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, int]:
    """E4M3 values, row scales, and how many blocks of 32 lie more than fourteen powers of two below the largest."""
    rows, half = codes.shape
    values = ref.e2m1_decode(ref.unpack_nibbles(codes)).reshape(rows, half // 16, 32)
    byte = scales.repeat_interleave(spec.block // 32, 1).int()
    empty = (values == 0).all(-1)
    row = (torch.where(empty | (byte == 255), 0, byte).amax(1, keepdim=True) - 6).clamp(min=1)
    power = ref.e8m0_decode(((byte - row).clamp(-24, 6) + 127).to(torch.uint8))
    power = torch.where(byte == 255, float("nan"), power)
    folded = (values * power.unsqueeze(-1)).to(torch.float8_e4m3fn).reshape(rows, half * 2)
    return folded, ref.e8m0_decode(row.to(torch.uint8)), int(((byte - row < -8) & ~empty).sum())


def every_fold(span: int = 15) -> tuple[Tensor, Tensor]:
    """Codes ``[255, span · 16]`` and scales ``[255, span]``: a row's blocks of all codes lie 0…span − 1 powers below
    its largest, which every row has another one of; what would lie below 2^-127 stays there."""
    scales = (torch.arange(255).unsqueeze(1) - torch.arange(span)).clamp(min=0).to(torch.uint8)
    codes = ref.pack_nibbles(torch.arange(16, dtype=torch.uint8).repeat(255, span * 2))
    return codes, scales


def every_value(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 ``code · 2^e`` of blocks of 32: fp32 ends below 6 · 2^127."""
    values = ref.e2m1_decode(ref.unpack_nibbles(codes)).double()
    return values * torch.exp2(scales.double() - 127).repeat_interleave(32, 1)


def unfold(values: Tensor, row_scales: Tensor) -> Tensor:
    """fp32 ``[R, K]`` that a folded operand stands for."""
    return values.float() * row_scales


def unscaled(codes: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """fp32 ``code · 2^e``, without the gain."""
    return ref.dequantize(codes, scales, QuantSpec(block=spec.block, rule="floor"))


def mask_rotate(x: Tensor, mask: Tensor | None, rotation: int, signs: Tensor | None, gain: float, cols: int,
                dtype: torch.dtype) -> Tensor:
    y = x.float() * gain
    y = y if mask is None else ref.apply_mask(y, mask)
    y = ref.hadamard(y, rotation, signs, True, dtype) if rotation else y.to(dtype)
    return y[:, :cols]


def difference(what: str, got: Tensor, expected: Tensor, where: Tensor | None = None) -> list[str]:
    """Empty if both have the same bits (of those that ``where`` selects), else a line that says how they differ."""
    if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
        return [f"{what} {got.dtype} {list(got.shape)} on {got.device} instead of {expected.dtype} "
                f"{list(expected.shape)} on {expected.device}"]
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    other = got.contiguous().view(integers) != expected.contiguous().view(integers)
    if where is not None:
        other = other & where
    count = int(other.sum())
    if not count:
        return []
    at = tuple(other.nonzero()[0].tolist())
    return [f"{what} {list(got.shape)}: {count} of {other.numel()} differ, the first at {list(at)} with "
            f"{got[at].item()} instead of {expected[at].item()}"]


def finite(scales: Tensor, per_scale: int) -> Tensor:
    """Which of the elements, ``per_scale`` to a scale byte, are of blocks without a NaN or an infinity."""
    return (scales != 255).repeat_interleave(per_scale, 1)


def quantized_difference(what: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...],
                         spec: QuantSpec) -> list[str]:
    """Codes and scales (and mask) against the reference's; the codes of a block whose scale is NaN mean nothing."""
    lines = difference(f"{what} scales", got[1], expected[1])
    lines += difference(f"{what} codes", got[0], expected[0], finite(expected[1], spec.block // 2))
    if spec.mask and len(got) > 2:
        lines += difference(f"{what} mask", got[2], expected[2], finite(expected[1], spec.block // 8))
    return lines


def swizzled_difference(what: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...],
                        spec: QuantSpec) -> list[str]:
    """:func:`quantized_difference` where ``got`` has its scales swizzled, and has to have zeros as padding."""
    rows, cols = expected[1].shape
    lines = difference(f"{what} swizzled scales", got[1], ref.swizzle_scales(expected[1]))
    if lines:
        return lines
    return quantized_difference(what, (got[0], ref.unswizzle_scales(got[1], rows, cols), *got[2:]), expected, spec)


def fold_difference(what: str, got: tuple[Tensor, Tensor], codes: Tensor, scales: Tensor, spec: QuantSpec,
                    inexact: int) -> list[str]:
    """A folded operand against :func:`fold` of its codes, its value, and the count of the blocks it rounded."""
    values, row_scales, expected = fold(codes, scales, spec)
    ok = finite(scales, spec.block)
    lines = difference(f"{what} values", got[0], values, ok) + difference(f"{what} row scales", got[1], row_scales)
    if not got[0].float().isnan().equal(~ok):
        lines.append(f"{what}: the values are not NaN exactly where the block's scale is")
    if inexact != expected:
        lines.append(f"{what}: counted {inexact} inexact blocks instead of {expected}")
    exact = (unfold(*got) == unscaled(codes, scales, spec)) | ~ok
    if not expected and not exact.all():
        lines.append(f"{what}: {int((~exact).sum())} values differ from code · scale")
    return lines


def fold_of_groups_difference(got: tuple[Tensor, Tensor], codes: Tensor, scales: Tensor, spec: QuantSpec,
                              ends: Sequence[int]) -> list[str]:
    """Each group's part of the rows, the last one's with what is behind it, against :func:`fold` of that part."""
    (values, row_scales), lines = got, []
    for group, (start, end) in enumerate(pairwise((0, *ends[:-1], 2 * codes.shape[1]))):
        packed = (codes[:, start // 2:end // 2].contiguous(),
                  scales[:, start // spec.block:end // spec.block].contiguous())
        if packed[0].numel():
            wanted, wanted_scales, _ = fold(*packed, spec)
            filled = (ref.dequantize(*packed, spec) != 0).any(1)  # else the scale has no meaning
            lines += (difference(f"values of group {group}", values[:, start:end].contiguous(), wanted)
                      + difference(f"scales of group {group}", row_scales[filled, group], wanted_scales[filled, 0]))
    return lines


def data(rows: int, cols: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
         seed: int = 0) -> Tensor:
    """Rows of several sizes with outliers, one row of zeros and one of which the first half is zero."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=gen) * torch.randn(rows, 1, generator=gen).exp()
    x[:, ::37] *= 3 * torch.randn(x[:, ::37].shape[1], generator=gen).exp()
    if rows > 4:
        x[1] = 0
        x[3, : cols // 2] = 0
    return x.to(device, dtype)


def edges() -> dict[str, Tensor]:
    """fp32 ``[R, 64]`` of blocks where a formula, an exponent or a rounding is at its limit."""
    gen = torch.Generator().manual_seed(7)
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(8)[:64] * 2.0 ** torch.arange(
        -3, 3).unsqueeze(1)
    tops = torch.tensor([4.0, 6.0, 7.0, 8.0, 12.0])
    tops = torch.cat((tops, tops.nextafter(torch.tensor(0.0)), tops.nextafter(torch.tensor(9e9))))
    normal = torch.randn(8, 64, generator=gen)
    powers = 2.0 ** torch.tensor([[59.0], [60.0], [61.0], [95.0], [100.0], [120.0], [124.0], [125.0]])
    zeros = torch.zeros(3, 64)
    zeros[1:, 40] = torch.tensor([1.0, -1.0])
    limits = torch.full((4, 64), FLT_MAX)
    limits[1, ::2] *= -1
    limits[2] = 2.0**60
    limits[3, 1:] = 0
    return {
        "ties": ties * torch.tensor([1.0, -1.0]).repeat(32),
        "tops": torch.cat((tops.unsqueeze(1), normal[:1, 1:].clamp(-3, 3).expand(len(tops), -1)), 1),
        "huge": normal * powers,
        "limits": limits,
        "tiny": normal * 2.0 ** torch.tensor([-20.0, -60.0, -118.0, -122.0, -125.0, -127.0, -140.0, -149.0])[:, None],
        "zeros": zeros * torch.tensor([1.0, -1.0]).repeat(32),
        "equal": torch.tensor([[1.0], [3.0], [1e-9], [65504.0]]).expand(-1, 64).contiguous(),
    }


def broken() -> Tensor:
    """fp32 ``[6, 96]``: one NaN, one infinity, one of each sign, a row of NaN, and sound rows and blocks."""
    x = data(6, 96, seed=3)
    x[0, 5] = float("nan")
    x[2, 40] = float("inf")
    x[4, 70], x[4, 71] = float("-inf"), float("inf")
    x[5] = float("nan")
    return x


def spread(rows: int = 3, blocks: int = 40) -> Tensor:
    """fp32 ``[rows, 32 · blocks]`` whose blocks lie up to ``blocks`` powers of two apart."""
    x = data(rows, 32 * blocks, seed=11).reshape(rows, blocks, 32)
    down = torch.arange(blocks).float().roll(5) - blocks // 2
    return (x * 2.0 ** down.unsqueeze(-1)).reshape(rows, -1)
