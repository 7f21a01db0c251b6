"""Python face of the kernels of low-bit weights: a pass over memory to dequantise, one to round an update.

Bit-equal to ``quartet.kernels.reference.optim.lowbit``. Each launch goes to the tensors' device and its current stream,
and nothing waits for it. To round a weight reads its new number (4 bytes) and reads and writes its code (and a byte of
residual); in radial mode it reads rows of more than 2048 columns twice, the second time from a cache. A change of
scales reads the codes once more, and writes those of the rows that change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.reference.optim import lowbit as ref
from quartet.kernels.reference.optim.lowbit import Draw, Grid
from quartet.kernels.spec import dtype_name
from quartet.kernels.triton.host import cdiv, on_device
from quartet.kernels.triton.launch import launch
from quartet.kernels.triton.lowbit import kernels
from quartet.kernels.triton.memory import INTERPRETED

GROUPS_PER_WARP = 64
MOST = 1 << 30  # rows and columns
_WIDE = 1 << 62  # a bit that keeps an integer argument at 64 bits
_WORD = {2: torch.uint8, 4: torch.int16, 8: torch.int32}  # four codes


@dataclass(frozen=True)
class _Shape:
    """How a matrix falls into groups and programs, and its codes as the kernels see them."""

    codes: Tensor
    rows: int
    cols: int
    wide: bool

    @property
    def width(self) -> int:
        return cdiv(self.cols, ref.GROUP)

    @property
    def groups(self) -> int:
        """Of a chunk."""
        return min(ref.LANES, 1 << (self.width - 1).bit_length())

    @property
    def chunks(self) -> int:
        """Of a row."""
        return cdiv(self.width, self.groups)

    @property
    def warps(self) -> int:
        return max(1, self.groups // GROUPS_PER_WARP)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.cols, self.width, self.codes.shape[1]


def refusal(device: torch.device, rows: int, cols: int) -> str | None:
    """None when the kernels take a low-bit matrix ``[rows, cols]`` on a device, else why not."""
    if device.type != "cuda" and not INTERPRETED.value:
        return f"the Triton kernels run on a GPU, not on {device}"
    if max(rows, cols) > MOST:
        return f"the Triton kernels take at most {MOST} rows and columns, not [{rows}, {cols}]"
    return None


def dequantize(packed: Tensor, scale: Tensor, grid: Grid, cols: int, paper: bool) -> Tensor:
    """fp32 ``[rows, cols]``; arguments as of ``reference.lowbit.pack`` and ``first_scale``.

    Raises:
        ValueError: tensors that do not fit together, or that the kernels do not take.
    """
    _check(packed, scale, grid, cols, paper)
    values = torch.empty(packed.shape[0], cols, dtype=torch.float32, device=packed.device)
    if values.numel():
        shape = _shape(packed.contiguous(), grid, cols)
        with on_device(values):
            launch(kernels.expand, (shape.rows * shape.chunks,),
                   (shape.codes, scale.contiguous(), values, *shape.sizes), LOW=grid.low, WIDTH=grid.width, PAPER=paper,
                   WIDE=shape.wide, G=shape.groups, num_warps=shape.warps)
    return values


def absorb(packed: Tensor, scale: Tensor, new: Tensor, residual: Tensor | None, grid: Grid, draw: Draw, *, paper: bool,
           radial_split: bool, rescale: bool) -> Tensor:
    """``reference.lowbit.absorb``: round new numbers onto a stored weight, in place, and count what changed.

    Tensors that are not contiguous are copied for the kernels, and copied back.

    Raises:
        ValueError: tensors that do not fit together, or that the kernels do not take.
    """
    cols = new.shape[-1]
    _check(packed, scale, grid, cols, paper, {"the new numbers": (new, torch.float32)} | (
        {} if residual is None else {"residuals": (residual, torch.int8)}))
    flips = torch.zeros((), dtype=torch.int64, device=packed.device)
    if not new.numel():
        return flips
    written = [t for t in (packed, scale, residual) if t is not None]
    dense = [t.contiguous() for t in written]
    left = None if residual is None else dense[2]
    shape = _shape(dense[0], grid, cols, new := new.contiguous(), left)
    if left is not None:
        left = left.view(torch.int32 if shape.wide else torch.uint8)
    split = radial_split and not paper
    form: dict[str, Any] = {"LOW": grid.low, "HIGH": grid.high, "WIDTH": grid.width}
    tile: dict[str, Any] = {"WIDE": shape.wide, "G": shape.groups, "num_warps": shape.warps}
    with on_device(new):
        before = dense[1].clone() if paper else dense[1]
        launch(kernels.absorb, (shape.rows,),
               (shape.codes, before, dense[1], new, left, flips, *_random(draw, draw.site, shape), *shape.sizes),
               **form, PAPER=paper, RADIAL=split, FEEDBACK=left is not None, ONE=shape.chunks == 1, **tile)
        if rescale and not paper:
            launch(kernels.rescale, (shape.rows,),
                   (shape.codes, dense[1], *_random(draw, draw.site | ref.RESCALE_SITE, shape),
                    ref.inverse_sum(grid, cols), *shape.sizes), **form, **tile)
    for target, source in zip(written, dense, strict=True):
        if target is not source:
            target.copy_(source)
    return flips


def _random(draw: Draw, site: int, shape: _Shape) -> tuple[int, ...]:
    low = 0xFFFFFFFF
    words = draw.seed & low, draw.seed >> 32 & low, site & low, draw.step & low, draw.first_row * shape.width
    return tuple(word | _WIDE for word in words)


def _shape(packed: Tensor, grid: Grid, cols: int, *others: Tensor | None) -> _Shape:
    """``others``: matrices of ``cols`` columns that are read in groups too."""
    wide = cols % ref.GROUP == 0
    for tensor in (packed, *others):
        if tensor is not None:
            step = ref.GROUP * grid.width // 8 if tensor is packed else ref.GROUP * tensor.element_size()
            wide = wide and tensor.data_ptr() % step == 0
            wide = wide and tensor.storage_offset() * tensor.element_size() % step == 0
    codes = packed.view(_WORD[grid.width] if wide else torch.uint8)
    return _Shape(codes, packed.shape[0], cols, wide)


def _check(packed: Tensor, scale: Tensor, grid: Grid, cols: int, paper: bool,
           matrices: dict[str, tuple[Tensor, torch.dtype]] | None = None) -> None:
    rows = packed.shape[0]
    wanted: dict[str, tuple[Tensor, Sequence[int], torch.dtype]] = {
        "packed codes": (packed, (rows, grid.columns(cols)), torch.int8 if grid.width == 8 else torch.uint8),
        "scales": (scale, (1 if paper else rows,), torch.float32)}
    wanted |= {name: (tensor, (rows, cols), dtype) for name, (tensor, dtype) in (matrices or {}).items()}
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype is not dtype or tensor.device != packed.device:
            raise ValueError(f"{name} of a {grid.name} weight of {rows} rows and {cols} columns are "
                             f"{dtype_name(dtype)} {list(shape)} on {packed.device}, not {dtype_name(tensor.dtype)} "
                             f"{list(tensor.shape)} on {tensor.device}")
    why = refusal(packed.device, rows, cols)
    if why is not None:
        raise ValueError(f"{why}; use quartet.kernels.reference.optim.lowbit")
