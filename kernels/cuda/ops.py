"""Python face of the CUDA quantisers: tensors in, tensors out.

They compute chains of ``quartet.kernels.reference`` with sums in another order: their results are those that
``reference.tolerance`` allows. Each launch goes to the tensors' device and its current stream; nothing waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quartet.kernels.cuda.library import SHARED, function
from quartet.kernels.launcher import Argument, launch
from quartet.kernels.spec import QuantSpec

if TYPE_CHECKING:
    from quartet.kernels.triton.quantize.chain import Chain

ROTATION, BLOCK = 32, 32
STOCHASTIC = QuantSpec(rule="headroom", rounding="stochastic")
SIDE = 64     # width of a strip, and what a warpgroup takes of its length at a time
FIXED = 4864  # bytes of shared memory of a thread block
MEMORY, RESERVED = 228 * 1024, 1024  # bytes of shared memory of a multiprocessor, and what a thread block takes of it
# Clusters of so many thread blocks that an H200 has at once, one block a multiprocessor. Those of four and eight leave
# some of its 132 empty, as a cluster lies in one GPC: with two blocks a multiprocessor it has 62 of four, 30 of eight.
AT_ONCE = {1: 132, 2: 66, 4: 31, 8: 15}
ROWS, COLUMNS = 4096, 2048  # bytes of shared memory of each warp of quantize_both and of requantize, for its tiles
MOST = 2**36  # elements; a group of 16 has a number of 32 bits


@dataclass(frozen=True)
class Split:
    """Thread blocks of a cluster, the length of a part, threads and bytes of shared memory of each."""

    cluster: int
    length: int
    threads: int
    shared: int


def shared(stage: int, length: int, warps: int) -> int:
    """Bytes of shared memory of a thread block of so many warps, each with ``stage`` of them, that keeps a part."""
    return FIXED + warps * stage + SIDE * (length // 2 + 16 + length // BLOCK + 4)


@cache
def split(stage: int, length: int, count: int) -> Split | None:
    """How strips of a length are shared out, of which there are ``count``; None where they are too long.

    A multiprocessor takes the longer, the more parts it gets and the longer they are: the cluster where that is least,
    the smallest of equal ones. Where a multiprocessor gets several parts and has room for two, thread blocks of eight
    warps, so that one computes while another waits for its cluster; else of sixteen, else of eight.

    Args:
        stage: ``ROWS`` or ``COLUMNS``.
    """
    units = -(-length // SIDE)
    best = None
    for cluster, at_once in AT_ONCE.items():
        part, turns = -(-units // cluster) * SIDE, -(-count // at_once)
        two = shared(stage, part, 8) <= MEMORY // 2 - RESERVED
        warps = 8 if (two and turns > 1) or shared(stage, part, 16) > SHARED else 16
        room = shared(stage, part, warps)
        if room <= SHARED and cluster <= max(1, units) and (best is None or turns * part < best[0]):
            best = turns * part, Split(cluster, part, warps * 32, room)
    return best and best[1]


def declines(chain: Chain, device: torch.device) -> str | None:
    """None where the kernels quantise by this chain on a device, else why not."""
    if chain.spec != STOCHASTIC or chain.rotation != ROTATION:
        return f"the CUDA quantisers round by '{STOCHASTIC}' after H{ROTATION}, not by '{chain.spec}'"
    signs, seed = chain.signs, chain.seed
    if seed is None or seed.device != device or seed.dtype != torch.int64 or (signs is not None and (
            signs.device != device or signs.dtype != torch.float32 or signs.shape != (ROTATION,)
            or signs.stride(0) != 1)):
        return f"the CUDA quantisers need an int64 seed and {ROTATION} float32 signs or none on the tensor's device"
    return None


def declines_both(x: Tensor, along_rows: Chain, along_columns: Chain) -> str | None:
    """None where :func:`quantize_both` takes the tensor, else why not."""
    reason = declines(along_rows, x.device) or declines(along_columns, x.device)
    if reason is None and (not x.is_cuda or x.dim() != 2 or x.dtype != torch.bfloat16 or x.stride(1) != 1
                           or x.shape[1] % 8 or x.stride(0) % 8 or x.data_ptr() % 16):
        return "the CUDA quantisers read bfloat16 rows on a GPU in whole units of 16 bytes"
    if reason is None and _padded(x.shape[0]) * _padded(x.shape[1]) > MOST:
        return f"the CUDA quantisers number {MOST} random elements, fewer than {tuple(x.shape)}"
    if reason is None and split(ROWS, x.shape[1], -(-x.shape[0] // SIDE)) is None:
        return f"the CUDA quantisers keep rows in shared memory, and {x.shape[1]} elements are too many"
    return reason


def declines_requantize(codes: Tensor, scales: Tensor, in_spec: QuantSpec, chain: Chain, matrices: int) -> str | None:
    """None where :func:`requantize` takes the packed tensor, else why not."""
    reason = declines(chain, codes.device)
    if reason is None and (in_spec.element, in_spec.block, in_spec.scale, in_spec.gain) != ("e2m1", BLOCK, "e8m0", 1.0):
        return f"the CUDA quantisers read e2m1 in blocks of {BLOCK} without a gain, not '{in_spec}'"
    if reason is None and not (
            codes.is_cuda and codes.dim() == 2 and codes.is_contiguous() and scales.is_contiguous()
            and codes.data_ptr() % 16 == codes.shape[1] % 16 == 0 and 0 < matrices < 65536
            and codes.shape[0] % matrices == 0 and scales.shape == (codes.shape[0], codes.shape[1] // 16)):
        return f"the CUDA quantisers turn 1 to 65535 contiguous matrices on a GPU, not {matrices} of {codes.shape}"
    if reason is None and _padded(codes.shape[0] // matrices) * matrices * codes.shape[1] * 2 > MOST:
        return f"the CUDA quantisers number {MOST} random elements, fewer than {matrices} of {codes.shape}"
    if reason is None and split(COLUMNS, codes.shape[0] // matrices, codes.shape[1] * 2 // SIDE) is None:
        return f"the CUDA quantisers keep columns in shared memory, and {codes.shape[0] // matrices} rows are too many"
    return reason


def quantize_both(x: Tensor, along_rows: Chain, along_columns: Chain,
                  inexact: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x`` ``[R, K]`` quantised along its rows and folded, and ``x.t()`` along its, from one read.

    Args:
        x: what :func:`declines_both` does not decline. inexact: int64 counter of blocks that a fold may have rounded.
    Returns:
        values float8_e4m3fn ``[R, Kp]`` and row scales float32 ``[R, 1]`` with ``values · row scale = code · 2^e``;
        codes uint8 ``[K, Rp/2]`` and scales uint8 ``[K, Rp/32]``; Kp and Rp rounded up to multiples of 32.
    """
    rows, cols = x.shape
    values = x.new_empty(rows, _padded(cols), dtype=torch.float8_e4m3fn)
    row_scales = x.new_empty(rows, 1, dtype=torch.float32)
    codes = x.new_empty(cols, _padded(rows) // 2, dtype=torch.uint8)
    scales = x.new_empty(cols, _padded(rows) // BLOCK, dtype=torch.uint8)
    if x.numel():
        strips = -(-rows // SIDE)
        how = split(ROWS, cols, strips)
        assert how is not None and x.device.index is not None
        kernel = function(x.device.index, "quantize_both", how.cluster, how.threads, how.shared)
        with torch.cuda.device(x.device):
            launch(kernel, (strips * how.cluster,), (x, *_given(along_rows), *_given(along_columns), values, row_scales,
                                                     codes, scales, inexact, x.stride(0), rows, cols, how.length))
    return values, row_scales, codes, scales


def requantize(codes: Tensor, scales: Tensor, chain: Chain, inexact: Tensor, *, packed: bool, folded: bool,
               matrices: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The transpose of each of ``matrices`` that lie below each other, from packed codes, quantised along its rows.

    Args:
        codes, scales: uint8 ``[matrices·R, K/2]`` and ``[matrices·R, K/32]``, contiguous; see
            :func:`declines_requantize`. inexact: as in :func:`quantize_both`.
    Returns:
        codes uint8 ``[matrices·K, Rp/2]``, scales uint8 ``[matrices·K, Rp/32]`` where ``packed``, values float8_e4m3fn
        ``[matrices·K, Rp]`` and row scales float32 ``[matrices·K, 1]`` where ``folded``; ``[0]`` of what is not asked.
    """
    rows, cols = codes.shape[0] // matrices, codes.shape[1] * 2

    def empty(wanted: bool, width: int, dtype: torch.dtype) -> Tensor:
        return codes.new_empty((matrices * cols, width) if wanted else 0, dtype=dtype)

    made = (empty(packed, _padded(rows) // 2, torch.uint8), empty(packed, _padded(rows) // BLOCK, torch.uint8),
            empty(folded, _padded(rows), torch.float8_e4m3fn), empty(folded, 1, torch.float32))
    if codes.numel():
        strips = -(-cols // SIDE)
        how = split(COLUMNS, rows, strips * matrices)
        assert how is not None and codes.device.index is not None
        kernel = function(codes.device.index, "requantize", how.cluster, how.threads, how.shared)
        with torch.cuda.device(codes.device):
            launch(kernel, (strips * how.cluster, matrices),
                   (codes, scales, *_given(chain), *(t if t.numel() else None for t in made), inexact, rows, cols,
                    how.length))
    return made


def _given(chain: Chain) -> tuple[Argument, ...]:
    return chain.signs, chain.seed, chain.site


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
