"""MXFP4 rows as E4M3 rows with one power-of-two scale.

E2M1 · 2^d is exact in E4M3 for −8 ≤ d ≤ 6, so the row scale puts the row's largest block at d = 6: fifteen powers
of two fold without an error. A block further down is rounded to the E4M3 grid, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quartet.kernels.reference.formats.elements import E2M1_VALUES
from quartet.kernels.triton.memory import INTERPRETED, store4

TOP = 6
_LOWEST = -24  # below, every element is 0
NAN_ROW = TOP - _LOWEST + 1
_TOP = tl.constexpr(TOP)
_LOW = tl.constexpr(_LOWEST)
_NAN = tl.constexpr(NAN_ROW)
COUNTERS: dict[torch.device, Tensor] = {}


@cache
def table(device: torch.device) -> Tensor:
    """int32 ``[32, 2]``: the E4M3 bytes of the eight E2M1 magnitudes times 2^d, row d + 24; the last row is NaN."""
    d = torch.arange(_LOWEST, TOP + 1, dtype=torch.float32, device="cpu")
    codes = (d.new_tensor(E2M1_VALUES) * 2.0 ** d[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    rows = torch.cat((codes, codes.new_full((1, 8), 0x7F)))
    return lasting(device, lambda: rows.view(torch.int32).to(device))


def inexact_blocks(device: torch.device) -> Tensor:
    """int64 counter, on ``device``, of the blocks of 32 that a fold may have had to round since the process started."""
    if device not in COUNTERS:
        made = lasting(device, lambda: torch.zeros(1, dtype=torch.int64, device=device))
        COUNTERS.setdefault(device, made)  # the first of several threads counts
    return COUNTERS[device]


def lasting(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """``make()`` in a thread and stream of its own: what warms up or records a CUDA graph allocates from its pool."""

    def aside() -> Tensor:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            made = make()
        stream.synchronize()
        return made

    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(aside).result()


@triton.jit
def row_byte(byte, empty):
    """For each block the least byte that the row's scale may have: 0 for a block of zeros or NaN."""
    return tl.where(empty | (byte == 255), 0, byte)


@triton.jit
def row_scale_byte(top):
    """Byte of the row scale from the row's largest block byte."""
    return tl.maximum(top - _TOP, 1)


@triton.jit
def lookup(lut, byte, row):
    """The two table words of a block, and 1 where it may not fold exactly."""
    d = byte - row  # above 6 only for a block of zeros
    at = tl.where(byte == 255, _NAN, tl.minimum(tl.maximum(d, _LOW), _TOP) - _LOW)
    return tl.load(lut + 2 * at), tl.load(lut + 2 * at + 1), d < -8


@triton.jit
def _bytes(nibbles, low, high):
    """int32 of four E4M3 bytes for the four low nibbles of each ``nibbles``."""
    if INTERPRETED:
        out = tl.zeros_like(nibbles)
        for k in tl.static_range(4):
            code = (nibbles >> (4 * k)) & 15
            index = code & 7
            word = tl.where(index < 4, low, high)
            byte = ((word >> (8 * (index & 3))) & 0xFF) | ((code & 8) << 4)
            out = out | (byte << (8 * k))
        return out
    else:
        # prmt takes four bytes of {low, high} by the low three bits of each nibble; with bit 3 set it gives a
        # byte's sign eight times: of 0x80 that is 0xFF, without it 0x80 as it is
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 magnitude, sign;
            and.b32 sign, $1, 0x7777;
            prmt.b32 magnitude, $2, $3, sign;
            prmt.b32 sign, 0x80808080, 0x80808080, $1;
            shl.b32 sign, sign, 7;
            and.b32 sign, sign, 0x80808080;
            or.b32 $0, magnitude, sign;
            }""", "=r,r,r,r", [nibbles, low, high], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def store_folded(pointers, words, low, high, valid):
    """The 32 E4M3 bytes of four words of E2M1 nibbles, to the eight words at each int32 pointer."""
    for h in tl.static_range(2):
        first, second = words[2 * h], words[2 * h + 1]
        store4(pointers + 4 * h, (_bytes(first, low, high), _bytes(first >> 16, low, high),
                                  _bytes(second, low, high), _bytes(second >> 16, low, high)), valid)


@triton.jit
def is_zero(words):
    """Whether all 32 nibbles are ±0."""
    return ((words[0] | words[1] | words[2] | words[3]) & 0x77777777) == 0
