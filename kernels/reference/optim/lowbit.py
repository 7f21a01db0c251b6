"""Weights that exist only as small integers: grids, packing, first scales, the stochastic update (the specification).

A weight is ``code · scale`` with one scale a row (ours), or ``code / scale`` with one a tensor: the rule of DQT
(arXiv 2412.04787), whose released arithmetic ``paper=True`` keeps. Everything here is fp32, and elementwise but for
two sums of rows, whose order :func:`row_sum` and integers fix. ``quartet.kernels.triton.lowbit.ops`` gives the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.kernels.reference.formats.scales import tree_sum
from quartet.kernels.reference.philox import philox4x32

RANDOM_BITS = 24  # of each element: what one word of a Philox call keeps as an exact fp32 fraction
GROUP = 4  # elements served by one Philox call
LANES = 512  # partial sums of a row
RADIAL_LIMIT = 0.125  # largest relative change of a row's scale in a step
RESIDUAL_STEPS = 256  # steps of an 8-bit residual in one step of the grid
RESCALE_SITE = 1 << 31  # added to a parameter's number where its row scales change
TOLERANCE = 2**0.5  # how far a row's mean magnitude may drift before it gets another scale
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """Which random bits a matrix takes, see :func:`random_words`.

    Args:
        seed: of 64 bits. site: the matrix's number, below 2^31. step: from 1 on. first_row: where a shard starts.
    """

    seed: int
    site: int
    step: int
    first_row: int = 0


@dataclass(frozen=True)
class Grid:
    """The integers ``low … high``, stored in ``width`` bits.

    Args:
        step: the first scale of a row over its mean |W|. Ternary has BitNet's absmean; the others have the uniform
            step of least squared error for a Gaussian row (Max 1960: .996, .586, .335 and .0308 σ; mean |W| is .798 σ).
        mean: mean |code| of such a row, which a change of scale restores.
    """

    name: str
    low: int
    high: int
    width: int
    step: float
    mean: float

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.width

    def columns(self, cols: int) -> int:
        """Bytes of a row of ``cols`` codes."""
        return -(-cols // self.per_byte)

    def nbytes(self, rows: int, cols: int, scales: int) -> int:
        """Bytes of the codes of ``[rows, cols]`` and their fp32 scales."""
        return rows * self.columns(cols) + 4 * scales


GRIDS = {
    "ternary": Grid("ternary", -1, 1, 2, 1.0, 0.69),
    "2": Grid("2", -2, 1, 2, 1.248, 0.66),
    "3": Grid("3", -4, 3, 4, 0.734, 1.34),
    "4": Grid("4", -8, 7, 4, 0.420, 2.37),
    "8": Grid("8", -128, 127, 8, 0.0386, 25.9),
}


def grid_of(bits: str | int) -> Grid:
    """The grid of ``"ternary"``, 2, 3, 4 or 8. Raises ValueError for anything else, naming the nearest."""
    if isinstance(bits, bool) or str(bits) not in GRIDS:
        widths = [int(b) for b in GRIDS if b.isdigit()]
        number = int(bits) if str(bits).lstrip("-").isdigit() and not isinstance(bits, bool) else None
        nearest = "" if number is None else f"; nearest: {min(widths, key=lambda b: abs(b - number))}"
        raise ValueError(f"there is no grid of {bits!r} bits; possible: 'ternary', 2, 3, 4, 8{nearest}")
    return GRIDS[str(bits)]


def pack(codes: Tensor, grid: Grid) -> Tensor:
    """int8 codes ``[rows, cols]`` → ``[rows, ceil(cols · width / 8)]``: int8 at 8 bits, else uint8.

    Below 8 bits a code is stored as ``code − low``, element ``k·j + i`` in bits ``width·i`` of byte j (k to a byte).
    3 bits take a nibble. The end of a row is padded with zeros of the grid.
    """
    if grid.width == 8:
        return codes.to(torch.int8).contiguous()
    each = grid.per_byte
    raw = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).to(torch.int16) - grid.low
    raw = raw.to(torch.uint8).reshape(codes.shape[0], -1, each)
    packed = raw[..., 0]
    for i in range(1, each):
        packed = packed | (raw[..., i] << (grid.width * i))
    return packed.contiguous()


def unpack(packed: Tensor, grid: Grid, cols: int) -> Tensor:
    """int8 ``[rows, cols]``: the inverse of :func:`pack`."""
    if grid.width == 8:
        return packed
    mask = (1 << grid.width) - 1
    raw = torch.stack([(packed >> (grid.width * i)) & mask for i in range(grid.per_byte)], dim=-1)
    return raw.flatten(-2)[:, :cols].to(torch.int8) + grid.low


def first_scale(weight: Tensor, grid: Grid, paper: bool) -> Tensor:
    """fp32 scales of fp32 ``[rows, cols]``: ``[rows]``, or ``[1]`` by the paper's ``s = Qp / mean|W|``.

    A row (the paper: a tensor) of zeros has scale 1.
    """
    if paper:
        mean = weight.abs().mean().reshape(1)
        return torch.where(mean == 0, 1.0, grid.high / mean)
    step = weight.abs().mean(1) * grid.step
    return torch.where(step == 0, 1.0, step)


def nearest(weight: Tensor, scale: Tensor, grid: Grid, paper: bool) -> Tensor:
    """int8 codes of the grid's nearest values, ties to even; what lies outside is clamped."""
    z = weight * scale if paper else weight / scale[:, None]
    return z.round().clamp(grid.low, grid.high).to(torch.int8)


