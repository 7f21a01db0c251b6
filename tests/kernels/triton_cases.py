"""The Triton kernels on CPU tensors in Triton's interpreter, which has to be asked for before Triton is imported.

Run as ``TRITON_INTERPRET=1 python triton_cases.py``: one JSON line for each case, with how it differs from the
reference. Tensors are fp32, since the interpreter rounds bfloat16 its own way.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton
import triton.language as tl
import triton_expected as expected
import two_level_cases

from quartet.kernels import reference as ref
from quartet.kernels.spec import QuantSpec
from quartet.kernels.triton import draws, host
from quartet.kernels.triton.bytes import tensors
from quartet.kernels.triton.gemm import scaled_gemm
from quartet.kernels.triton.quantize import blackwell, cast, ops, rotations
from quartet.kernels.triton.quantize.chain import Chain

CPU = torch.device("cpu")
SEED = torch.tensor(-8_765_432_109_876)
LAST_SITE = 2**32 - 1
QUEST, DEFAULT = QuantSpec(rule="quest", mask=True), expected.DEFAULT
STOCHASTIC = QuantSpec(rule="headroom", rounding="stochastic")
EVEN = QuantSpec(rule="even", mask=True)
FORWARD = Chain(DEFAULT, expected.ROTATION, expected.SIGNS)

CASES: dict[str, Callable[[], list[str]]] = {}


def case(name: str, function: Callable[..., list[str]], *arguments: object) -> None:
    CASES[name] = lambda: function(*arguments)


def chain(spec: QuantSpec, rotation: int = 0, signed: bool = False, site: int = 77) -> Chain:
    return Chain(spec, rotation, ref.random_signs(SEED, 5, rotation) if signed else None, SEED, site)


def inexact() -> int:
    return int(ops.inexact_blocks(CPU))


def check_rows(x: torch.Tensor, c: Chain) -> list[str]:
    """Codes, scales, mask, fold and counter of one call."""
    before = inexact()
    *packed, values, row_scales = ops.quantize(x, c, packed=True, folded=True)
    wanted = expected.quantize(x, c)
    lines = expected.quantized_difference("row", tuple(packed), wanted, c.spec)
    return lines + expected.fold_difference("row", (values, row_scales), packed[0], packed[1], c.spec,
                                            inexact() - before)


def check_unfolded(x: torch.Tensor, c: Chain) -> list[str]:
    *packed, values, row_scales = ops.quantize(x, c, packed=True, folded=False)
    lines = expected.quantized_difference("row", tuple(packed), expected.quantize(x, c), c.spec)
    return lines + [f"{what} of {t.numel()} elements was not asked for" for what, t in
                    (("values", values), ("row scales", row_scales)) if t.numel()]


def check_both(x: torch.Tensor, along_rows: Chain, along_columns: Chain) -> list[str]:
    codes, scales, t_codes, t_scales = ops.quantize_both(x, along_rows, along_columns)
    return (expected.quantized_difference("row", (codes, scales), expected.quantize(x, along_rows), along_rows.spec)
            + expected.quantized_difference("column", (t_codes, t_scales), expected.quantize(x.t(), along_columns),
                                            along_columns.spec))


def check_requantize(x: torch.Tensor, spec: QuantSpec, c: Chain, matrices: int = 1) -> list[str]:
    codes, scales, _ = ref.quantize(x, spec)
    return expected.quantized_difference("column", ops.requantize(codes, scales, spec, c, matrices=matrices),
                                         expected.requantize(codes, scales, spec, c, matrices), c.spec)


def check_fold_of_groups(x: torch.Tensor, spec: QuantSpec, ends: tuple[int, ...]) -> list[str]:
    codes, scales, _ = ref.quantize(x, spec)
    folded = ops.fold(codes, scales, spec, torch.tensor(ends, dtype=torch.int32))
    return expected.fold_of_groups_difference(folded, codes, scales, spec, ends)


@contextmanager
def filled_memory() -> Iterator[None]:
    """New tensors are full of ones, so that what nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, dtype=torch.uint8).item() == 255
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_swizzled(x: torch.Tensor, c: Chain) -> list[str]:
    with filled_memory():
        got = blackwell.quantize(x, c, hardware=True)  # of which a CPU has none
    lines = [] if c.spec.mask or got[2].shape == (x.shape[0], 0) else [f"a mask {list(got[2].shape)}"]
    return lines + expected.swizzled_difference("row", got, expected.quantize(x, c), c.spec)


