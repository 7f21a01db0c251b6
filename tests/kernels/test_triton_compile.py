"""Every Triton kernel compiles without a GPU for those we support, and keeps its data in registers.

The compiled variants are those that the Python face launches for the recipes' operands, at widths that can be read
16 bytes at a time.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import triton_expected as expected  # noqa: E402
import triton_offline  # noqa: E402

from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton import draws  # noqa: E402
from quartet.kernels.triton.quantize import cast, ops, rotations
from quartet.kernels.triton.quantize.chain import Chain, ChainConstants  # noqa: E402

QUEST = QuantSpec(rule="quest", sigma="rms", power="nearest", mask=True)
GUARDED = QuantSpec(rule="quest", mask=True)
X = torch.empty(64, 4096, dtype=torch.bfloat16)
CODES, SCALES, MASK = (torch.empty(64, 4096 // n, dtype=torch.uint8) for n in (2, 32, 8))
SCALE = torch.ones(1)
INDEX = torch.empty(256, dtype=torch.int32)
CLIPPING, OLD_FORWARD = Chain(QUEST, 32), Chain(GUARDED, 32)
BACKWARD = Chain(QuantSpec(rule="headroom", rounding="stochastic"), 32, torch.ones(32), torch.tensor(0), 23)
CLIPPED = Chain(QuantSpec(rule="floor", rounding="stochastic", mask=True), 32, None, torch.tensor(0), 23)
NEAREST = Chain(QuantSpec(rule="headroom"), 32, torch.ones(32))
FORWARD = Chain(expected.DEFAULT, expected.ROTATION, expected.SIGNS)


def two_level(spec: str, rotation: int = 0) -> Chain:
    """NVFP4 and its kin: E4M3 scales under the multiplier of the tensor."""
    return Chain(QuantSpec.parse(spec), rotation, torch.ones(rotation) if rotation else None, torch.tensor(0), 23,
                 torch.ones(1))


NVFP4, NVFP4_STOCHASTIC = two_level("e2m1/16 e4m3 amax nearest"), two_level("e2m1/16 e4m3 amax stochastic")


def unrotate(mask: torch.Tensor | None, signs: torch.Tensor | None) -> torch.Tensor:
    return rotations.mask_rotate(X, mask, rotation=32, signs=signs, gain=4 / 3, cols=4096, dtype=torch.bfloat16)


CALLS: dict[str, Callable[[], Any]] = {
    "rows-quest": lambda: ops.quantize(X, CLIPPING, packed=True, folded=False),
    "rows-quest-fold": lambda: ops.quantize(X, CLIPPING, packed=True, folded=True),
    "rows-guarded-fold": lambda: ops.quantize(X, OLD_FORWARD, packed=True, folded=True),
    "rows-default": lambda: ops.quantize(X, FORWARD, packed=True, folded=False),
    "rows-default-fold": lambda: ops.quantize(X, FORWARD, packed=True, folded=True),
    "rows-stochastic-fold": lambda: ops.quantize(X, BACKWARD, packed=False, folded=True),
    "rows-nearest-fold": lambda: ops.quantize(X, NEAREST, packed=False, folded=True),
    "rows-stochastic-odd": lambda: ops.quantize(torch.empty(33, 33, dtype=torch.bfloat16), BACKWARD, packed=True,
                                                folded=True),
    "rows-quest-fp32": lambda: ops.quantize(X.float(), CLIPPING, packed=True, folded=True),
    "rows-stochastic-clipped": lambda: ops.quantize(X, CLIPPED, packed=True, folded=False),
    "columns-stochastic": lambda: ops.quantize(X.t(), BACKWARD, packed=True, folded=False),
    "columns-stochastic-partial": lambda: ops.quantize(X[:40, :70].t(), BACKWARD, packed=True, folded=False),
    "columns-stochastic-odd": lambda: ops.quantize(X[:, :33].t(), BACKWARD, packed=True, folded=False),
    "columns-quest": lambda: ops.quantize(X.t(), CLIPPING, packed=True, folded=False),
    "columns-default": lambda: ops.quantize(X.t(), FORWARD, packed=True, folded=False),
    "columns-guarded": lambda: ops.quantize(X.t(), OLD_FORWARD, packed=True, folded=False),
    "both-quest-stochastic": lambda: ops.quantize_both(X, CLIPPING, BACKWARD),
    "both-stochastic": lambda: ops.quantize_both(X, BACKWARD, BACKWARD),
    "both-fp16": lambda: ops.quantize_both(X.half(), BACKWARD, BACKWARD),
    "both-one-column": lambda: ops.quantize_both(torch.empty(64, 1), BACKWARD, BACKWARD),
    "both-nearest": lambda: ops.quantize_both(X, NEAREST, NEAREST),
    "requantize-stochastic": lambda: ops.requantize(CODES, SCALES, QUEST, BACKWARD),
    "requantize-quest": lambda: ops.requantize(CODES, SCALES, QUEST, CLIPPING),
    "requantize-default": lambda: ops.requantize(CODES, SCALES, expected.DEFAULT, FORWARD),
    "requantize-nearest": lambda: ops.requantize(CODES, SCALES, QUEST, NEAREST),
    "fold": lambda: ops.fold(CODES, SCALES, QUEST),
    "fold-groups": lambda: ops.fold(CODES, SCALES, QUEST, torch.tensor([64, 512], dtype=torch.int32)),
    "dequantize": lambda: ops.dequantize(CODES, SCALES, QUEST, torch.bfloat16),
    "signs": lambda: draws.random_signs(torch.tensor(0), 23, 32),
    "bits": lambda: draws.random_bits(torch.tensor(0), 23, 512, 4096),
    "rows-nvfp4": lambda: ops.quantize(X, NVFP4, packed=True, folded=False),
    "rows-four-six": lambda: ops.quantize(X, two_level("e2m1/16 e4m3 four_six nearest"), packed=True, folded=False),
    "rows-eden": lambda: ops.quantize(X, two_level("e2m1/16 e4m3 eden stochastic"), packed=True, folded=False),
    "rows-tiles": lambda: ops.quantize(X, two_level("e2m1/16x16 e4m3 amax nearest"), packed=True, folded=False),
    "both-nvfp4": lambda: ops.quantize_both(X, NVFP4_STOCHASTIC, two_level("e2m1/16 e4m3 amax stochastic", 16)),
    "tiles-nvfp4": lambda: ops._tiles(X, two_level("e2m1/16x16 e4m3 amax nearest")),
    "dequantize-nvfp4": lambda: ops.dequantize(CODES, torch.empty(64, 256).to(torch.float8_e4m3fn), NVFP4.spec,
                                               torch.bfloat16),
    "amax-rotated": lambda: rotations.rotated_amax(X, 16, torch.ones(16)),
    "cast": lambda: cast.cast(X, SCALE, torch.float8_e4m3fn, plain=True, transposed=False),
    "cast-both": lambda: cast.cast(X, SCALE, torch.float8_e4m3fn, plain=True, transposed=True),
    "cast-e5m2": lambda: cast.cast(X, SCALE, torch.float8_e5m2, plain=True, transposed=False),
    "cast-e5m2-both": lambda: cast.cast(X, SCALE, torch.float8_e5m2, plain=True, transposed=True),
    "cast-columns": lambda: cast.cast(X, torch.ones(4096), torch.float8_e4m3fn, plain=False, transposed=True),
    "cast-turned": lambda: cast.cast_stack(X.view(4, -1, X.shape[1]), SCALE, torch.float8_e4m3fn, turned=True),
    "cast-rows": lambda: cast.cast(X, SCALE, torch.float8_e4m3fn, plain=True, transposed=True, index=INDEX),
    "cast-e5m2-turned": lambda: cast.cast_stack(X.view(4, -1, X.shape[1]), SCALE, torch.float8_e5m2, turned=True),
    "transpose": lambda: cast.transpose(CODES),
    "unrotate-masked": lambda: unrotate(MASK, None),
    "unrotate-signed": lambda: unrotate(None, torch.ones(32)),
}
OTHERS = (80, 89, 100, 120)
EVERYWHERE = ("rows-quest-fold", "rows-default-fold", "rows-stochastic-fold", "rows-stochastic-clipped",
              "columns-quest", "both-stochastic", "rows-nvfp4", "rows-four-six", "rows-eden", "rows-tiles",
              "both-nvfp4", "tiles-nvfp4", "dequantize-nvfp4", "amax-rotated", "requantize-stochastic", "fold",
              "dequantize", "signs", "bits", "cast-both", "cast-rows", "cast-e5m2",
              "cast-e5m2-both", "cast-e5m2-turned", "transpose", "unrotate-masked")
ELSEWHERE_TOO = [(name, capability) for capability in OTHERS for name in EVERYWHERE
                 if name not in ("cast-both", "cast-rows") or capability >= 89]  # Triton converts to E4M3 from there on
LEAST_INSTRUCTIONS = 100
WRITES = {"STG", "RED", "REDG", "ATOMG"}
ELSEWHERE = {"mxfp4_gemm", "put16", "prepare", "update", "settle", "expand", "absorb",
             "rescale", "group_amax", "group_scales", "cast_groups", "quantize_tiles",
             "quantize_whole_rows", "_amax_tile", "_scale_tile",
             "_known_tile"}  # compiled by the tests of their own modules


def compiled(name: str, capability: int) -> triton_offline.Compiled:
    (launch,) = triton_offline.launches(CALLS[name])
    return triton_offline.compile_for(launch, capability)


def kernels_of(names: Iterable[str]) -> set[str]:
    return {launch.kernel.__name__ for name in names for launch in triton_offline.launches(CALLS[name])}


@pytest.mark.parametrize("name", CALLS)
def test_hopper_keeps_all_in_registers(name):
    kernel = compiled(name, 90)
    assert (kernel.stack, kernel.local) == (0, 0), f"{kernel.registers} registers"
    assert not {"LDL", "STL"} & set(kernel.instructions)
    assert len(kernel.instructions) > LEAST_INSTRUCTIONS and WRITES & set(kernel.instructions)


@pytest.mark.parametrize("name, capability", ELSEWHERE_TOO)
def test_other_gpus_keep_all_in_registers(name, capability):
    kernel = compiled(name, capability)
    assert (kernel.stack, kernel.local) == (0, 0), f"{kernel.registers} registers"
    assert len(kernel.instructions) > LEAST_INSTRUCTIONS


def test_products_and_sums_are_not_fused():
    """A fused multiply-add rounds once where the reference rounds twice."""
    for name, call in CALLS.items():
        for launch in triton_offline.launches(call):
            exact = launch.kernel.__name__ in ("draw_signs", "draw_bits", "_transpose_tile")  # no sums of floats
            assert exact or launch.keywords["enable_fp_fusion"] is False, name


def test_every_kernel_is_compiled():
    launched = kernels_of(CALLS)
    assert launched == triton_offline.launched_kernels() - ELSEWHERE and len(launched) >= 7


def test_what_a_chain_is_compiled_for_is_in_tritons_key():
    """Triton hashes the text of a constant and reads its attributes: what the text left out, it would not compile."""
    (launch,) = triton_offline.launches(CALLS["rows-quest"])
    chain = launch.keywords["CHAIN"]
    other = {"spec": replace(chain.spec, power="floor"), "unit": 64, "rotation": 64, "swizzled": True, "hardware": True}
    assert set(other) == {field.name for field in fields(ChainConstants)}
    keys = {triton_offline._source(launch).hash()}
    for name, value in other.items():
        launch.keywords["CHAIN"] = replace(chain, **{name: value})
        keys.add(triton_offline._source(launch).hash())
    assert len(keys) == 1 + len(other)


@pytest.mark.parametrize("capability", OTHERS)
def test_every_kernel_is_compiled_for_every_gpu(capability):
    assert kernels_of(name for name, at in ELSEWHERE_TOO if at == capability) == kernels_of(CALLS)


def test_a_spill_is_seen():
    """The check is one: a kernel that is given fewer registers than it needs has local memory."""
    (launch,) = triton_offline.launches(CALLS["requantize-stochastic"])
    launch.keywords["maxnreg"] = 32
    kernel = triton_offline.compile_for(launch, 90)
    assert kernel.local + kernel.stack > 0
    assert {"LDL", "STL"} & set(kernel.instructions)
