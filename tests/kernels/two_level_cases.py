"""Cases of ``triton_cases`` for NVFP4: block scales in E4M3 under one number for the tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton_expected as expected
from torch import Tensor

from quartet.kernels import reference as ref
from quartet.kernels.reference.formats.nvfp4 import tensor_scales
from quartet.kernels.reference.quantize import largest_magnitude
from quartet.kernels.spec import QuantSpec
from quartet.kernels.triton.quantize import blackwell, ops, rotations
from quartet.kernels.triton.quantize.chain import Chain

SEED = torch.tensor(-8_765_432_109_876)
NEAREST = QuantSpec.parse("e2m1/16 e4m3 amax nearest")
STOCHASTIC = QuantSpec.parse("e2m1/16 e4m3 amax stochastic")
FOUR_SIX = QuantSpec.parse("e2m1/16 e4m3 four_six nearest")
EDEN = QuantSpec.parse("e2m1/16 e4m3 eden stochastic")
TILE = QuantSpec.parse("e2m1/16x16 e4m3 amax nearest")
SPECS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "four-six": FOUR_SIX, "eden": EDEN, "tile": TILE}
Case = tuple[Callable[..., list[str]], tuple[object, ...]]


def prepared(x: Tensor, spec: QuantSpec, rotation: int, signed: bool, site: int,
             part: float = 1.0) -> tuple[Chain, Tensor, Tensor]:
    """The chain of ``x``, what its quantiser sees, and the largest magnitude, or a part of it, that it goes by."""
    seed = SEED.to(x.device)
    signs = ref.random_signs(seed, 5, rotation) if signed else None
    values = ref.hadamard(x, rotation, signs) if rotation else x.float()
    amax = largest_magnitude(values) * part
    return Chain(spec, rotation, signs, seed, site, tensor_scales(amax, spec)[0]), values, amax


def difference(what: str, got: tuple[Tensor, ...], x: Tensor, chain: Chain, values: Tensor, amax: Tensor) -> list[str]:
    """Codes and scales, row by row or swizzled, against the reference's."""
    codes, scales, _ = ref.quantize(values, chain.spec, chain.seed, chain.site, amax=amax)
    lines = expected.difference(f"{what} scales", got[1], swizzled(scales, x.shape[0]) if got[1].dim() == 1 else scales)
    sound = scales.float().isfinite()
    sound = sound.repeat_interleave(16, 0)[: x.shape[0]] if chain.spec.tile else sound
    return lines + expected.difference(f"{what} codes", got[0], codes, sound.repeat_interleave(8, 1))


def swizzled(scales: Tensor, rows: int) -> Tensor:
    """In the layout of the tensor cores, those of tiles for each row."""
    tiled = scales.shape[0] != rows
    return ref.swizzle_scales(scales.view(torch.uint8).repeat_interleave(16, 0)[:rows] if tiled else
                              scales.view(torch.uint8))


def check_quantize(x: Tensor, spec: QuantSpec, rotation: int = 0, signed: bool = False, site: int = 77,
                   part: float = 1.0) -> list[str]:
    """Both layouts of the scales."""
    chain, *seen = prepared(x, spec, rotation, signed, site, part)
    got = ops.quantize(x, chain, packed=True, folded=False)[:2]
    torch.use_deterministic_algorithms(True)  # new memory is full of ones
    try:
        laid_out = blackwell.quantize(x, chain, hardware=False)[:2]
    finally:
        torch.use_deterministic_algorithms(False)
    return difference("row", got, x, chain, *seen) + difference("swizzled", laid_out, x, chain, *seen)


def check_both(x: Tensor, spec: QuantSpec, rotation: int, t_spec: QuantSpec, t_rotation: int) -> list[str]:
    rows, *row_seen = prepared(x, spec, rotation, rotation > 0, 3)
    columns, *column_seen = prepared(x.t(), t_spec, t_rotation, t_rotation > 0, 9)
    got = ops.quantize_both(x, rows, columns)
    return (difference("row", got[:2], x, rows, *row_seen)
            + difference("column", got[2:], x.t(), columns, *column_seen))


def check_amax(x: Tensor, rotation: int, signed: bool) -> list[str]:
    chain, _, amax = prepared(x, NEAREST, rotation, signed, 0)
    got = rotations.rotated_amax(x, rotation, chain.signs)
    if amax.isnan():
        return [] if got.shape == (1, 1) and got.isnan() else [f"{got} instead of NaN"]
    return expected.difference("amax", got, amax)


def check_rotate(x: Tensor, rotation: int, signed: bool) -> list[str]:
    chain, values, amax = prepared(x, NEAREST, rotation, signed, 0)
    got, largest = rotations.rotate(x, rotation, chain.signs)
    return expected.difference("values", got, values) + expected.difference("amax", largest, amax)


def check_dequantize(x: Tensor, spec: QuantSpec, dtype: torch.dtype) -> list[str]:
    """``code · scale`` alone: what is left of the reference's value when the tensor's factor is one."""
    codes, scales, _ = ref.quantize(x, spec, SEED.to(x.device), 77, amax=largest_magnitude(x))
    got, spread = ops.dequantize(codes, scales, spec, dtype), scales.float()
    spread = (spread.repeat_interleave(16, 0)[: x.shape[0]] if spec.tile else spread).repeat_interleave(16, 1)
    wanted = (ref.e2m1_decode(ref.unpack_nibbles(codes)) * spread).to(dtype)
    lines = [] if got.isnan().equal(wanted.isnan()) else ["the values are not NaN exactly where the scale is"]
    return lines + expected.difference("values", got, wanted, ~wanted.isnan())


