"""What is drawn on a GPU, in one launch each: random signs and bits, those of ``quartet.kernels.reference.philox``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.reference.philox import GROUP, SIGN_STREAM, WINDOWS
from quartet.kernels.triton.host import cdiv, on_device
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.memory import tile8
from quartet.kernels.triton.quantize.quantizer import random_words, round_keys

_LANES = 128
_SIGN_STREAM = tl.constexpr(SIGN_STREAM)
_FIRST, _SECOND, _THIRD, _FOURTH = (tl.constexpr(start) for start in WINDOWS)


@triton.jit
def draw_signs(seed, out, site, n, N: tl.constexpr):
    """Row r has the signs of site + r: sign i is negative where bit i of the Philox call of the sign stream is set."""
    row = tl.program_id(0)
    i = tl.arange(0, N)
    zero = tl.zeros_like(i).to(tl.uint32)
    stream = tl.full(i.shape, _SIGN_STREAM, tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), zero, zero, tl.full(i.shape, site + row, tl.uint32), stream)
    word = tl.where(i < 64, tl.where(i < 32, w0, w1), tl.where(i < 96, w2, w3))
    tl.store(out + row * n + i, tl.where((word >> (i % 32).to(tl.uint32)) & 1 == 1, -1.0, 1.0), mask=i < n)


@triton.jit
def draw_bits(seed, out, site, groups, B: tl.constexpr):
    """Nine bits for each of the 16 elements of B groups: two elements an int32 word, of which a group has eight."""
    group = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    words = random_words(round_keys(seed, True), site, group, 16)
    pairs = ()
    for k in tl.static_range(4):
        pairs = pairs + _pairs(words[k])
    tl.store(out + group[:, None] * 8 + tl.arange(0, 8)[None, :], tile8(pairs), mask=(group < groups)[:, None])


@triton.jit
def _pairs(word):
    """The bits of a word's four elements, in two int32."""
    return _pair(word >> _FIRST, word >> _SECOND), _pair(word >> _THIRD, word >> _FOURTH)


@triton.jit
def _pair(low, high):
    return ((low & 0x1FF) | ((high & 0x1FF) << 16)).to(tl.int32, bitcast=True)


def random_signs(seed: Tensor, site: int, n: int) -> Tensor:
    """``reference.random_signs``: float32 ``[n]`` of ±1, n ≤ 128, for an int64 seed on the GPU."""
    return sign_table(seed, site, 1, n)[0]


def sign_table(seed: Tensor, first: int, count: int, n: int) -> Tensor:
    """``reference.sign_table``: float32 ``[count, n]`` of ±1, n ≤ 128, for an int64 seed on the GPU."""
    out = seed.new_empty(count, n, dtype=torch.float32)
    with on_device(seed):
        launch(draw_signs, (count,), (seed, out, first, n), N=128, num_warps=4)
    return out


def random_bits(seed: Tensor, site: int, rows: int, cols: int) -> Tensor:
    """``reference.random_bits``: int16 ``[rows, cols]`` of 0…511 for an int64 seed on the GPU.

    Raises:
        ValueError: ``cols`` is no multiple of 16.
    """
    if cols % GROUP:
        raise ValueError(f"random bits are drawn {GROUP} elements at a time; {cols} columns are no multiple of that")
    out = seed.new_empty(rows, cols, dtype=torch.int16)
    groups = out.numel() // GROUP
    if groups:
        with on_device(seed):
            launch(draw_bits, (cdiv(groups, _LANES),), (seed, out.view(torch.int32), site, groups), B=_LANES,
                   num_warps=_LANES // 32)
    return out
