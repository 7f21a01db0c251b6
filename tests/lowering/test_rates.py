"""Where the constants of a device come from, the host, and what the default makes of each known GPU."""

from dataclasses import replace

import pytest
import torch

from quartet.lowering import registry
from quartet.lowering.cost import Cost, Layer, break_even, predict
from quartet.lowering.rates import PASSES, Host, Rates, Time, kept, rates_of, shipped
from quartet.lowering.recipe.types import ROLES
from quartet.recipes import recipes
from quartet.runtime import gpus
from quartet.runtime.devices import Target

DEVICE = "NVIDIA A100-SXM4-80GB"
HERE = Target("cuda", "sm_80", name=DEVICE, gpu=gpus.named("a100"))


# where they come from

def test_shipped_before_the_data_sheet_before_an_estimate():
    assert rates_of(HERE).source == "the data sheet of a100"
    assert rates_of(Target.named("h200")).source == "rates shipped for NVIDIA H200" == rates_of(
        Target.named("sm_90")).source
    guessed = replace(gpus.named("rtx 4080"), name="geforce rtx 4070", estimated=True)
    assert rates_of(replace(HERE, name="NVIDIA GeForce RTX 4070", gpu=guessed)).source == (
        "an estimate for geforce rtx 4070")


@pytest.mark.parametrize("target", [Target("cpu"), Target.named("gfx950"), Target("cuda", "sm_75"),
                                    Target("cuda", "sm_90", name="NVIDIA H100 80GB HBM3 MIG 1g.10gb")])
def test_of_some_devices_nothing_is_known(target):
    assert rates_of(target) is None


def test_an_h100_is_not_taken_for_an_h200():
    h100, h200 = (rates_of(Target.named(name)) for name in ("h100", "h200"))
    assert all(h100.passes[name] == pytest.approx(h200.passes[name] * 4.8 / 3.35) for name in h200.passes)
    assert h100.origin.margin > h200.origin.margin


def test_quantisers_are_not_faster_than_their_instructions_start():
    b200, h200 = (rates_of(Target.named(name)) for name in ("b200", "h200"))
    assert b200.passes["copy"] == pytest.approx(h200.passes["copy"] * 4.8 / 7.7)
    assert b200.passes["rows"] / h200.passes["rows"] == pytest.approx(132 * 1.83 / (148 * 1.856), rel=1e-3)


def test_recipes_that_the_quantisers_of_hopper_decline_are_priced_with_tritons():
    portable = {"both axes", "requantise"}
    for name in ("h200", "h100", "l40s", "b200"):
        rates = rates_of(Target.named(name))
        assert set(rates.portable) == (portable if name.startswith("h") else set())
        tritons = replace(rates, passes={n: taken * rates.portable.get(n, 1.0) for n, taken in rates.passes.items()},
                          portable={})
        layer = Layer(dict.fromkeys(ROLES, registry.KERNELS[registry.NAMES.index("triton-fp8")]), 4096, 4096, 4096)
        for recipe, own in (("quartet", True), ("tetrajet", False)):
            cost, slower = (predict(recipes()[recipe], layer, each) for each in (rates, tritons))
            assert (float(cost.quantized) < float(slower.quantized)) == (own and name.startswith("h"))


def test_what_was_measured_on_hopper_is_of_its_own_kernels(monkeypatch):
    known = shipped.RATES["h200"]
    monkeypatch.setattr(kept, "here", lambda target: replace(known, portable={}))
    assert rates_of(Target.named("h200")).portable == known.portable and rates_of(HERE).portable == {}


# the host

def test_the_host_is_what_limits_where_it_takes_longer():
    host = Host(ours=20e-6, plain=10e-6)
    rates = Rates("made up", {"bf16": 1e14, "fp8": 1e15}, {"bf16": 0.0, "fp8": 0.0}, dict.fromkeys(
        PASSES, 0.0), 0.0, host)
    layer = Layer(dict.fromkeys(ROLES, registry.KERNELS[registry.NAMES.index("cublaslt")]), 1024, 1024, 1024)
    cost = predict(recipes()["fp8"], layer, rates)
    assert float(cost.plain_host) == pytest.approx(10e-6 * (3 + 6))
    passes = 1 + 2 / 8 + 1  # a cast of X and of E, eight weights together
    assert float(cost.host) == pytest.approx(20e-6 * (3 + passes) + 10e-6 * 6)  # three products, neighbours
    assert not cost.pays and "µs of the host" in str(cost)
    assert predict(recipes()["fp8"], layer, replace(rates, host=Host())).pays
    wide = replace(layer, m=16384, n=8192, k=8192)
    assert predict(recipes()["fp8"], wide, rates).pays
    symbolic = Layer(layer.kernels, m=16384)
    assert break_even(recipes()["fp8"], symbolic, rates) > break_even(recipes()["fp8"], symbolic,
                                                                      replace(rates, host=Host()))