def values(codes: Tensor, scale: Tensor, paper: bool) -> Tensor:
    """fp32 weights of int8 codes ``[rows, cols]``."""
    return codes.to(torch.float32) / scale if paper else codes.to(torch.float32) * scale[:, None]


def random_words(seed: int, site: int, step: int, first_row: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """24 random bits an element, int32 ``[rows, cols]``.

    The top bits of the words of Philox4x32-10 with key ``seed`` and counter (group low, group high, ``site``,
    ``step``), where group ``row · ceil(cols/4) + j`` serves elements 4j … 4j+3 of a row. A shard that starts at
    ``first_row`` takes the bits that the whole tensor would.
    """
    width = -(-cols // GROUP)
    group = torch.arange(first_row * width, (first_row + rows) * width, device=device)
    zero = torch.zeros_like(group)
    words = philox4x32((group & _LOW, (group >> 32) & _LOW, zero + (site & _LOW), zero + (step & _LOW)),
                       (zero[:1] + (seed & _LOW), zero[:1] + (seed >> 32 & _LOW)))
    bits = torch.stack([(w >> (32 - RANDOM_BITS)).to(torch.int32) for w in words], dim=-1)
    return bits.reshape(rows, width * GROUP)[:, :cols]


def round_stochastic(z: Tensor, random: Tensor) -> Tensor:
    """fp32 integers: z's floor, or the one above with probability z − floor(z), of 24 bits. NaN stays.

    Each of the 2^24 values of ``random`` is equally likely, and ``ceil(f · 2^24)`` of them round up: the bias is less
    than 2^−24, and none where f is a multiple of that.
    """
    below = torch.floor(z)
    up = random.to(torch.float32) < (z - below) * float(1 << RANDOM_BITS)
    return below + up.to(torch.float32)


def updated(codes: Tensor, scale: Tensor, delta: Tensor, grid: Grid, paper: bool, random: Tensor) -> Tensor:
    """int8 codes after an update, clamped to the grid.

    Args:
        codes: int8 ``[rows, cols]``. scale: see :func:`first_scale`. delta: fp32, what is added to the weights.
        random: of :func:`random_words`.

    The paper rounds ``z = (code/s + Δ)·s``; ours adds the rounded ``Δ/scale`` to the code, which in fp32 keeps updates
    that are small beside the code. A NaN leaves its code as it is; :func:`shown` puts it into the scale.
    """
    old = codes.to(torch.float32)
    if paper:
        new = round_stochastic((old / scale + delta) * scale, random)
    else:
        new = old + round_stochastic(delta * (1.0 / scale)[:, None], random)
    new = torch.where(new == new, new, old)
    return new.clamp(grid.low, grid.high).to(torch.int8)


def updated_with_feedback(codes: Tensor, scale: Tensor, delta: Tensor, residual: Tensor, grid: Grid, paper: bool,
                          random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes to nearest and the int8 residual that is left, itself rounded stochastically (error feedback).

    Args:
        residual: int8 ``[rows, cols]`` in 1/256 of a step of the grid, within half a step.
    """
    old = codes.to(torch.float32)
    steps = delta * (scale if paper else (1.0 / scale)[:, None])
    z = old + residual.to(torch.float32) / RESIDUAL_STEPS + torch.where(steps == steps, steps, 0.0)
    new = z.round().clamp(grid.low, grid.high)
    left = round_stochastic((z - new) * RESIDUAL_STEPS, random)
    return new.to(torch.int8), left.clamp(-RESIDUAL_STEPS // 2, RESIDUAL_STEPS // 2 - 1).to(torch.int8)


def shown(scale: Tensor, new: Tensor) -> Tensor:
    """Scales, NaN where new numbers ``[rows, cols]`` of a row (under one scale: of the tensor) are not finite.

    No code is a NaN, and a weight that kept its old codes would look sound and never learn again.
    """
    finite = torch.isfinite(new).all(1)
    return torch.where(finite if scale.numel() == new.shape[0] else finite.all(), scale, float("nan"))


def row_sum(x: Tensor) -> Tensor:
    """fp32 sums ``[rows]`` of ``[rows, cols]`` in a fixed order.

    ``(x0 + x1) + (x2 + x3)`` of each group of four columns; then each of ``LANES`` lanes takes every LANES-th group in
    turn; then :func:`tree_sum` of the lanes. Zeros fill the end.
    """
    width = -(-x.shape[1] // GROUP)
    lanes = min(LANES, 1 << max(0, width - 1).bit_length())
    turns = -(-width // lanes)
    x = torch.nn.functional.pad(x, (0, turns * lanes * GROUP - x.shape[1])).reshape(-1, turns, lanes, GROUP)
    groups = (x[..., 0] + x[..., 1]) + (x[..., 2] + x[..., 3])
    total = groups[:, 0]
    for turn in range(1, turns):
        total = total + groups[:, turn]
    return tree_sum(total)


def radial(codes: Tensor, scale: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Split an update of each row along the row and across it: (new scale ``[rows]``, the rest of delta).

    ``W + Δ = (1 + a)·W + Δ⊥`` with ``a = ⟨Δ, W⟩/⟨W, W⟩``: the first part is exact in the row's fp32 scale and flips no
    code (weight decay is all of that kind); only Δ⊥ is left to round. ``a`` is limited to ±1/8 a step, the rest stays
    in Δ; a row of zero codes, or with a NaN, keeps its scale. It is computed as ``Σ Δ·code / (scale · Σ code²)``, of
    which the second sum is of integers and exact.
    """
    norm = codes.to(torch.int16).square().sum(1).to(torch.float32) * scale
    share = row_sum(delta * codes.to(torch.float32)) / torch.where(norm == 0, 1.0, norm)
    share = torch.where(share == share, share, 0.0).clamp(-RADIAL_LIMIT, RADIAL_LIMIT)
    return scale * (1.0 + share), delta - values(codes, scale, False) * share[:, None]


def inverse_sum(grid: Grid, cols: int) -> float:
    """One over Σ|code| of a row whose mean |code| is ``grid.mean``."""
    return 1.0 / (grid.mean * cols)


def rescaled(codes: Tensor, scale: Tensor, grid: Grid, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows after the rare change of scale.

    A row whose mean |code| is more than √2 above or below ``grid.mean`` gets the scale that restores it, times at most
    two or a half, and its codes are rounded stochastically onto the new grid: where nothing is clamped the expected
    weights stay. Other rows, and rows of zeros, keep both.
    """
    drift = codes.to(torch.int16).abs().sum(1).to(torch.float32) * inverse_sum(grid, codes.shape[1])
    moved = ((drift > TOLERANCE) | (drift < 1 / TOLERANCE)) & (drift > 0)
    factor = torch.where(moved, drift.clamp(0.5, 2.0), 1.0)
    new = round_stochastic(codes.to(torch.float32) / factor[:, None], random)
    return new.clamp(grid.low, grid.high).to(torch.int8), scale * factor


def absorb(packed: Tensor, scale: Tensor, new: Tensor, residual: Tensor | None, grid: Grid, draw: Draw, *, paper: bool,
           radial_split: bool, rescale: bool) -> Tensor:
    """Round new numbers onto a stored weight, in place.

    Args:
        packed: of :func:`pack`. scale: see :func:`first_scale`. new: fp32 ``[rows, cols]``, what the weight should be.
        residual: int8 ``[rows, cols]`` for :func:`updated_with_feedback`, or None for :func:`updated`.
        draw: the random bits; a change of scale takes those of ``site | RESCALE_SITE``.
        radial_split: :func:`radial` first. rescale: :func:`rescaled` last. Under ``paper`` both are left out.
            :func:`shown` is the very last.

    Returns:
        int64 scalar: how many codes the update changed, a change of scale not counted.
    """
    rows, cols = new.shape
    if not new.numel():
        return torch.zeros((), dtype=torch.int64, device=new.device)

    def random(site: int) -> Tensor:
        return random_words(draw.seed, site, draw.step, draw.first_row, rows, cols, new.device)

    codes, to = unpack(packed, grid, cols), scale
    delta = new - values(codes, scale, paper)
    if radial_split and not paper:
        to, delta = radial(codes, scale, delta)
    if residual is None:
        after = updated(codes, to, delta, grid, paper, random(draw.site))
    else:
        after, left = updated_with_feedback(codes, to, delta, residual, grid, paper, random(draw.site))
        residual.copy_(left)
    flips = (after != codes).sum()
    if rescale and not paper:
        after, to = rescaled(after, to, grid, random(draw.site | RESCALE_SITE))
    packed.copy_(pack(after, grid))
    scale.copy_(shown(to, new))
    return flips
