"""FP8 and INT8 by the Triton kernels and by the reference; as a program: in Triton's interpreter.

``TRITON_INTERPRET=1 python byte_cases.py`` prints a JSON line for each case, with how it differs from the reference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton_expected as expected
from group_cases import apart, padded, special
from torch import Tensor

from quartet.kernels import reference as ref
from quartet.kernels.spec import QuantSpec

BLOCKS = tuple(map(QuantSpec.parse, (
    "e4m3/32 e8m0 ceil nearest", "e4m3/128 fp32 amax_pow2 nearest", "e4m3/128x128 fp32 amax_pow2 nearest",
    "e5m2/32 e8m0 floor nearest", "e4m3/128 fp32 amax nearest", "e4m3/16 fp32 amax nearest",
    "e5m2/64x64 fp32 amax nearest", "e5m2/64 fp32 amax_pow2 nearest", "e4m3/128 e8m0 floor nearest")))
ROWS = tuple(map(QuantSpec.parse, (
    "int8/row fp32 amax nearest", "e4m3/row fp32 amax_pow2 nearest", "e5m2/row fp32 amax nearest",
    "int8/row fp32 amax_pow2 nearest")))
RECIPES = BLOCKS[:3] + ROWS[:2]
TENSORS = tuple(map(QuantSpec.parse, ("e4m3/tensor fp32 amax nearest", "e5m2/tensor fp32 amax_pow2 nearest")))
DELAYED = tuple(map(QuantSpec.parse, ("e4m3/tensor fp32 delayed nearest", "e5m2/tensor fp32 delayed nearest")))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda x: x.t().contiguous().t(), "apart": apart, "padded": lambda x: padded(x.t()).t()}


def difference(what: str, got: Tensor, want: Tensor) -> list[str]:
    """A NaN is one whatever its bits."""
    sound = ~want.float().isnan() if want.is_floating_point() else torch.ones_like(want, dtype=torch.bool)
    lines = expected.difference(what, got, want, sound) + ([] if got.is_contiguous() else [f"{what}: {got.stride()}"])
    if not lines and want.is_floating_point() and not torch.equal(got.float().isnan(), ~sound):
        lines.append(f"{what} are not NaN exactly where the reference's are")
    return lines


def check(x: Tensor, spec: QuantSpec) -> list[str]:
    """Codes and scales of x against the reference's, which is computed of the same tensor where it is."""
    from quartet.kernels.triton.bytes import rows, tiles

    codes, scales = (rows if spec.block == "row" else tiles).quantize(x, spec)
    wanted = ref.quantize(x, spec)
    return difference("codes", codes, wanted[0]) + difference("scales", scales, wanted[1].contiguous())


def check_both(x: Tensor, spec: QuantSpec, turned: QuantSpec) -> list[str]:
    from quartet.kernels.triton.bytes import tiles

    lines: list[str] = []
    made = tiles.quantize_both(x, spec, turned)
    for what, got, (codes, scales, _) in (("rows", made[:2], ref.quantize(x, spec)),
                                          ("columns", made[2:], ref.quantize(x.t(), turned))):
        lines += difference(f"codes of {what}", got[0], codes) + difference(f"scales of {what}", got[1],
                                                                            scales.contiguous())
    return lines