def test_what_a_graph_takes_to_be_called_is_divided_among_its_layers():
    """An H200 has a layer of 8192 × 4096 × 4096 behind itself before its host has called it, alone and quantised."""
    target = Target.named("h200")
    layer = Layer(kernels("fp8", target), 8192, 4096, 4096, called=1.0)
    for called, faster in ((1.0, False), (0.25, True), (0.0, True)):
        assert predict(recipes()["fp8"], replace(layer, called=called), rates_of(target)).pays is faster
    assert predict(recipes()["fp8"], replace(layer, m=16384), rates_of(target)).pays
    assert predict(recipes()["fp8"], layer, replace(rates_of(target), host=Host())).pays


def test_times_add_up_and_a_bare_number_is_one_launch():
    assert sum([Time(1.0, 2), Time(0.5)]) == Time(1.5, 3) and 2 * Time(1.0, 3) == Time(2.0, 6)
    assert 1.0 + Time(1.0) == Time(2.0)
    kernel = replace(registry.KERNELS[0], price=lambda rates, recipe, layer, role: 1e-6)
    layer = Layer(dict.fromkeys(ROLES, kernel), 64, 64, 64)
    assert layer.price(shipped.RATES["h200"], recipes()["fp8"], "fprop") == Time(1e-6, 1)


def test_a_margin_is_of_the_time_that_it_takes_now():
    assert Cost(0.95, 1.0).pays and not Cost(0.95, 1.0, margin=0.1).pays and Cost(0.85, 1.0, margin=0.1).pays


def test_whole_steps_that_were_measured():
    """A Llama 1B shape at 4 × 2048 tokens on an H200: with 91 µs of the host a launch, and twice as many, `quartet`
    costs time in every layer, as it did; at 17 it pays in all but k and v, and so does `fp8`."""
    target = Target.named("h200")
    sizes = {(2048, 2048, 3): True, (8192, 2048, 2): True, (2048, 8192, 1): True, (512, 2048, 3): False}
    for host, pays in ((Host(2 * 91e-6, 10e-6), dict.fromkeys(sizes, False)), (rates_of(target).host, sizes)):
        known = replace(rates_of(target), host=host)
        for (n, k, sharing), expected in pays.items():
            layer = Layer(kernels("quartet", target), 8192, n, k, sharing, summed=True)
            assert predict(recipes()["quartet"], layer, known).pays is expected, (host, n, k)
            if host.ours < 20e-6 and n > 512:
                layer = Layer(kernels("fp8", target), 8192, n, k, sharing, summed=True)
                assert predict(recipes()["fp8"], layer, known).pays, (n, k)


# the default on each GPU

def kernels(name, target):
    found = {}
    for role in ROLES:
        gemm = getattr(recipes()[name], role)
        rotation = gemm.rotation.n if gemm.rotation else 0
        found[role] = registry.choose(target, torch.bfloat16, tuple((spec, rotation) for spec in gemm.specs))[0]
    return found


LARGE = ((16384, 14336, 4096, 1, False), (16384, 4096, 14336, 1, False))  # of an 8B model
MEDIUM = ((8192, 2048, 2048, 3, False), (8192, 8192, 2048, 2, True), (8192, 2048, 8192, 1, False))  # of one of 1B
SMALL = ((2048, 1024, 1024, 1, False), (512, 2048, 2048, 1, False))
NEVER = tuple(gpu.name for gpu in gpus.GPUS if gpu.capability < (8, 9))
BLACKWELL = tuple(gpu.name for gpu in gpus.GPUS if gpu.capability >= (10, 0))


@pytest.mark.parametrize("name", gpus.NAMES)
def test_the_default_quantises_what_pays_and_nothing_else(name):
    pytest.importorskip("triton")
    target = Target.named(name)
    chosen, known = kernels("quartet", target), rates_of(target)

    def pays(m, n, k, sharing, again):
        cost = predict(recipes()["quartet"], Layer(chosen, m, n, k, sharing, again, summed=True), known)
        return cost is not None and cost.pays

    assert {kernel.name for kernel in chosen.values()} == {
        "triton" if name in NEVER else "cutlass" if name in BLACKWELL else "triton-fp8"}
    assert not any(pays(*layer) for layer in SMALL)
    assert all(pays(*layer) for layer in LARGE) is (name not in NEVER)
    if name in NEVER or name in ("l40s", "h100 pcie"):
        assert not any(pays(*layer) for layer in MEDIUM)
    if name in ("rtx 4090", "rtx 5090", "h20"):
        assert all(pays(*layer) for layer in MEDIUM)


def test_the_decision_is_the_same_every_time():
    for name in gpus.NAMES:
        assert rates_of(Target.named(name)) == rates_of(Target.named(name))
        assert repr(rates_of(Target.named(name))) == repr(rates_of(Target.named(name)))
