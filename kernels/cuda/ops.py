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
CLUSTERS = (1, 2, 4, 8)
HALF = 113 * 1024  # bytes of shared memory of each of two thread blocks on one multiprocessor
ENOUGH = 256       # thread blocks that keep a GPU busy


@dataclass(frozen=True)
class Strips:
    """How a kernel cuts a matrix into strips, one of a cluster, and these into parts, one of a thread block.

    Args:
        width: rows or columns of a strip. unit: what a warp takes of its length at a time.
        fixed: bytes of shared memory of a thread block, ``stage`` of each of its warps.
    """

    width: int
    unit: int
    fixed: int
    stage: int

    def shared(self, length: int, warps: int) -> int:
        """Bytes of shared memory that hold a part of that length."""
        return self.fixed + warps * self.stage + self.width * (length // 2 + 16 + length // BLOCK + 4)


ROWS, COLUMNS = Strips(32, 64, 6656, 8192), Strips(64, 32, 4864, 4096)  # of quantize_both and of requantize


@dataclass(frozen=True)
class Split:
    """Thread blocks of a cluster, the length of a part, threads and bytes of shared memory of each."""

    cluster: int
    length: int
    threads: int
    shared: int


@cache
def split(strips: Strips, length: int, count: int) -> Split | None:
    """How strips of a length are shared out, of which there are ``count``; None where they are too long.

    Two thread blocks of eight warps a multiprocessor where they fit, else one of sixteen, else of eight. Of those that
    make enough thread blocks the one whose warps idle least, and the smallest cluster of equal ones.
    """
    units = -(-length // strips.unit)
    for warps, room in ((8, HALF), (16, SHARED), (8, SHARED)):
        fits = []
        for cluster in CLUSTERS:
            part = -(-units // cluster)
            shared = strips.shared(part * strips.unit, warps)
            if shared <= room and cluster <= max(1, units):
                fits.append((cluster * -(-part // warps), Split(cluster, part * strips.unit, warps * 32, shared)))
        enough = [fit for fit in fits if fit[1].cluster * count >= ENOUGH]
        if enough:
            return min(enough, key=lambda fit: fit[0])[1]
        if fits:
            return fits[-1][1]
    return None


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
    if reason is None and split(ROWS, x.shape[1], -(-x.shape[0] // ROWS.width)) is None:
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
    if reason is None and split(COLUMNS, codes.shape[0] // matrices, codes.shape[1] * 2 // COLUMNS.width) is None:
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
        strips = -(-rows // ROWS.width)
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
        strips = -(-cols // COLUMNS.width)
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
