"""The GPU benchmarks in miniature on a CPU: they measure, report, survive a column that fails, and continue a file.

Peers are compiled with ``aot_eager``; our backend makes its graphs and runs them without generated code.
"""

import importlib
import io
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from uncompiled import uncompiled

from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.lowering.recipe.types import Rotation
from quartet.recipes import recipes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
ROOT = Path(__file__).resolve().parents[2]
MISSING = "no-such-recipe"
TINY_GAP = ("--device", "cpu", "--compiler", "aot_eager", "--size", "tiny", "--steps", "3", "--batch", "2", "--seq",
            "32", "--train-bytes", "4096", "--validation-bytes", "200")


@pytest.fixture(scope="module")
def scripts():
    """The benchmark modules, with the graphs of our backend run as they are."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("examples", "benchmarks"):
            patch.syspath_prepend(ROOT / folder)
        loaded = {name: importlib.import_module(name)
                  for name in ("gpu_common", "gpu_worker", "bench_linear", "bench_train", "bench_hf", "train_gap",
                               "plot")}
        patch.setattr(loaded["gpu_common"], "our_backend", lambda: uncompiled)
        yield types.SimpleNamespace(**loaded)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def linear(scripts, tmp_path_factory):
    """The record of a linear layer and an MLP in columns of which one fails."""
    out = tmp_path_factory.mktemp("linear") / "linear.json"
    command = ["--device", "cpu", "--compiler", "aot_eager", "--repeat", "2", "--out", str(out), "--columns",
               f"bf16,torchao,{MISSING},quartet", "--shapes", "64x64x96,mlp-64x64x96"]
    scripts.bench_linear.main(command)
    return command, out


def test_linear_measures_every_column_and_says_which_failed(linear):
    record = read(linear[1])
    assert set(record["results"]) == {"64x64x96", "mlp-64x64x96"}
    assert record["settings"]["torch"] == torch.__version__
    for result in record["results"].values():
        columns = result["columns"]
        assert f"unknown policy {MISSING!r}" in columns[MISSING]["failed"]
        for name in ("bf16", "torchao", "quartet"):
            assert len(columns[name]["all_ms"]) == 2
            assert min(columns[name]["all_ms"]) <= columns[name]["ms"] <= max(columns[name]["all_ms"])
            assert result["ratios"][name] == pytest.approx(columns["bf16"]["ms"] / columns[name]["ms"])
        assert set(columns["bf16"]["error"].values()) == {0.0}
        assert all(0.01 < e < 0.2 for e in columns["torchao"]["error"].values())
        assert all(0.1 < e < 0.8 for e in columns["quartet"]["error"].values())
    assert record["results"]["64x64x96"]["flops"] == 6 * 64 * 64 * 96
    assert record["results"]["mlp-64x64x96"]["flops"] == 18 * 64 * 64 * 96


def test_linear_continues_its_file_and_refuses_another_one(linear, scripts, capsys):
    command, out = linear
    before = read(out)
    scripts.bench_linear.main([*command, "--columns", "bf16,torchao", "--time-limit", "0"])
    assert "time limit" not in capsys.readouterr().out  # nothing was left to do
    scripts.bench_linear.main([*command, "--time-limit", "0"])
    assert "time limit" in capsys.readouterr().out  # the failed column is tried again
    assert read(out)["results"] == before["results"]
    with pytest.raises(ValueError, match=r"repeat 2 there, 3 here; name another --out, or give --fresh"):
        scripts.bench_linear.main([*command, "--repeat", "3"])


def test_the_geometric_mean_is_of_the_first_eight(linear, scripts, capsys):
    results = {name: {"columns": {}, "ratios": {"bf16": 1.0, "quartet": ratio}}
               for name, ratio in zip(scripts.bench_linear.FIRST8, (1.0, 4.0) * 4, strict=True)}
    saved = {}
    record = types.SimpleNamespace(results=results | {"2048x1024x1024": {"columns": {}, "ratios": {"quartet": 9.0}}},
                                   save=saved.update)
    scripts.bench_linear.report(record, ["bf16", "quartet"])
    assert saved["geometric_mean"] == {"over": 8, "ratios": {"bf16": 1.0, "quartet": pytest.approx(2.0)}}
    assert "2.000" in capsys.readouterr().out.splitlines()[-1]


def test_the_profile_names_what_takes_the_time(scripts, tmp_path, capsys):
    out = tmp_path / "linear.json"
    scripts.bench_linear.main(["--device", "cpu", "--compiler", "aot_eager", "--profile", "bf16", "--shapes",
                               "64x64x96", "--out", str(out)])
    rows = read(tmp_path / "linear-bf16-64x64x96.json")
    products = next(row for row in rows if row["kernel"] == "aten::mm")
    assert products["launches"] == 3 and 0 < products["share"] < 1
    assert "aten::mm" in capsys.readouterr().out


def test_a_shape_that_is_none_is_refused(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts.bench_linear.main(["--shapes", "64x64"])
    assert "'64x64' is neither a group (first8, " in capsys.readouterr().err


def test_the_plot_is_an_svg_of_the_measured_columns(linear, scripts, tmp_path):
    picture = tmp_path / "speed.svg"
    assert scripts.plot.draw(read(linear[1]), picture) == ["torchao", "quartet"]
    assert "<svg" in picture.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no ratio to draw"):
        scripts.plot.draw({"results": {}}, picture)


def test_a_worker_trains_and_answers(scripts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("measure\nmeasure\n"))
    scripts.bench_train.main(["--worker", "quartet", "--shapes", "tiny", "--steps", "2", "--device", "cpu"])
    ready, first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["compile_s"] > 0
    assert ready["launches"] > 20 and ready["host_ms"] > 0
    assert len(first["all_ms"]) == 2 and len(second["losses"]) - len(first["losses"]) == 3
    assert second["finite"] and second["losses"][0] > 5 and second["peak_gib"] is None


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-vit"])
def test_an_unmodified_hugging_face_model_trains(shape, scripts, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "stdin", io.StringIO("measure\n"))
    scripts.bench_hf.main(["--worker", "quartet", "--shapes", shape, "--steps", "1", "--device", "cpu"])
    ready, answer = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["compile_s"] > 0 and answer["finite"]
    assert answer["losses"][0] == pytest.approx(math.log(128 if shape == "tiny-llama" else 10), rel=0.2)


def test_train_compares_processes_and_says_which_failed(scripts, tmp_path, capsys):
    out = tmp_path / "train.json"
    scripts.bench_train.main(["--device", "cpu", "--compiler", "aot_eager", "--shapes", "tiny", "--steps", "1",
                              "--rounds", "1", "--together", "2", "--columns", f"bf16,{MISSING}", "--out", str(out)])
    columns = read(out)["results"]["tiny"]
    assert f"PolicyError: unknown policy {MISSING!r}" in columns[MISSING]["failed"]
    assert columns["bf16"]["ms"] > 0 and columns["bf16"]["compile_s"] > 0 and columns["bf16"]["compiled_together"] == 2
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("bf16 "))
    assert row[2] == "1.000" and float(row[3]) > 0 and row[5] == "1.00"


def test_a_worker_that_hangs_or_dies_says_so(scripts):
    silent = scripts.gpu_worker.Worker([sys.executable, "-c", "input()"], {}, patience=0.2)
    with pytest.raises(scripts.gpu_worker.WorkerError, match="no answer in 0 s"):
        silent.answer()
    silent.end()
    assert silent.process.returncode is not None
    dead = scripts.gpu_worker.Worker([sys.executable, "-c", "print('noise'); raise KeyError('gone')"], {}, patience=30)
    with pytest.raises(scripts.gpu_worker.WorkerError, match="ended with status 1; KeyError: 'gone'"):
        dead.answer()
    dead.end()


@pytest.fixture(scope="module")
def gap(scripts, tmp_path_factory):
    """The record of four short trainings of which one fails."""
    out = tmp_path_factory.mktemp("gap") / "gap.json"
    command = [*TINY_GAP, "--out", str(out), "--policies", f"bf16,quartet,even-signed-sr,{MISSING}"]
    scripts.train_gap.main(command)
    return command, out


def test_gap_trains_each_policy_alike_and_continues(gap, scripts, capsys):
    command, out = gap
    record = read(out)
    results = record["results"]
    assert "unknown policy" in results[f"{MISSING}/0"]["failed"]
    losses = {name: results[f"{name}/0"]["validation_loss"] for name in ("bf16", "quartet", "even-signed-sr")}
    assert losses["quartet"] == losses["even-signed-sr"] != losses["bf16"]
    assert record["gaps"]["quartet"] == pytest.approx(losses["quartet"] - losses["bf16"])
    assert all(5 < loss < 6 for loss in losses.values())
    assert results["bf16/0"]["validation_tokens"] == 192  # three batches of 2 × 32
    scripts.train_gap.main([*command, "--time-limit", "0", "--seeds", "0,1"])
    assert read(out)["results"] == results
    assert f"{losses['quartet']:.4f}" in capsys.readouterr().out


def test_gap_in_a_process_of_its_own_is_the_same(gap, scripts, tmp_path):
    out = tmp_path / "gap.json"
    scripts.train_gap.main([*TINY_GAP, "--out", str(out), "--jobs", "2", "--policies", "bf16"])
    here, there = (read(path)["results"]["bf16/0"] for path in (gap[1], out))
    assert here["train_loss"] == there["train_loss"]
    assert here["validation_loss"] == there["validation_loss"]


@pytest.mark.parametrize(("name", "forward", "backward"), [
    ("floor-guarded-nearest", "e2m1/32 e8m0 quest(guarded,floor) nearest mask", "e2m1/32 e8m0 headroom nearest"),
    ("nearest-rms-sr", "e2m1/32 e8m0 quest(rms,nearest) nearest mask", "e2m1/32 e8m0 headroom stochastic"),
    ("ceil-sr", "e2m1/32 e8m0 ceil nearest", "e2m1/32 e8m0 headroom stochastic"),
    ("even-sr", "e2m1/32 e8m0 even nearest", "e2m1/32 e8m0 headroom stochastic"),
    ("floor-centred-bf16", "e2m1/32 e8m0 quest(centred,floor) nearest mask", None),
])
def test_variants_are_what_their_names_say(scripts, name, forward, backward):
    recipe = scripts.train_gap.variant(name)
    assert {str(recipe.fprop.a.spec), str(recipe.fprop.b.spec)} == {forward}
    assert recipe.fprop.rotation == Rotation(32)
    for gemm in (recipe.dgrad, recipe.wgrad):
        assert (gemm and {str(gemm.a.spec), str(gemm.b.spec)}) == (backward and {backward})


def test_a_signed_variant_has_signs_in_forward_only(scripts):
    signed, plain = (scripts.train_gap.variant(f"even{infix}-sr") for infix in ("-signed", ""))
    assert signed.fprop == replace(plain.fprop, rotation=Rotation(32, FLAT_SIGNS))
    assert (signed.dgrad, signed.wgrad) == (plain.dgrad, plain.wgrad)
    assert signed == replace(recipes()["quartet"], name=signed.name, summary=signed.summary)


def test_the_default_policies_exist(scripts):
    for name in scripts.train_gap.POLICIES:
        assert scripts.train_gap.variant(name) or name in recipes() or name in scripts.gpu_common.OURS


def test_validation_covers_the_text_once(scripts):
    data = torch.arange(200, dtype=torch.uint8)
    batches = list(scripts.train_gap.windows(data, 2, 32))
    assert torch.equal(torch.cat([tokens.flatten() for tokens, _ in batches]), torch.arange(192))
    assert torch.equal(torch.cat([targets.flatten() for _, targets in batches]), torch.arange(1, 193))
    with pytest.raises(ValueError, match="use --validation-bytes 401 or more"):
        list(scripts.train_gap.windows(data, 4, 100))


def test_cases_take_turns(scripts):
    calls = []

    class Case:
        def __init__(self, name):
            self.name = name

        def reset(self, i):
            calls.append((self.name, i, "reset"))

        def run(self, i):
            calls.append((self.name, i, "run"))

    times = scripts.gpu_common.Clock(torch.device("cpu")).interleaved({n: Case(n) for n in "ab"}, 2, warm_up=1)
    assert [call[:2] for call in calls[::2]] == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [call[2] for call in calls] == ["reset", "run"] * 6
    assert all(len(t) == 2 and t[0].device > 0 for t in times.values())

    calls.clear()
    times = scripts.gpu_common.Clock(torch.device("cpu")).interleaved({"a": Case("a")}, 2, warm_up=1, loop=True)
    assert [call[1] for call in calls[2::2]] == [*range(10), *range(1, 11)] and len(times["a"]) == 2
