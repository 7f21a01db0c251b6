"""E2M1 in blocks of 16 under two scales: E4M3 a block, and one fp32 number for the tensor.

    value = code · S_b · decode          decode = amax / (top · 6)        encode ≈ 1 / decode

``amax`` is the tensor's largest magnitude and ``top`` the largest block scale: 448, or 256 where a rule wants room.

    amax      S_b = e4m3(amax_b · encode / 6), codes to nearest or stochastically: NVIDIA's recipe, arXiv 2509.25149
    four_six  that scale, or the one that maps amax_b to 4 where its squared error is strictly smaller: arXiv 2512.02010
    eden      codes to nearest, then every group of 128 is given back its length: S_b · Σx²/Σx·q, stochastically rounded
              to E4M3; unbiased when the group was rotated by random signs: Quartet II, arXiv 2601.22813
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quartet.kernels.reference.formats.elements import STEPS, e2m1_decode, e2m1_encode
from quartet.kernels.reference.formats.packing import pack_nibbles
from quartet.kernels.reference.formats.scales import group_amax, spread, tree_sum
from quartet.kernels.reference.hadamard import pad_last
from quartet.kernels.spec import EDEN_GROUP, QuantSpec

BLOCK = 16
EDEN_CLIP = 6.0 / (17.0 / 16.0 * 0.93)  # amax_b in codes: its E4M3 scale errs by at most 1/16, 0.93 clips a little
_TOP = {"amax": 448.0, "four_six": 256.0, "eden": 256.0}
_LARGEST = torch.finfo(torch.float32).max


def tensor_scales(amax: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(encode, decode) fp32 ``[1, 1]`` of a tensor's largest magnitude; NaN for one that is not finite.

    Quotients go through float64, which rounds to the same fp32 number: compiled code divides fp32 only approximately.
    """
    largest = _TOP[spec.rule] * (EDEN_CLIP if spec.rule == "eden" else 6.0)
    exact = amax.to(torch.float32).to(torch.float64).reshape(1, 1)
    encode = (largest / exact).clamp(max=_LARGEST).to(torch.float32)
    encode = torch.where(amax.reshape(1, 1) == 0, 1.0, encode)
    encode = torch.where(exact < float("inf"), encode, float("nan"))
    return encode, (exact * (1.0 / largest)).to(torch.float32)


def quantize(x: Tensor, spec: QuantSpec, amax: Tensor, random: Tensor | None,
             store: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 ``[rows, padded/2]`` and block scales float8_e4m3fn ``[rows, padded/16]`` of fp32 ``x``.

    With ``spec.tile`` a scale belongs to 16 rows too: ``[⌈rows/16⌉, padded/16]``. ``random``: see
    :func:`quartet.kernels.reference.quantize.random_shape`.
    """
    return quantize_encoded(x, spec, tensor_scales(amax, spec)[0], random, store)


def quantize_encoded(x: Tensor, spec: QuantSpec, encode: Tensor, random: Tensor | None,
                     store: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`quantize` by the tensor's multiplier instead of its largest magnitude."""
    x = pad_last(x, spec.multiple)
    rows, cols = x.shape
    blocks = store(x.reshape(rows, cols // BLOCK, BLOCK))
    largest = store(group_amax(blocks, spec))
    if spec.rule == "four_six":
        codes, scales = _four_six(blocks, largest, encode)
    elif spec.rule == "eden":
        assert random is not None
        codes, scales = _eden(blocks, largest, encode, random[:, : cols // BLOCK], store)
    else:
        scales = _e4m3(largest * (encode * (1.0 / 6.0)))
        bits = None if random is None else random.reshape(blocks.shape)
        codes = _codes(blocks, store(_encoders(spread(scales.to(torch.float32), spec, rows), encode)), bits)
    return store(pack_nibbles(codes)).flatten(1), scales


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(max=448.0).to(torch.float8_e4m3fn)


def _encoders(scales: Tensor, encode: Tensor) -> Tensor:
    """What multiplies x of each block: min(1 / (S_b / encode), the largest float)."""
    inverse = encode.to(torch.float64).reciprocal().to(torch.float32)
    return (scales * inverse).to(torch.float64).reciprocal().clamp(max=_LARGEST).to(torch.float32)


def _codes(blocks: Tensor, encoders: Tensor, random: Tensor | None = None) -> Tensor:
    return e2m1_encode(blocks * encoders.unsqueeze(-1), random)


def _four_six(blocks: Tensor, largest: Tensor, encode: Tensor) -> tuple[Tensor, Tensor]:
    tried = []
    for top in (6.0, 4.0):
        scales = _e4m3(largest * (encode * (1.0 / top)))
        codes = _codes(blocks, _encoders(scales.to(torch.float32), encode))
        values = e2m1_decode(codes) * scales.to(torch.float32).unsqueeze(-1)
        error = values - blocks * encode.unsqueeze(-1)
        tried.append((codes, scales.view(torch.uint8), tree_sum(error * error)))
    (six, six_scales, six_error), (four, four_scales, four_error) = tried
    better = four_error < six_error
    scales = torch.where(better, four_scales, six_scales).view(torch.float8_e4m3fn)
    return torch.where(better.unsqueeze(-1), four, six), scales


def _eden(blocks: Tensor, largest: Tensor, encode: Tensor, random: Tensor,
          store: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    rows, count, _ = blocks.shape
    first = _e4m3(largest * (encode * (1.0 / EDEN_CLIP))).to(torch.float32)
    first = store(torch.where(first == 0, 1.0, first))
    codes = _codes(blocks, _encoders(first, encode))
    x = blocks * encode.unsqueeze(-1)
    values = e2m1_decode(codes) * first.unsqueeze(-1)
    per = EDEN_GROUP // BLOCK
    length, along = (store(tree_sum(tree_sum(t).reshape(rows, count // per, per))) for t in (x * x, x * values))
    ratio = (length.to(torch.float64) / along.to(torch.float64)).to(torch.float32)
    ratio = torch.where(along == 0, 1.0, ratio).unsqueeze(-1)
    corrected = (first.reshape(rows, count // per, per) * ratio).reshape(rows, count)
    return codes, e4m3_stochastic(corrected, random)


def e4m3_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """float8_e4m3fn of non-negative fp32 values, up or down with the probabilities of the distance, saturating.

    ``random``: nine bits an element, 0…511. In units of the spacing at x, x in fixed point of nine fraction bits to
    nearest even, plus those bits, rounded down. A NaN stays one.
    """
    bits = x.clamp(max=448.0).view(torch.int32)
    exponent = (bits >> 23).clamp(min=127 - 6)
    spacing = ((exponent - 3) << 23).view(torch.float32)
    steps = (((254 - exponent + 3) << 23).view(torch.float32) * x.clamp(max=448.0) * STEPS).round()
    down = ((steps + random.to(torch.float32)) * (1.0 / STEPS)).floor()
    return torch.where(x.isnan(), x, (down * spacing).clamp(max=448.0)).to(torch.float8_e4m3fn)
