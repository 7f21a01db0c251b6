"""The calibration without a GPU: its fit finds the constants that made the times."""

import importlib
from pathlib import Path

import pytest

from quartet.lowering.rates import Rates

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


def features(m, n, k):
    return 2.0 * m * n * k, float(m * n), 1.0


def test_the_fit_finds_the_constants_and_the_rates_print_as_code(load):
    calibrate = load("calibrate")
    sizes = [(m, n, k) for m in (2048, 8192) for n in (1024, 4096) for k in (1024, 8192)]
    times = {"bf16": {s: 2 * s[0] * s[1] * s[2] / 8e14 + s[0] * s[1] * 1e-12 + 5e-6 for s in sizes},
             "fp8": {s: 2 * s[0] * s[1] * s[2] / 1.6e15 + 5e-6 for s in sizes}}
    gemm = calibrate.fit(times, features)
    line = calibrate.fit({"fold": {(r, 32): r * 32 * 4e-13 + 7e-6 for r in (8, 64, 512)}},
                         lambda rows, cols: (float(rows * cols), 1.0))
    assert all(data["worst"] < 1e-9 for data in (gemm | line).values())
    rates = calibrate.rates("a GPU", gemm, line, {})
    assert rates == Rates("a GPU", {"bf16": 8e14, "fp8": 1.6e15}, {"bf16": 1e-12, "fp8": 0.0}, {"fold": 4e-13}, 5e-6)
    assert eval(repr(rates)) == rates


def test_no_constant_is_negative(load):
    falling = {(m, 64, 64): 1e-5 / m for m in (1, 2, 4, 8)}
    found = load("calibrate").fit({"bf16": falling}, features)["bf16"]
    assert min(found["coefficients"]) >= 0 and found["worst"] > 0.1


@pytest.mark.parametrize("name", ["calibrate", "bench_fusion"])
def test_it_says_that_it_needs_a_gpu(load, name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load(name).main(["--device", "cpu", "--out", str(tmp_path / "out.json")])
    assert "this measures a GPU; --device is cpu" in capsys.readouterr().err and not list(tmp_path.iterdir())