def check_tensors(xs: list[Tensor], spec: QuantSpec) -> list[str]:
    """Magnitudes, scales, codes and transposes of several tensors with a scale each; rows in multiples of four."""
    from quartet.kernels.triton.bytes import tensors

    rows = [x.abs().amax(1) for x in xs]
    multipliers, scales = tensors.scales_of(rows, spec)
    made = tensors.cast(xs, multipliers, spec.format.storage, plain=True, turned=True)
    whole = torch.stack([ref.largest_magnitude(x) for x in xs])
    lines = difference("magnitudes", tensors.largest_magnitudes(xs), whole)
    for i, x in enumerate(xs):
        wanted = ref.fp32_scale(x, spec)
        codes = ref.quantize(x, spec)[0]
        lines += [line for what, got, want in (
            ("multiplier", multipliers[i, :1], wanted[0]), ("last multiplier", multipliers[i, 3:], wanted[0]),
            ("scale", scales[i, :1], wanted[1]), ("codes", made[i], codes),
            ("transpose", made[len(xs) + i], codes.t().contiguous())) for line in difference(f"{what} {i}", got, want)]
    few = [i for i, of_x in enumerate(rows) if of_x.numel() <= tensors.MOST_MAGNITUDES]
    by_rows = tensors.cast_by_magnitudes([xs[i] for i in few], [rows[i] for i in few], spec, plain=True, turned=True)
    apart = (*(made[i] for i in few), *(made[len(xs) + i] for i in few), scales[few])
    for i, (mine, other) in enumerate(zip(by_rows, apart, strict=True)):
        lines += difference(f"result {i} by magnitudes of rows", mine, other)
    for plain in (True, False):
        one = tensors.cast(xs[:1], multipliers[:1], spec.format.storage, plain=plain, turned=not plain)
        lines += difference("codes alone", *one, made[0 if plain else len(xs)])
    return lines


def check_known(xs: list[Tensor], known: list[Tensor], spec: QuantSpec, margin: int) -> list[str]:
    """Codes, transposes, scales and magnitudes of several tensors by those of earlier steps, and alone."""
    from quartet.lowering.ir.ops.fp8 import fp8_casts_by_known as op

    lines: list[str] = []
    for some, given, plain, turned in ((xs, known, True, True), (xs[:1], known[:1], True, False),
                                       (xs[-1:], known[-1:], False, True)):
        arguments = some, given, str(spec), margin, plain, turned
        wanted, made = op.reference(*arguments), op.providers[0].run(*arguments)
        for i, (mine, other) in enumerate(zip(made, wanted, strict=True)):
            lines += difference(f"result {i} of {len(wanted)}", mine, other)
    return lines


def edges(cols: int) -> Tensor:
    """Rows at the limits of a rule: magnitudes beside those where the exponent of the scale changes, ties between
    codes, the largest and the smallest numbers."""
    tops = torch.tensor([448.0, 57344.0, 127.0, 256.0, 1.0]).repeat_interleave(3)
    for i in range(0, len(tops), 3):
        tops[i], tops[i + 2] = tops[i].nextafter(torch.tensor(0.0)), tops[i].nextafter(torch.tensor(9e9))
    limits = torch.tensor([expected.FLT_MAX, 2.0**-126, 2.0**-127, 2.0**-149, 2.0**-118, 2.0**-133, 3.4e38, 1e-30])
    rows = torch.cat((tops, tops * 2.0**-60, tops * 2.0**100, tops * 2.0**-130, limits))
    steps = torch.arange(cols).remainder(61) - 30.0
    ties = (torch.arange(cols).remainder(253) - 126 + 0.5).unsqueeze(0) / 127
    fine = 2.0**steps.clamp(max=0.0) * (1 + torch.arange(cols).remainder(17) / 16)
    x = rows.unsqueeze(1) * torch.where(torch.arange(len(rows)).unsqueeze(1) % 2 == 0, ties, fine / 2.0)
    x[:, 3] = rows * torch.where(torch.arange(len(rows)) % 4 < 2, 1.0, -1.0)
    return x


@dataclass(frozen=True)
class Case:
    x: Tensor
    spec: QuantSpec
    both: QuantSpec | None = None

    def differences(self, device: str = "cpu") -> list[str]:
        """With the tensor's strides as they are."""
        x = self.x.to(device)
        return check(x, self.spec) if self.both is None else check_both(x, self.spec, self.both)


@dataclass(frozen=True)
class Several:
    xs: tuple[Tensor, ...]
    spec: QuantSpec

    def differences(self, device: str = "cpu") -> list[str]:
        return check_tensors([x.to(device) for x in self.xs], self.spec)


@dataclass(frozen=True)
class Known:
    xs: tuple[Tensor, ...]
    known: tuple[float, ...]
    spec: QuantSpec
    margin: int = 0

    def differences(self, device: str = "cpu") -> list[str]:
        known = [torch.tensor([value], device=device) for value in self.known]
        return check_known([x.to(device) for x in self.xs], known, self.spec, self.margin)


