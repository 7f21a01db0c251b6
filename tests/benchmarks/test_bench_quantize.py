"""The quantise benchmark without a GPU: it says that it needs one, and its arithmetic is right."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
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
    ops = pytest.importorskip("quartet.kernels.triton.quantize.ops")
    forward, chains = recipes()["quartet"].fprop, {}
    for name in ("rows packed fold", "rows packed", "rows quest packed fold"):
        monkeypatch.setattr(ops, "quantize", lambda x, chain, name=name, **which: chains.update({name: chain}))
        bench.kernels(torch.device("cpu"), 0)[name].call(torch.zeros(2, 64))
    quest = chains.pop("rows quest packed fold")
    assert (str(quest.spec), quest.signs) == ("e2m1/32 e8m0 quest(rms,nearest) nearest mask", None)
    for chain in chains.values():
        assert (chain.spec, chain.rotation) == (forward.a.spec, forward.rotation.n)
        assert tuple(chain.signs.tolist()) == forward.rotation.signs


def test_fusion_is_measured_with_it_too(bench):
    fusion, forward = importlib.import_module("bench_fusion"), recipes()["quartet"].fprop
    assert (fusion.DEFAULT, fusion.ROTATION) == (forward.a.spec, forward.rotation)


def test_fusion_says_that_it_needs_a_gpu(bench, tmp_path, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("bench_fusion").main(["--device", "cpu", "--out", str(tmp_path / "out.json")])
    assert "this measures a GPU; --device is cpu" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_inductor_rows_are_the_quantisers_that_they_name(bench, monkeypatch):
    pytest.importorskip("quartet.kernels.triton.quantize.ops")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    every = bench.kernels(torch.device("cpu"), 0)
    generated = {f"Inductor {name}": values for name, values in bench.BYTES.items()}
    assert list(every)[-len(generated):] == list(generated) and not any("," in name for name in every)
    assert {f"{name} by triton" for name in (*bench.BYTES, *bench.BYTES_BOTH)} <= set(every)
    shares = {}
    for name, (text, transposed, goal) in generated.items():
        run = bench.Run(every[name], [x])
        shares[name] = run.bytes() / x.numel()
        codes, scales, _ = reference.quantize(x.t() if transposed else x, QuantSpec.parse(text))
        same = (torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
                for a, b in zip(run.outputs, (codes, scales), strict=True))
        assert all(same), name
        assert transposed == name.endswith("columns")
        assert every[name].goal == every[name.removeprefix("Inductor ") + " by triton"].goal == goal
    assert shares["Inductor mxfp8 rows"] == shares["Inductor mxfp8 columns"] == 2 + 1 + 1 / 32
    assert shares["Inductor fp8 1x128 rows"] == 2 + 1 + 4 / 128
    assert shares["Inductor fp8 128x128 tiles"] == 2 + 1 + 4 / 128**2
    assert shares["Inductor int8 rows"] == 2 + 1 + 4 / 384


def test_inductor_makes_code_of_them(bench):
    """Of the transpose in blocks, whose way through Inductor is the longest."""
    text, transposed, _ = bench.BYTES["mxfp8 columns"]
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    with fresh_cache():
        (codes, scales), (source,) = run_and_get_code(bench.by_inductor(text, transposed), x)
    expected = reference.quantize(x.t(), QuantSpec.parse(text))
    assert torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scales, expected[1])
    assert not re.search(r"^[^#\n]*torch\.ops\.quartet", source, re.MULTILINE)
