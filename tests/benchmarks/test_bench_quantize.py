"""The quantise benchmark without a GPU: it says that it needs one, and its arithmetic is right."""

import importlib
from pathlib import Path

import pytest
import torch

from quartet.recipes import recipes

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("bench_quantize")


def test_it_says_that_it_needs_a_gpu(bench, tmp_path, capsys):
    out = tmp_path / "quantize.json"
    with pytest.raises(SystemExit) as error:
        bench.main(["--device", "cpu", "--out", str(out)])
    assert error.value.code == 2 and not out.exists()
    assert "this times Triton kernels and needs a CUDA device; --device is cpu" in capsys.readouterr().err


@pytest.mark.parametrize("size", ("16384", "16384x", "4x33", "0x64"))
def test_a_size_that_is_none_is_refused(bench, size, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--sizes", size])
    assert f"size '{size}' is not ROWSxCOLUMNS with columns divisible by 32" in capsys.readouterr().err


def test_the_bytes_are_those_of_inputs_and_outputs(bench):
    kernel = bench.Kernel(0.5, lambda x: (x, x[:1]), lambda x, y: (x.byte(), y.new_empty(0)))
    run = bench.Run(kernel, [torch.zeros(4, 32), torch.ones(4, 32)])
    assert run.bytes() == 4 * 32 * 4 + 32 * 4 + 4 * 32
    run.reset(1)
    run.run(1)
    assert (run.outputs[0] == 1).all()
    assert bench.Run(bench.Kernel(None, lambda x: (x,), torch.clone), [torch.zeros(4, 32)]).bytes() == 2 * 4 * 32 * 4


def test_shares_and_slots(bench, capsys):
    columns = {"copy": {"goal": None, "bytes": 4_000_000, "ms": 1.0},
               "fold": {"goal": 0.85, "bytes": 3_000_000, "ms": 1.0},
               "both SR": {"goal": 0.75, "bytes": 3_000_000, "ms": 1.0}, "columns SR": {"failed": "no"}}
    bench.rates(columns, 1_000_000, 2e12)
    assert columns["fold"]["share"] == columns["both SR"]["share"] == pytest.approx(0.75)
    assert columns["fold"]["tb_s"] == pytest.approx(0.003) and columns["fold"]["slots"] == pytest.approx(2000)
    assert [bench.share(data) for data in columns.values()] == ["1.00", "<0.75", "0.75", "failed"]
    lines = bench.details(columns, 1_000_000).splitlines()
    assert lines[2].split() == ["fold", "3.00", "1000.0", "0.00", "<0.75", "0.85", "2000.0"] and len(lines) == 4
    bench.rates(columns, 1_000_000, None)
    assert columns["fold"]["slots"] is None


def test_the_forward_quantiser_is_that_of_the_default_recipe(bench, monkeypatch):
    ops = pytest.importorskip("quartet.kernels.triton.ops")
    forward, chains = recipes()["quartet"].fprop, {}
    for name in ("rows quest packed fold", "rows quest packed", "rows guarded packed fold"):
        monkeypatch.setattr(ops, "quantize", lambda x, chain, name=name, **which: chains.update({name: chain}))
        bench.kernels(torch.device("cpu"), 0)[name].call(torch.zeros(2, 64))
    guarded = chains.pop("rows guarded packed fold")
    assert {(str(c.spec), c.rotation) for c in chains.values()} == {(str(forward.a.spec), forward.rotation.n)}
    assert len(chains) == 2 and str(guarded.spec) == "e2m1/32 e8m0 quest(guarded,floor) nearest mask"


def test_fusion_is_measured_with_it_too(bench):
    fusion, forward = importlib.import_module("bench_fusion"), recipes()["quartet"].fprop
    assert (fusion.SPEC, fusion.ROTATION) == (forward.a.spec, forward.rotation.n)