def usual_ends(scale: float = 1.0) -> Tensor:
    """Rows of blocks, on the grid and off it, under tops around those whose scales are E4M3's least normal number or
    its largest, where the largest magnitude of all is ``scale``; the last row has usual ones alone, and ties."""
    torch.manual_seed(3)
    grid, ties = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5])
    grid, ties = torch.cat((grid, -grid)) / 6, torch.cat((grid[1:], ties, -grid[-4:])) / 6
    tops = torch.cat((1 + torch.arange(-8, 8) * 2.0**-23, 1 + torch.arange(-8, 8) / 64)) * 2.0**-14
    tops = torch.stack((tops, tops * 1.5, tops * 2.0**14 * 0.9, torch.exp2(torch.linspace(-9, 0, 32))))
    x = tops.unsqueeze(-1) * torch.stack((grid, torch.rand(16), (grid * 1.5).clamp(-1, 1), ties)).unsqueeze(1)
    x[..., 0], x[-1, -1, 0] = tops, 1.0
    return x.flatten(1) * scale


def cases() -> Iterator[tuple[str, Case]]:
    data, broken = expected.data, expected.broken()
    for name, spec in SPECS.items():
        yield f"nvfp4-{name}", (check_quantize, (data(5, 96), spec))
        yield f"nvfp4-{name}-odd", (check_quantize, (data(33, 71), spec))
        yield f"nvfp4-{name}-columns", (check_quantize, (data(70, 36).t(), spec))
        yield f"nvfp4-{name}-broken", (check_quantize, (broken, spec))
        yield f"nvfp4-{name}-empty", (check_quantize, (torch.empty(0, 64), spec))
        yield f"nvfp4-{name}-no-columns", (check_quantize, (torch.empty(3, 0), spec))
        for edge, x in expected.edges().items():
            yield f"nvfp4-{name}-{edge}", (check_quantize, (x, spec))
        yield f"nvfp4-{name}-dequantize", (check_dequantize, (data(33, 80), spec, torch.float32))
        yield f"nvfp4-{name}-dequantize-broken", (check_dequantize, (broken, spec, torch.float32))
    for name in ("four-six", "eden"):  # of a smaller tensor: scales saturate, and so have codes to
        yield f"nvfp4-{name}-beyond", (check_quantize, (data(5, 96), SPECS[name], 0, False, 77, 0.05))
    for power in (0, 126, 127, -107, -108, -109, -110, -126, -140):  # and multipliers to 2^±119
        yield f"nvfp4-four-six-ends-{power}", (check_quantize, (usual_ends(2.0**power), FOUR_SIX))
    for part in (6 / 7, 0.9 * 6 / 7, 0.857, 0.8573, 4 / 7, 3.0):  # of a multiplier by which some scales are clipped
        yield f"nvfp4-four-six-part-{part:.4f}", (check_quantize, (usual_ends(), FOUR_SIX, 0, False, 77, part))
    for name in ("nearest", "stochastic", "four-six"):
        for rotation in (16, 32, 128):
            yield f"nvfp4-{name}-rotation-{rotation}", (check_quantize, (data(5, 80), SPECS[name], rotation, True))
        yield f"nvfp4-{name}-columns-rotation", (check_quantize, (data(48, 20).t(), SPECS[name], 16, True, 2**32 - 1))
    yield "nvfp4-several-programs", (check_quantize, (data(2, 16 * 67), STOCHASTIC))
    yield "nvfp4-eden-several-programs", (check_quantize, (data(2, 16 * 67), EDEN))
    yield "nvfp4-sliced", (check_quantize, (data(9, 100)[::2, 3:90], NEAREST))
    yield "nvfp4-tile-columns-sliced", (check_quantize, (data(80, 40)[5:70:2, 3:35].t(), TILE))
    yield "nvfp4-half", (check_quantize, (data(33, 64).half().t(), STOCHASTIC, 16, True))
    yield "nvfp4-both", (check_both, (data(40, 70), STOCHASTIC, 0, STOCHASTIC, 16))
    yield "nvfp4-both-whole", (check_both, (data(32, 64), STOCHASTIC, 0, NEAREST, 16))
    yield "nvfp4-both-odd", (check_both, (data(33, 33), NEAREST, 0, STOCHASTIC, 64))
    yield "nvfp4-dequantize-half", (check_dequantize, (data(5, 48), NEAREST, torch.float16))
    for rotation in (16, 128):
        yield f"nvfp4-amax-{rotation}", (check_amax, (data(40, 70), rotation, True))
        yield f"nvfp4-amax-{rotation}-columns", (check_amax, (data(70, 33).t(), rotation, True))
        yield f"nvfp4-rotate-{rotation}", (check_rotate, (data(40, 70), rotation, True))
        yield f"nvfp4-rotate-{rotation}-columns", (check_rotate, (data(70, 33).t(), rotation, False))
    yield "nvfp4-eden-rotated", (check_quantize, (data(5, 300), EDEN, 128, True))
    yield "nvfp4-eden-rotated-columns", (check_quantize, (data(70, 20).t(), EDEN, 128, True))
    yield "nvfp4-amax-several-rows", (check_amax, (data(70, 64), 16, False))
    yield "nvfp4-amax-zeros", (check_amax, (torch.zeros(3, 64), 16, False))
    yield "nvfp4-amax-empty", (check_amax, (torch.empty(0, 64), 16, False))
    yield "nvfp4-amax-broken", (check_amax, (broken, 32, True))