def check_swizzled_both(x: torch.Tensor, along_rows: Chain, along_columns: Chain) -> list[str]:
    with filled_memory():
        got = blackwell.quantize_both(x, along_rows, along_columns, hardware=True)
    return (expected.swizzled_difference("row", got[:2], expected.quantize(x, along_rows), along_rows.spec)
            + expected.swizzled_difference("column", got[2:], expected.quantize(x.t(), along_columns),
                                           along_columns.spec))


def check_swizzled_requantize(x: torch.Tensor, spec: QuantSpec, c: Chain) -> list[str]:
    codes, scales, _ = ref.quantize(x, spec)
    with filled_memory():
        got = blackwell.requantize(codes, ref.swizzle_scales(scales), spec, c, hardware=True)
    return expected.swizzled_difference("column", got, expected.requantize(codes, scales, spec, c), c.spec)


def check_product(m: int, n: int, k: int, c: Chain) -> list[str]:
    """From two tensors to their product, all by the kernels; the reference's is of the same codes."""
    operands, wanted = [], []
    for x in (expected.data(m, k, seed=4), expected.data(n, k, seed=5)):
        operands += blackwell.quantize(x, c, hardware=True)[:2]
        wanted += expected.quantize(x, c)[:2]
    got = scaled_gemm.gemm(*operands, c.spec.gain**2, torch.float32)
    product = ref.scaled_mm(*wanted, c.spec, c.spec, torch.float32)
    distance = ((got - product).norm() / product.norm()).item()
    return [] if distance < 1e-6 else [f"the product is {distance:.1e} from the reference's"]


def check_fold(x: torch.Tensor, spec: QuantSpec) -> list[str]:
    codes, scales, _ = ref.quantize(x, spec)
    before = inexact()
    folded = ops.fold(codes, scales, spec)
    return expected.fold_difference("packed row", folded, codes, scales, spec, inexact() - before)


def check_every_fold(span: int) -> list[str]:
    """All codes under all scales, in rows of which every block folds exactly, or all but the last."""
    codes, scales = expected.every_fold(span)
    before = inexact()
    values, row_scales = ops.fold(codes, scales, QuantSpec())
    wrong = values.double() * row_scales.double() != expected.every_value(codes, scales)
    wrong, counted = wrong.reshape(255, span, 32).any(-1), inexact() - before
    lines = [f"{int(wrong[:, :15].sum())} blocks are not exact"] if wrong[:, :15].any() else []
    return lines + ([f"counted {counted} instead of {int(wrong.sum())}"] if counted != wrong.sum() else [])


def check_dequantize(x: torch.Tensor, spec: QuantSpec) -> list[str]:
    codes, scales, _ = ref.quantize(x, spec)
    got, wanted = ops.dequantize(codes, scales, spec, torch.float32), expected.unscaled(codes, scales, spec)
    ok = expected.finite(scales, spec.block)
    lines = [] if got.isnan().equal(~ok) else ["the values are not NaN exactly where the block's scale is"]
    return lines + expected.difference("values", got, wanted, ok)


def check_signs(site: int, n: int) -> list[str]:
    first = max(0, site - 4)
    table = draws.sign_table(SEED, first, 5, n)
    return (expected.difference("signs", draws.random_signs(SEED, site, n), ref.random_signs(SEED, site, n))
            + expected.difference("table of signs", table, ref.sign_table(SEED, first, 5, n))
            + expected.difference("row of the table", table[4], ref.random_signs(SEED, first + 4, n)))


