"""Updates of low-bit weights, by the Triton kernels and by the reference; as a program: in Triton's interpreter.

``TRITON_INTERPRET=1 python lowbit_cases.py`` prints a JSON line for each case, with how it differs from the reference.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.kernels.reference.optim import lowbit as ref
from quartet.kernels.reference.optim.lowbit import GRIDS, Draw

SEED = (1 << 62) + 0x1234_5678_9ABC
DRAW = Draw(SEED, 5, 9, 3)
RULES = {"radial": {"radial_split": True}, "rare": {}, "paper": {"paper": True}}
WHOLE, RAGGED, ODD, TURNS = (3, 64), (2, 13), (1, 2050), (1, 4100)


@dataclass(frozen=True)
class Case:
    """One update."""

    bits: str
    rows: int = 5
    cols: int = 64
    paper: bool = False
    radial_split: bool = False
    rescale: bool = False
    feedback: bool = False
    draw: Draw = DRAW
    drift: float = 1.0  # of the mean |code| from what the grid is made for
    size: float = 0.7  # of the updates, in steps of the grid
    special: bool = False  # NaN, infinities and a row of zeros
    layout: str = "contiguous"


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for bits in GRIDS:
        for rule, options in RULES.items():
            found[f"{bits} {rule}"] = Case(bits, *WHOLE, **options)
            found[f"{bits} {rule} feedback ragged"] = Case(bits, *RAGGED, feedback=True, **options)
        found[f"{bits} shrinks"] = Case(bits, *RAGGED, rescale=True, drift=0.3, size=0.2)
        found[f"{bits} grows"] = Case(bits, *WHOLE, radial_split=True, rescale=True, drift=3.0, size=0.2)
    for bits in ("ternary", "8"):
        found[f"{bits} special"] = Case(bits, 5, 64, radial_split=True, rescale=True, special=True)
        found[f"{bits} special feedback"] = Case(bits, 5, 13, radial_split=True, feedback=True, special=True)
        found[f"{bits} special paper"] = Case(bits, 5, 64, paper=True, special=True)
    for bits in ("ternary", "4", "8"):
        for rows, cols in (ODD, TURNS):
            found[f"{bits} {rows}x{cols}"] = Case(bits, rows, cols, radial_split=True, rescale=True, drift=2.5)
        found[f"{bits} far rows"] = Case(bits, *RAGGED, radial_split=True, rescale=True, drift=2.5,
                                         draw=Draw(SEED, (1 << 31) - 1, (1 << 32) + 7, (1 << 36) + 1))
    for cols in (1, 2, 3, 4, 6, 8, 2048, 2052):
        found[f"4 of {cols} columns"] = Case("4", 2, cols, radial_split=True, feedback=True, size=2.0)
    for layout in ("strided", "offset"):
        found[f"8 {layout}"] = Case("8", *WHOLE, radial_split=True, feedback=True, layout=layout)
        found[f"4 {layout}"] = Case("4", *WHOLE, radial_split=True, feedback=True, layout=layout)
    found["8 feedback read twice"] = Case("8", *TURNS, radial_split=True, feedback=True)
    found["small seed"] = Case("2", *WHOLE, radial_split=True, draw=Draw(0, 0, 1, 0))
    found["no rows"], found["one row"] = Case("8", 0, 8, radial_split=True), Case("8", 1, 8, radial_split=True)
    return found


@dataclass
class Weight:
    """What an update reads and writes."""

    packed: Tensor
    scale: Tensor
    new: Tensor
    residual: Tensor | None

    def to(self, device: torch.device | str, layout: str = "contiguous") -> Weight:
        parts = [None if t is None else placed(t.to(device), layout) for t in
                 (self.packed, self.scale, self.new, self.residual)]
        return Weight(*parts)

    def parts(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if v is not None}


def placed(x: Tensor, layout: str) -> Tensor:
    """A copy of a tensor with the rows apart from each other, or at an odd address."""
    if layout == "strided":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., ::2][..., :x.shape[-1]] = x
        return wide[..., ::2][..., :x.shape[-1]]
    if layout == "offset":
        return x.new_zeros(x.numel() + 1)[1:].copy_(x.flatten()).view(x.shape)
    return x.clone()


def made(case: Case) -> Weight:
    """Codes of a Gaussian, and new numbers near the old ones."""
    generator = torch.Generator().manual_seed(3)
    grid, rows, cols = GRIDS[case.bits], case.rows, case.cols
    codes = torch.randn(rows, cols, generator=generator) * grid.mean * 1.25 * case.drift
    codes = codes.round().clamp(grid.low, grid.high).to(torch.int8)
    scale = torch.rand(1 if case.paper else rows, generator=generator) * (50.0 if case.paper else 0.05) + 1e-3
    new = ref.values(codes, scale, case.paper)
    step = 1.0 / scale if case.paper else scale[:, None]
    new = new + torch.randn(rows, cols, generator=generator) * step * case.size
    if case.special:
        codes[1] = 0
        new[0, 1], new[2, 3], new[3, 0], new[3, 5] = float("nan"), float("inf"), float("-inf"), 1e30
        new[4] = 3.0 * ref.values(codes, scale, case.paper)[4]
    residual = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8) if case.feedback else None
    return Weight(ref.pack(codes, grid), scale, new, residual)


def differences(case: Case, device: str = "cpu") -> list[str]:
    """How an update by the kernels, and their numbers of the weight, differ from the reference's."""
    from quartet.kernels.triton.lowbit import ops as kernels

    grid, wanted = GRIDS[case.bits], made(case)
    mine, found = wanted.to(device, case.layout), []
    options = {"paper": case.paper, "radial_split": case.radial_split, "rescale": case.rescale}
    before = {name: part.clone() for name, part in wanted.parts().items()}
    flips = ref.absorb(wanted.packed, wanted.scale, wanted.new, wanted.residual, grid, case.draw, **options)
    got = kernels.absorb(mine.packed, mine.scale, mine.new, mine.residual, grid, case.draw, **options)
    if got.item() != flips.item():
        found.append(f"{got.item()} codes flipped, not {flips.item()}")
    if case.rows and not case.special and torch.equal(before["packed"], wanted.packed):
        found.append("the update changes no code")
    if case.drift != 1.0 and torch.equal(before["scale"], wanted.scale):
        found.append("the case changes no scale")
    for name, part in wanted.parts().items():
        found += off(name, mine.parts()[name], part)
    expected = ref.values(ref.unpack(wanted.packed, grid, case.cols), wanted.scale, case.paper)
    numbers = kernels.dequantize(placed(wanted.packed.to(device), case.layout), wanted.scale.to(device), grid,
                                 case.cols, case.paper)
    return found + off("numbers", numbers, expected)


def off(name: str, got: Tensor, want: Tensor) -> list[str]:
    got = got.cpu()
    count = int(((got != want) & ~((got != got) & (want != want))).sum()) if got.shape == want.shape else want.numel()
    return [f"{name}: {count} of {want.numel()} differ"] if count or got.shape != want.shape else []


if __name__ == "__main__":
    import triton

    if not triton.knobs.runtime.interpret:
        sys.exit("these cases run in Triton's interpreter: set TRITON_INTERPRET=1 before starting Python")
    torch.set_num_threads(1)
    for name, case in cases().items():
        print(json.dumps({"case": name, "differences": differences(case)}), flush=True)
