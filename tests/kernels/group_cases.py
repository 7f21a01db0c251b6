"""FP8 rows with scales of groups, by the Triton kernels and by the reference; as a program: in Triton's interpreter.

``TRITON_INTERPRET=1 python group_cases.py`` prints a JSON line for each case, with how it differs from the reference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton_expected as expected
from torch import Tensor

from quartet.kernels.reference.products import grouped
from quartet.kernels.spec import QuantSpec

SPECS = {f"{element}-{rule}": QuantSpec(element, "row", "fp32", rule) for element in ("e4m3", "e5m2")
         for rule in ("amax", "amax_pow2")}
E4M3 = SPECS["e4m3-amax"]


def beside(x: Tensor) -> Tensor:
    """With rows beside each other, as the transpose of ``[tokens, rows]``."""
    return x.t().contiguous().t()


def apart(x: Tensor) -> Tensor:
    """Neither rows nor tokens beside each other."""
    rows, tokens = x.shape
    wide = x.new_full((2 * rows, 3 * tokens), 1e4)
    wide[::2, ::3] = x
    return wide[::2, ::3]


def padded(x: Tensor) -> Tensor:
    """A part of a wider ``[tokens, rows]``, at an odd address."""
    rows, tokens = x.shape
    wide = x.new_full((tokens, rows + 5), 1e4)
    wide[:, 1:rows + 1] = x.t()
    return wide[:, 1:rows + 1].t()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"beside": beside, "row-major": Tensor.contiguous, "apart": apart,
                                                  "padded": padded}


def cut(tokens: int, groups: int, multiple: int = 16, tail: int = 0) -> Tensor:
    """Ends of groups of very different sizes, every fourth one empty, ``tail`` tokens before the last token."""
    gen = torch.Generator().manual_seed(tokens + groups)
    last = (tokens - tail) // multiple
    ends = torch.randint(0, last + 1, (groups,), generator=gen).sort().values
    ends[3::4] = ends[2::4][: len(ends[3::4])]
    ends[-1] = last
    return (ends * multiple).to(torch.int32)


def differences(x: Tensor, spec: QuantSpec, ends: Tensor) -> list[str]:
    """How codes and scales differ from the reference's, which is computed of the same tensors where they are.

    NaN is NaN, whatever its bits.
    """
    from quartet.kernels.triton.quantize import groups

    codes, scales = groups.quantize_groups(x, spec, ends)
    wanted = grouped.quantize_groups(x, spec, ends)
    lines: list[str] = []
    for what, got, want in zip(("scales", "codes"), (scales, codes), reversed(wanted), strict=True):
        lines += [] if got.is_contiguous() else [f"{what} have strides {got.stride()}"]
        lines += expected.difference(what, got, want, ~want.float().isnan())
        if not torch.equal(got.float().isnan(), want.float().isnan()):
            lines.append(f"{what} are not NaN exactly where the reference's are")
    return lines


def special(rows: int, tokens: int, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, infinities, zeros and the ends of a dtype's range, in rows of their own; at least 12 of these."""
    x = expected.data(rows, tokens, seed=9)
    limit = torch.finfo(dtype)
    least = limit.smallest_normal
    values = (float("nan"), float("inf"), float("-inf"), -0.0, limit.max, -limit.max, least, -float("nan"))
    for row, value in enumerate(values):
        x[row, (row * 37) % tokens] = value
        x[row, tokens - 1 - row] = value
    x[8] = least * 2.0 ** -torch.arange(tokens).remainder(9).float()
    x[9] = limit.max
    x[10, : ends[0]] = -0.0
    x[11] = least * 2.0 ** -torch.arange(tokens).remainder(5).add(2).float()
    return x.to(dtype)


@dataclass(frozen=True)
class Case:
    x: Tensor
    spec: QuantSpec
    ends: Tensor

    def differences(self, device: str = "cpu") -> list[str]:
        """With the tensor's strides as they are."""
        moved = self.x.to(device)
        assert moved.stride() == self.x.stride() or device != "cpu"
        return differences(moved, self.spec, self.ends.to(device))


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name, spec in SPECS.items():
        ends = cut(304, 7)
        found[name] = Case(beside(expected.data(70, 304)), spec, ends)
        found[f"{name} special"] = Case(beside(special(20, 304, ends)), spec, ends)
    found["e4m3-amax bytes"] = Case(beside(expected.data(67, 203)), E4M3, cut(203, 5, multiple=1))
    for layout, lay in LAYOUTS.items():
        found[layout] = Case(lay(expected.data(40, 96)), E4M3, cut(96, 3))
    for dtype in (torch.bfloat16, torch.float16):
        ends = cut(272, 4)
        found[f"{dtype}"] = Case(beside(expected.data(130, 272, dtype)), E4M3, ends)
        rows = 8 if dtype is torch.bfloat16 else 12  # the interpreter takes the smallest of bfloat16 for 0
        found[f"{dtype} special"] = Case(beside(special(12, 272, ends, dtype)[:rows]), SPECS["e5m2-amax"], ends)
    found["small groups"] = Case(beside(expected.data(5, 160)), E4M3, torch.arange(1, 11, dtype=torch.int32) * 16)
    found["one group"] = Case(beside(expected.data(33, 144)), E4M3, torch.tensor([144], dtype=torch.int32))
    found["many groups"] = Case(beside(expected.data(5, 528)), E4M3, cut(528, 100))
    found["a tail"] = Case(beside(expected.data(5, 528)), E4M3, cut(528, 3, tail=250))
    found["all behind"] = Case(beside(expected.data(5, 48)), E4M3, torch.zeros(3, dtype=torch.int32))
    found["ends beyond"] = Case(beside(expected.data(5, 48)), E4M3, torch.tensor([16, 64, 80], dtype=torch.int32))
    found["a strided end"] = Case(beside(expected.data(5, 48)), E4M3, torch.tensor([16, 0, 48, 0],
                                                                                   dtype=torch.int32)[::2])
    found["one token"] = Case(expected.data(5, 1), E4M3, torch.tensor([0, 1, 1], dtype=torch.int32))
    found["one row"] = Case(expected.data(1, 33), E4M3, torch.tensor([0, 9, 33], dtype=torch.int32))
    found["no tokens"] = Case(torch.empty(70, 0), E4M3, torch.zeros(3, dtype=torch.int32))
    found["no rows"] = Case(torch.empty(0, 32), E4M3, cut(32, 3))
    return found


if __name__ == "__main__":
    import triton

    if not triton.knobs.runtime.interpret:
        sys.exit("these cases run in Triton's interpreter: set TRITON_INTERPRET=1 before starting Python")
    torch.set_num_threads(1)
    for name, case in cases().items():
        print(json.dumps({"case": name, "differences": case.differences()}), flush=True)