def check_bits(site: int, rows: int, cols: int) -> list[str]:
    wanted = ref.random_bits(SEED, site, rows, cols).to(torch.int16)
    return expected.difference("bits", draws.random_bits(SEED, site, rows, cols), wanted)


def check_counter() -> list[str]:
    """That the spread rows do have blocks that do not fold, so that the other cases count something."""
    codes, scales, _ = ref.quantize(expected.spread(), QUEST)
    return [] if expected.fold(codes, scales, QUEST)[2] > 10 else ["every block of the spread rows folds"]


def check_mask_rotate(cols: int, rotation: int, signed: bool, masked: bool, gain: float) -> list[str]:
    n = max(32, rotation)
    width = -(-cols // n) * n
    x = expected.data(6, width, seed=2)
    mask = torch.randint(0, 256, (6, width // 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    signs = ref.random_signs(SEED, 6, rotation) if signed else None
    arguments = (x, mask if masked else None)
    got = rotations.mask_rotate(*arguments, rotation=rotation, signs=signs, gain=gain, cols=cols, dtype=torch.float32)
    return expected.difference("values", got, expected.mask_rotate(*arguments, rotation, signs, gain, cols,
                                                                   torch.float32))


def check_empty(rows: int, cols: int) -> list[str]:
    x = torch.empty(rows, cols)
    lines = check_unfolded(x, chain(QUEST, 32)) + check_both(x, chain(STOCHASTIC), chain(STOCHASTIC))
    codes, scales, _, values, row_scales = ops.quantize(x, chain(QUEST, 32), packed=True, folded=True)
    lines += expected.difference("values", values, torch.empty(rows, codes.shape[1] * 2, dtype=torch.float8_e4m3fn))
    lines += [] if row_scales.shape == (rows, 1) else [f"row scales {list(row_scales.shape)}"]
    lines += expected.quantized_difference("column", ops.requantize(codes, scales, QUEST, chain(STOCHASTIC, 32)),
                                           expected.requantize(codes, scales, QUEST, chain(STOCHASTIC, 32)), STOCHASTIC)
    rotated = rotations.mask_rotate(x, None, rotation=0, signs=None, gain=2.0, cols=cols, dtype=x.dtype)
    lines += expected.difference("rotated", rotated, x)
    return lines + expected.difference("dequantized", ops.dequantize(codes, scales, QUEST, torch.float32),
                                       expected.unscaled(codes, scales, QUEST))


for sigma in ("guarded", "centred", "rms"):
    for power in ("floor", "nearest"):
        case(f"rows-quest-{sigma}-{power}", check_rows, expected.data(5, 96),
             chain(QuantSpec(rule="quest", sigma=sigma, power=power, mask=True), 32 * (sigma != "rms")))
for rule in ("ceil", "floor", "headroom", "quest", "even"):
    case(f"rows-{rule}-stochastic", check_rows, expected.data(6, 80),
         chain(QuantSpec(rule=rule, rounding="stochastic", mask=rule in ("floor", "quest", "even")), site=LAST_SITE))
for rule in ("ceil", "floor", "headroom", "even"):
    case(f"rows-{rule}-nearest", check_rows, expected.data(5, 70), chain(QuantSpec(rule=rule, mask=rule == "floor")))
for rotation in (32, 64, 128):
    for signed in (False, True):
        case(f"rows-rotation-{rotation}{'-signed' * signed}", check_rows, expected.data(5, 130),
             chain(QuantSpec(rule="headroom", rounding="stochastic" if signed else "nearest"), rotation, signed))
for block in (64, 128):
    case(f"rows-block-{block}", check_rows, expected.data(3, 150),
         chain(QuantSpec(block=block, rule="quest", mask=True), block, block == 128))
for name, x in expected.edges().items():
    case(f"rows-{name}-quest", check_rows, x, chain(QUEST))
    case(f"rows-{name}-headroom", check_rows, x, chain(STOCHASTIC))
    case(f"rows-{name}-even", check_rows, x, chain(EVEN))
for sigma in ("centred", "rms"):
    case(f"rows-huge-quest-{sigma}", check_rows, expected.edges()["huge"], chain(QuantSpec(rule="quest", sigma=sigma)))
case("rows-ties-ceil", check_rows, expected.edges()["ties"], chain(QuantSpec(rule="ceil")))
case("rows-tops-ceil", check_rows, expected.edges()["tops"], chain(QuantSpec(rule="ceil", rounding="stochastic")))
case("rows-tops-even-stochastic", check_rows, expected.edges()["tops"],
     chain(QuantSpec(rule="even", rounding="stochastic", mask=True)))
case("rows-tops-floor", check_rows, expected.edges()["tops"], chain(QuantSpec(rule="floor", mask=True)))
for name, spec in (("quest", QUEST), ("headroom", STOCHASTIC), ("even", EVEN)):
    case(f"rows-broken-{name}", check_rows, expected.broken(), chain(spec))
    case(f"rows-broken-rotated-{name}", check_rows, expected.broken(), chain(spec, 32, True))
for name, x in (("data", expected.data(40, 70)), ("one-row", expected.data(1, 130)), *expected.edges().items(),
                ("broken", expected.broken()), ("spread", expected.spread(3, 20))):
    case(f"default-rows-{name}", check_rows, x, FORWARD)
for name, x in (("", expected.data(33, 70)), ("-half", expected.data(40, 34).half())):
    case(f"default-columns{name}", check_unfolded, x.t(), FORWARD)
    case(f"default-both{name}", check_both, x, *[FORWARD] * 2)
    case(f"default-both-stochastic{name}", check_both, x, FORWARD, chain(STOCHASTIC, 32, True))
case("default-requantize", check_requantize, expected.data(40, 64), DEFAULT, FORWARD)
case("default-requantize-stochastic", check_requantize, expected.data(40, 64), DEFAULT, chain(STOCHASTIC, 32, True))
case("default-requantize-broken", check_requantize, expected.broken(), DEFAULT, FORWARD)
case("default-swizzled", check_swizzled, expected.data(33, 71), FORWARD)
case("default-swizzled-transposed", check_swizzled, expected.data(71, 33).t(), FORWARD)
case("default-swizzled-both", check_swizzled_both, expected.data(40, 70), FORWARD, FORWARD)
case("default-swizzled-requantize", check_swizzled_requantize, expected.data(70, 64), DEFAULT, FORWARD)
case("default-fold", check_fold, expected.data(9, 160), DEFAULT)
case("rows-spread", check_rows, expected.spread(), chain(QUEST))
case("rows-one-row", check_rows, expected.data(1, 64), chain(STOCHASTIC, 32, True))
case("rows-one-element", check_rows, expected.data(1, 1), chain(QUEST, 32))
case("rows-one-column", check_rows, expected.data(70, 1), chain(QUEST))
case("rows-several-programs", check_unfolded, expected.data(2, 32 * 37 + 5), chain(STOCHASTIC))
case("rows-loop", check_rows, expected.data(2, 32 * 37 + 5), chain(QUEST))
case("rows-sliced", check_unfolded, expected.data(9, 100)[::2, 3:90], chain(QUEST, 32))
case("rows-strided", check_unfolded, expected.data(5, 150)[:, ::2], chain(QUEST))
case("rows-repeated", check_unfolded, expected.data(1, 64).expand(4, 64), chain(STOCHASTIC))
case("columns-quest", check_rows, expected.data(70, 9).t(), chain(QUEST, 32))
case("columns-even", check_rows, expected.data(70, 9).t(), chain(EVEN, 32))
case("columns-stochastic", check_unfolded, expected.data(33, 33).t(), chain(STOCHASTIC, 32, True, LAST_SITE))
case("columns-rotation-64", check_unfolded, expected.data(100, 5).t(), chain(STOCHASTIC, 64, True))
case("columns-rotation-128", check_unfolded, expected.data(130, 3).t(), chain(QuantSpec(rule="floor", mask=True), 128))
case("columns-sliced", check_unfolded, expected.data(80, 20)[5:70:2, 3:15].t(), chain(QUEST))
case("columns-broken", check_unfolded, expected.broken().t().contiguous().t(), chain(QUEST))
case("both-even", check_both, expected.data(33, 40), chain(EVEN, 32), chain(QuantSpec(rule="even"), 32))
case("both-stochastic", check_both, expected.data(40, 70), chain(STOCHASTIC, 32, True), chain(STOCHASTIC, 32, True, 9))
case("both-nearest", check_both, expected.data(33, 33), chain(QuantSpec(rule="headroom")),
     chain(QuantSpec(rule="ceil"), 32))
case("both-units", check_both, expected.data(20, 140), chain(STOCHASTIC, 64, True), chain(QUEST, 32))
case("both-tall-unit", check_both, expected.data(70, 40), chain(QUEST), chain(STOCHASTIC, 64, True))
case("both-several-programs", check_both, expected.data(33, 300), chain(QUEST, 32), chain(STOCHASTIC, 32, True))
case("both-half", check_both, expected.data(32, 64).half(), chain(STOCHASTIC, 32, True), chain(STOCHASTIC, 32, True, 9))
case("both-half-partial", check_both, expected.data(40, 34).half(), chain(QUEST, 32), chain(STOCHASTIC, 32, True))
case("both-half-odd", check_both, expected.data(33, 31).half(), chain(QUEST, 32), chain(STOCHASTIC, 32, True))
case("columns-half-sliced", check_unfolded, expected.data(80, 60).half()[5:70:2, 3:37].t(), chain(STOCHASTIC, 32, True))
case("columns-half-rotation-128", check_unfolded, expected.data(100, 6).half().t(), chain(STOCHASTIC, 128, True))
case("columns-half-broken", check_unfolded, expected.broken().half().t().contiguous().t(), chain(STOCHASTIC, 32))
case("both-transposed", check_both, expected.data(70, 40).t(), chain(QUEST, 32), chain(STOCHASTIC, 32, True))
case("requantize-stochastic", check_requantize, expected.data(40, 64), QUEST, chain(STOCHASTIC, 32, True))
case("requantize-nearest", check_requantize, expected.data(5, 320), QuantSpec(), chain(QuantSpec(rule="headroom")))
case("requantize-block-64", check_requantize, expected.data(70, 128), QuantSpec(block=64), chain(QUEST, 64, True))
case("requantize-stack", check_requantize, expected.data(3 * 40, 64), QUEST, chain(STOCHASTIC, 32, True), 3)
case("requantize-stack-whole", check_requantize, expected.data(2 * 64, 256), QUEST, chain(QUEST, 32), 2)
case("fold-groups", check_fold_of_groups, expected.spread(5), QuantSpec(), (32, 32, 96, 160))
case("fold-groups-of-64", check_fold_of_groups, expected.data(40, 512), QuantSpec(block=64), (128, 384, 448))
case("requantize-broken", check_requantize, expected.broken(), QUEST, chain(STOCHASTIC))
case("requantize-huge", check_requantize, expected.edges()["huge"], QuantSpec(), chain(QUEST))
case("requantize-tiny", check_requantize, expected.edges()["tiny"], QuantSpec(), chain(QuantSpec()))
for rows, cols in ((1, 32), (33, 71), (130, 5)):
    case(f"swizzled-{rows}x{cols}", check_swizzled, expected.data(rows, cols), chain(QUEST, 32))
    case(f"swizzled-{rows}x{cols}-transposed", check_swizzled, expected.data(cols, rows).t(), chain(QUEST, 32))
case("swizzled-128x128", check_swizzled, expected.data(128, 128), chain(STOCHASTIC, 32, True))
case("swizzled-3x130-stochastic", check_swizzled, expected.data(3, 130), chain(STOCHASTIC, 32, True))
case("swizzled-rotation-128", check_swizzled, expected.data(5, 300), chain(STOCHASTIC, 128, True))
case("swizzled-columns-rotation-64", check_swizzled, expected.data(100, 70).t(), chain(STOCHASTIC, 64, True))
case("swizzled-broken", check_swizzled, expected.broken(), chain(QUEST))
case("swizzled-no-rows", check_swizzled, torch.empty(0, 64), chain(QUEST, 32))
case("swizzled-no-columns", check_swizzled, torch.empty(3, 0), chain(STOCHASTIC, 32))
case("swizzled-both", check_swizzled_both, expected.data(40, 70), chain(STOCHASTIC, 32, True), chain(QUEST, 32))
case("swizzled-both-units", check_swizzled_both, expected.data(130, 40), chain(QUEST), chain(STOCHASTIC, 64, True))
case("swizzled-both-half", check_swizzled_both, expected.data(33, 66).half(), chain(STOCHASTIC, 64, True), chain(QUEST))
case("swizzled-both-one-column", check_swizzled_both, expected.data(33, 1), chain(QUEST), chain(STOCHASTIC, 32, True))
for rows, cols in ((1, 32), (130, 32), (5, 288)):
    case(f"swizzled-requantize-{rows}x{cols}", check_swizzled_requantize, expected.data(rows, cols), QUEST,
         chain(STOCHASTIC, 32, True))
case("swizzled-requantize-64", check_swizzled_requantize, expected.data(100, 32), QUEST, chain(STOCHASTIC, 64, True))
case("swizzled-requantize-128", check_swizzled_requantize, expected.data(70, 32), QUEST, chain(QUEST, 128))
case("swizzled-requantize-broken", check_swizzled_requantize, expected.broken(), QUEST, chain(STOCHASTIC))
case("swizzled-product-130x33x70", check_product, 130, 33, 70, chain(STOCHASTIC, 32, True))
case("swizzled-product-5x40x160", check_product, 5, 40, 160, chain(QUEST, 32))
case("fold", check_fold, expected.data(9, 160), QUEST)
case("fold-headroom", check_fold, expected.data(5, 64), QuantSpec(rule="headroom"))
case("fold-block-128", check_fold, expected.data(5, 256), QuantSpec(block=128))
case("fold-spread", check_fold, expected.spread(), QUEST)
case("fold-spread-block-64", check_fold, expected.spread(), QuantSpec(block=64))
case("fold-counts", check_counter)
case("fold-every-code-and-scale", check_every_fold, 15)
case("fold-one-power-too-many", check_every_fold, 16)
case("fold-broken", check_fold, expected.broken(), QUEST)
case("fold-huge", check_fold, expected.edges()["huge"], QuantSpec())
case("fold-tiny", check_fold, expected.edges()["tiny"], QuantSpec())
case("fold-loop", check_fold, expected.data(2, 32 * 515), QuantSpec())
for name, x in (("data", expected.data(5, 320)), ("broken", expected.broken()), *expected.edges().items()):
    case(f"dequantize-{name}", check_dequantize, x, QuantSpec())
case("dequantize-block-64", check_dequantize, expected.data(9, 640), QuantSpec(block=64, rule="headroom"))
case("signs-128", check_signs, 77, 128)
case("signs-16", check_signs, 1, 16)
case("signs-last-site", check_signs, LAST_SITE, 64)
case("bits", check_bits, 77, 64, 48)
case("bits-of-one-group", check_bits, 1, 1, 16)
case("bits-behind-a-program", check_bits, LAST_SITE, 43, 80)
case("bits-of-nothing", check_bits, 3, 0, 32)
case("mask-rotate-32", check_mask_rotate, 90, 32, False, True, 1.7777)
case("mask-rotate-64-signed", check_mask_rotate, 100, 64, True, True, 4 / 3)
case("mask-rotate-128-signed", check_mask_rotate, 256, 128, True, False, 1.0)
case("mask-rotate-none", check_mask_rotate, 64, 0, False, True, 1.0)
case("mask-rotate-16", check_mask_rotate, 32, 16, True, False, 0.5)
case("empty-rows", check_empty, 0, 64)
case("empty-columns", check_empty, 3, 0)




def check_cast(multiplier: float) -> list[str]:
    """Which codes are NaN: the interpreter rounds the others its own way, and makes no NaN of E4M3 at all."""
    x = expected.data(40, 70)
    x[3, 4:7] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    wanted = ~x.isfinite() | (multiplier != multiplier)
    plain, _ = cast.cast(x, torch.full((1,), multiplier), torch.float8_e5m2, plain=True, transposed=False)
    _, turned = cast.cast(x, torch.full((70,), multiplier), torch.float8_e5m2, plain=False, transposed=True)
    stack = cast.cast_stack(x.bfloat16().view(2, 20, 70), torch.full((1,), multiplier), torch.float8_e5m2, turned=True)
    index = torch.tensor([3, -1, 39, 3, 0])
    rows, _ = cast.cast(x, torch.full((1,), multiplier), torch.float8_e5m2, plain=True, transposed=False, index=index)
    if multiplier == multiplier and not torch.equal(rows.float().isnan()[[0, 2, 3, 4]], wanted[index[[0, 2, 3, 4]]]):
        return ["rows that an index names are others"]
    return [f"{name}: {int((codes.float().isnan() != wanted).sum())} codes are NaN or not, and should not or be"
            for name, codes in (("plain", plain), ("transposed", turned.t()), ("stack", stack.mT.flatten(0, 1)))
            if not torch.equal(codes.float().isnan(), wanted)]


def check_scale_of_amax(rule: str) -> list[str]:
    """Scales, bit for bit, of largest magnitudes of all sizes."""
    found = []
    spec = QuantSpec.parse(f"e5m2/tensor fp32 {rule} nearest")
    for value in (0.0, 1e-45, 1e-39, 3e-38, 1.7, 448.0, 57344.0, 3.3e38, float("inf"), float("nan"), *torch.rand(40)):
        amax = torch.tensor([value], dtype=torch.float32)
        if rule == "delayed":
            made = tensors.scales_by_known([torch.zeros(1, 1)], [amax], spec, 0)[:2]
        else:
            made = tensors.scales_of([amax], spec)
        for what, mine, wanted in zip(("multiplier", "scale"), made, ref.scale_of_amax(amax.reshape(1, 1), spec),
                                      strict=True):
            same = mine.view(torch.int32) == wanted.view(torch.int32)
            if not (same | mine.isnan() & wanted.isnan()).all() and (value > 0 or rule != "delayed"):
                found.append(f"amax {value}: the {what} is {mine.flatten().tolist()}, not {wanted.item()!r}")
    return found


for name, (check, arguments) in two_level_cases.cases():
    case(name, check, *arguments)
case("cast-keeps-what-is-not-finite", check_cast, 2.0)
case("cast-under-a-broken-scale", check_cast, float("nan"))
for rule in ("amax", "amax_pow2", "delayed"):
    case(f"cast-by-{rule}", check_scale_of_amax, rule)


@triton.jit
def _count(out, n):
    for i in range(0, n):
        tl.store(out + i, i)


def cannot_loop() -> str | None:
    """Why this interpreter cannot count to an argument, as Triton 3.6's cannot with NumPy 2.4; else None."""
    try:
        _count[(1,)](torch.zeros(3, dtype=torch.int32), 3)
    except Exception as error:
        return f"the interpreter of Triton {triton.__version__} cannot loop with NumPy {np.__version__}: {error}"
    return None


def main() -> None:
    torch.set_num_threads(1)
    broken_loop = cannot_loop()
    for name, run in CASES.items():
        start = time.perf_counter()
        skipped = None
        try:
            lines = run()
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            if broken_loop and broken_loop.endswith(str(error)):
                skipped = broken_loop
        seconds = round(time.perf_counter() - start, 3)
        print(json.dumps({"case": name, "differences": lines, "seconds": seconds, "skipped": skipped}), flush=True)


if __name__ == "__main__":
    if not host.INTERPRETED.value:
        sys.exit("set TRITON_INTERPRET=1: without it Triton compiles for a GPU")
    main()
