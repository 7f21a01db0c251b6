"""``quartet calibrate`` on a GPU: quick, near what is known of it, and without a trace in what a run draws."""

import time

import pytest
import torch

from quartet.lowering.rates import datasheet, kept, shipped
from quartet.lowering.rates.measure import measure
from quartet.runtime.devices import Target

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def measured():
    """Measured twice, since kernels are compiled at the first time: the rates, and the seconds of the second time."""
    device = torch.device("cuda", torch.cuda.current_device())
    measure(device, 0.1)
    before, begin = torch.cuda.get_rng_state(), time.perf_counter()
    rates = measure(device)
    assert torch.equal(before, torch.cuda.get_rng_state())
    return Target.of(device), rates, time.perf_counter() - begin


def test_it_takes_seconds(measured):
    assert measured[2] < 10


def test_the_rates_are_whole_and_can_be_kept(measured, monkeypatch, tmp_path):
    target, rates, _ = measured
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    kept.forget()
    kept.keep(rates)
    assert kept.here(target) == rates
    kept.forget()


def test_they_are_near_what_is_known(measured):
    """Products within a third of the tables; passes are not slower than twice, and may be as fast as kernels get."""
    target, rates, _ = measured
    if target.gpu is None:
        pytest.skip("nothing is known of this GPU")
    known = shipped.RATES.get(target.gpu.name) or datasheet.rates(target.gpu)
    for dtype in ("bf16", "fp8"):
        if dtype in rates.flops:
            assert rates.flops[dtype] == pytest.approx(known.flops[dtype], rel=1 / 3), dtype
    for name, seconds in rates.passes.items():
        assert seconds < 2 * known.passes[name], name
    assert rates.passes["copy"] == pytest.approx(known.passes["copy"], rel=0.25)
