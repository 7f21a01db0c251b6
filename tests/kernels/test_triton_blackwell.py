"""The quantisers for Blackwell, compiled for GPUs that are not here; ``triton_cases`` has what they compute."""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import triton_expected as expected  # noqa: E402
import triton_offline  # noqa: E402

from quartet.kernels.reference import swizzled_size  # noqa: E402
from quartet.kernels.spec import QuantSpec  # noqa: E402
from quartet.kernels.triton.quantize import blackwell, ops  # noqa: E402
from quartet.kernels.triton.quantize.chain import Chain, ChainConstants  # noqa: E402

R, K = 64, 4096
QUEST = QuantSpec(rule="quest", sigma="rms", power="nearest", mask=True)
X = torch.empty(R, K, dtype=torch.bfloat16)
CODES, SCALES = torch.empty(R, K // 2, dtype=torch.uint8), torch.empty(swizzled_size(R, K // 32), dtype=torch.uint8)
TWO_LEVEL = {rounding: Chain(QuantSpec.parse(f"e2m1/16 e4m3 amax {rounding}"), 16, torch.ones(16), torch.tensor(0), 23,
                             torch.ones(1, 1)) for rounding in ("nearest", "stochastic")}
STOCHASTIC = Chain(QuantSpec(rule="headroom", rounding="stochastic"), 32, torch.ones(32), torch.tensor(0), 23)
NEAREST = Chain(QUEST, 32)
DEFAULT = Chain(expected.DEFAULT, expected.ROTATION, expected.SIGNS)
CHAINS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "default": DEFAULT}
CALLS = {
    "quantize": lambda chain, hardware: blackwell.quantize(X, chain, hardware=hardware),
    "quantize-transposed": lambda chain, hardware: blackwell.quantize(X.t(), chain, hardware=hardware),
    "quantize-both": lambda chain, hardware: blackwell.quantize_both(X, chain, chain, hardware=hardware),
    "requantize": lambda chain, hardware: blackwell.requantize(CODES, SCALES, QUEST, chain, hardware=hardware),
}
TWO_LEVEL_CALLS = {"nvfp4": CALLS["quantize"], "nvfp4-both": CALLS["quantize-both"]}
NEAREST_CONVERSION, STOCHASTIC_CONVERSION = "cvt.rn.satfinite.e2m1x2.f32", "cvt.rs.satfinite.e2m1x4.f32"
CASES = [(capability, name, rounding) for capability, names in (
    (90, ("quantize", "requantize")), (100, CALLS), (103, CALLS), (120, CALLS), (121, ("quantize",)))
    for name in names for rounding in ("nearest", "stochastic")]
CASES += [(capability, "quantize", "default") for capability in (100, 120)]
CASES += [(capability, "nvfp4", rounding) for capability in (100, 103, 120) for rounding in TWO_LEVEL]
CASES += [(100, "nvfp4-both", "stochastic"), (120, "nvfp4-both", "nearest")]


def compiled(monkeypatch, capability, name, rounding, hardware):
    known = blackwell.CONVERSIONS.get(divmod(capability, 10), ())
    monkeypatch.setattr(blackwell, "conversions", lambda device: known)
    chain = TWO_LEVEL[rounding] if "nvfp4" in name else CHAINS[rounding]
    (launch,) = triton_offline.launches(lambda: (CALLS | TWO_LEVEL_CALLS)[name](chain, hardware))
    return triton_offline.compile_with_ptx(launch, capability)


@pytest.mark.parametrize("capability, name, rounding", CASES)
def test_conversions_are_where_the_gpu_has_them(monkeypatch, capability, name, rounding):
    machine, ptx = compiled(monkeypatch, capability, name, rounding, True)
    assert re.search(rf"^\.target sm_{capability}a", ptx, re.M)  # these instructions belong to the 'a' targets
    wanted = {"nearest": NEAREST_CONVERSION, "stochastic": STOCHASTIC_CONVERSION}
    there = {key for key, instruction in wanted.items() if instruction in ptx}
    rounding = "nearest" if rounding == "default" else rounding
    assert there == ({rounding} & set(blackwell.CONVERSIONS.get(divmod(capability, 10), ())))
    assert (machine.stack, machine.local) == (0, 0), f"{machine.registers} registers"
    assert not {"LDL", "STL"} & set(machine.instructions)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_conversions_are_fewer_instructions_and_can_be_declined(monkeypatch, rounding):
    by_hardware, _ = compiled(monkeypatch, 100, "quantize", rounding, True)
    by_integers, ptx = compiled(monkeypatch, 100, "quantize", rounding, False)
    assert NEAREST_CONVERSION not in ptx and STOCHASTIC_CONVERSION not in ptx
    assert (by_integers.stack, by_integers.local) == (0, 0)
    assert len(by_hardware.instructions) < len(by_integers.instructions)


def chains(launch):
    """What a launch compiles its quantisers for."""
    return [value for value in launch.keywords.values() if isinstance(value, ChainConstants)]


def test_each_call_is_one_launch():
    """No pass swizzles: quantisers write and read that layout themselves."""
    for name, call in CALLS.items():
        (launch,) = triton_offline.launches(lambda call=call: call(STOCHASTIC, False))
        assert {(chain.swizzled, chain.hardware) for chain in chains(launch)} == {(True, False)}, name
    for call in (lambda: ops.quantize(X, NEAREST, packed=True, folded=True),
                 lambda: ops.requantize(CODES, torch.empty(R, K // 32, dtype=torch.uint8), QUEST, NEAREST)):
        (launch,) = triton_offline.launches(call)
        assert {(chain.swizzled, chain.hardware) for chain in chains(launch)} == {(False, False)}


@pytest.mark.parametrize("chain", [NEAREST, STOCHASTIC])
def test_a_device_without_conversions_rounds_in_integers(chain):
    assert blackwell.conversions(torch.device("cpu")) == ()
    (launch,) = triton_offline.launches(lambda: blackwell.quantize(X, chain, hardware=True))
    assert [chain.hardware for chain in chains(launch)] == [False]


@pytest.mark.parametrize("call, message", [
    (lambda: blackwell.quantize(X, Chain(QuantSpec(block=64), 64), hardware=True), "blocks of 32 by e8m0, not of 64"),
    (lambda: blackwell.quantize_both(X, NEAREST, Chain(QuantSpec(block=128)), hardware=True), "by e8m0, not of 128"),
    (lambda: blackwell.requantize(CODES, SCALES, QuantSpec(block=64), NEAREST, hardware=True), "by e8m0, not of 64"),
    (lambda: blackwell.requantize(CODES, SCALES.view(-1, 128), QUEST, NEAREST, hardware=True),
     r"scales \[swizzled_size\(R, K/32\)\] of e2m1 .* got uint8 \[64, 2048\] and uint8 \[128, 128\]"),
    (lambda: blackwell.requantize(CODES, SCALES[1:], QUEST, NEAREST, hardware=True), r"uint8 \[16383\]"),
    (lambda: blackwell.requantize(CODES, SCALES, QuantSpec(rule="headroom"), NEAREST, hardware=True), "without a gain"),
    (lambda: blackwell.quantize(X, Chain(STOCHASTIC.spec, 32), hardware=True), "needs a seed"),
    (lambda: blackwell.quantize(X.double(), NEAREST, hardware=True), "not float64"),
    (lambda: blackwell.quantize(X[0], NEAREST, hardware=True), "need a 2-D tensor"),
    (lambda: ops.quantize(X, NEAREST, packed=True, folded=True, form=ops.Form(swizzled=True)), "use folded=False"),
])
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