def broken(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return special(rows, cols, torch.tensor([cols // 2]), dtype)


def cases() -> dict[str, Case | Several | Known]:
    found: dict[str, Case | Several | Known] = {}
    for spec in (*BLOCKS, *ROWS):
        found[f"{spec} edges"] = Case(edges(150), spec)
        found[f"{spec} special"] = Case(broken(20, 150), spec)
    for spec in RECIPES:
        for layout, lay in LAYOUTS.items():
            found[f"{spec} {layout}"] = Case(lay(expected.data(40, 70)), spec)
        for shape in ((1, 1), (1, 260), (130, 1), (3, 0), (0, 5)):
            if spec.block != "row" or shape[1]:
                found[f"{spec} {shape}"] = Case(expected.data(*shape), spec)
        found[f"{spec} bf16"] = Case(expected.data(9, 136, torch.bfloat16), spec)
    for spec in BLOCKS:
        found[f"{spec} edges turned"] = Case(edges(40).t(), spec)
        found[f"{spec} special turned"] = Case(broken(20, 150).t(), spec)
    for one, other in zip(BLOCKS, (*BLOCKS[:3], *BLOCKS[4:], BLOCKS[3]), strict=True):
        found[f"{one} and {other}"] = Case(expected.data(131, 141), one, other)
    for one, other in zip(RECIPES[:3], (*RECIPES[1:3], RECIPES[1]), strict=True):  # of whole tiles alone
        found[f"{one} and {other} special, whole"] = Case(broken(128, 128), one, other)
        found[f"{one} edges, whole"] = Case(torch.cat((edges(128),) * 3)[:128], one)
    found[f"{BLOCKS[1]} whole, both"] = Case(torch.cat((edges(256),) * 3)[:128], BLOCKS[1], BLOCKS[1])
    found[f"{BLOCKS[1]} whole, columns"] = Case(torch.cat((edges(256),) * 2)[:64].t(), BLOCKS[1])
    for spec in TENSORS:
        shapes = ((128, 64), (4, 16), (132, 70), (260, 1), (4, 300))
        several = [expected.data(*shape, torch.bfloat16) * 2.0 ** (7 * i - 20) for i, shape in enumerate(shapes)]
        several += [several[0] * 0, several[1].t().contiguous().t(), several[2][4:, 3:], several[1] * 3]
        found[f"{spec} several"] = Several(tuple(several), spec)
        found[f"{spec} edges of several"] = Several((edges(150)[:68], edges(9)[:4], edges(64)[4:36] * 2.0**-20), spec)
        found[f"{spec} special of several"] = Several((broken(20, 150), torch.ones(4, 4), broken(12, 9)), spec)
    for spec in DELAYED:
        several = [expected.data(*shape, torch.bfloat16) for shape in ((128, 64), (4, 16), (132, 70), (4, 300))]
        several += [several[0] * 0, broken(20, 150, torch.bfloat16), several[2][4:, 3:]]
        known = (2.5, 0.0, 4000.0, 1e-39, 0.0, 0.0, float("nan"), 3e38, 0.0)
        found[f"{spec} several"] = Known((*several, several[1] * 3, several[1].t().contiguous().t()), known, spec)
        found[f"{spec} with room"] = Known((broken(20, 150), several[0].float()), (7.0, 0.0), spec, 3)
    found["both special"] = Case(broken(20, 150), BLOCKS[0], BLOCKS[1])
    found["both fp16"] = Case(broken(16, 36, torch.float16), BLOCKS[1], BLOCKS[0])
    found["a row of many"] = Case(expected.data(2, 17000), ROWS[0])
    return found


if __name__ == "__main__":
    import triton

    if not triton.knobs.runtime.interpret:
        sys.exit("these cases run in Triton's interpreter: set TRITON_INTERPRET=1 before starting Python")
    torch.set_num_threads(1)
    for name, case in cases().items():
        print(json.dumps({"case": name, "differences": case.differences()}), flush=True)
