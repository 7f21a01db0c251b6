"""Rates that were measured: what is kept of them and when it counts, and what is timed."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from quartet.cli.main import main
from quartet.kernels import build_cache
from quartet.lowering.rates import PASSES, constants, kept, measure, rates_of, shipped
from quartet.model import first_use
from quartet.options import OptionError
from quartet.runtime import gpus
from quartet.runtime.devices import Target

DEVICE = "NVIDIA A100-SXM4-80GB"
HERE = Target("cuda", "sm_80", name=DEVICE, gpu=gpus.named("a100"))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A cache folder of the test's own, and nothing remembered."""
    monkeypatch.setenv(build_cache.VARIABLE, str(tmp_path / "cache"))
    for name in (kept.VARIABLE, first_use.VARIABLE, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    kept.forget()
    yield tmp_path / "cache"
    kept.forget()


def measured(device=DEVICE, **flops):
    return replace(shipped.RATES["h200"], device=device, flops={"bf16": 1e14, "fp8": 3e14} | flops,
                   origin=constants.MEASURED)


def test_what_was_measured_comes_before_the_tables():
    assert rates_of(HERE).source == "the data sheet of a100"
    kept.keep(measured())
    assert rates_of(HERE).source == f"rates measured on {DEVICE}" and rates_of(HERE) == measured()
    assert rates_of(Target.named("a100")).source == "the data sheet of a100"  # what is only named is not here


# what is kept

def test_a_file_is_read_as_it_was_kept(folder):
    path = kept.keep(measured(bf16=5e14 / 3))
    assert path.parent == folder and folder.stat().st_mode & 0o077 == 0
    assert kept.here(HERE) == measured(bf16=5e14 / 3) and kept.listed() == [DEVICE]
    assert kept.here(replace(HERE, name="NVIDIA A100-SXM4-40GB")) is None


def test_a_file_from_before_calls_were_counted_is_read():
    known = replace(measured(), host=constants.HOST)
    two = {"ours": constants.HOST.ours, "plain": constants.HOST.plain}
    assert kept.read(kept.described(known) | {"host": two}) == known


def test_other_versions_do_not_find_it(monkeypatch):
    kept.keep(measured())
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    kept.forget()
    assert kept.here(HERE) is None and kept.listed() == [DEVICE]


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:40], lambda text: "[1]", lambda text: text.replace("1e+14", "-1.0").replace(
        "100000000000000.0", "-1.0"),
    lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "host"}),
    lambda text: json.dumps(json.loads(text) | {"launch": "soon"}),
    lambda text: json.dumps(json.loads(text) | {"passes": {"rows": 1e-12}}),
    lambda text: json.dumps(json.loads(text) | {"launch": float("nan")}),
    lambda text: json.dumps(json.loads(text) | {"launch": True}),
    lambda text: json.dumps(json.loads(text) | {"launch": "5.4e-6"}),
    lambda text: json.dumps(json.loads(text) | {"flops": {"bf16": "1e14", "fp8": 3e14}}),
    lambda text: json.dumps(json.loads(text) | {"flops": [["bf16", 1e14], ["fp8", 3e14]]}),
    lambda text: json.dumps(json.loads(text) | {"host": {}}),
    lambda text: json.dumps(json.loads(text) | {"host": {"ours": 1e-5}}),
    lambda text: "[" * 100_000 + "]" * 100_000,
])
def test_a_damaged_file_counts_as_none_and_says_so_once(damage, recwarn):
    path = kept.keep(measured())
    path.write_text(damage(path.read_text()))
    kept.forget()
    with pytest.warns(UserWarning, match="damaged .* measure anew with `quartet calibrate`"):
        assert rates_of(HERE).source == "the data sheet of a100"
    recwarn.clear()
    assert rates_of(HERE).source == "the data sheet of a100" and not recwarn.list
    assert len(kept.listed()) == 1


@pytest.mark.parametrize("content", [
    b"\xff\xfe{}", json.dumps(kept.described(measured()) | {"launch": 10**400}).encode()])
def test_bytes_that_are_no_text_and_numbers_that_are_no_rates_are_damage_too(content, monkeypatch, tmp_path):
    kept.keep(measured()).write_bytes(content)
    kept.forget()
    with pytest.warns(UserWarning, match="damaged .* measure anew with `quartet calibrate`"):
        assert rates_of(HERE).source == "the data sheet of a100"
    path = tmp_path / "rates.json"
    path.write_bytes(content)
    monkeypatch.setenv(kept.VARIABLE, str(path))
    with pytest.raises(kept.RatesError, match="holds no rates"):
        rates_of(HERE)


def test_a_folder_of_others_is_not_read(folder):
    kept.keep(measured())
    folder.chmod(0o777)
    kept.forget()
    with pytest.warns(UserWarning, match="cannot be read: .*chmod 700"):
        assert rates_of(HERE).source == "the data sheet of a100"


def test_nothing_is_made_by_looking(folder):
    assert kept.here(HERE) is None and not folder.exists()


def test_a_distributed_run_reads_what_all_its_processes_have(monkeypatch, tmp_path):
    kept.keep(measured())
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rates_of(HERE).source == "the data sheet of a100"
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(kept.described(measured(bf16=2e14))))
    monkeypatch.setenv(kept.VARIABLE, str(path))
    assert rates_of(HERE) == measured(bf16=2e14) and rates_of(Target.named("a100")) == measured(bf16=2e14)
    assert rates_of(Target.named("h200")) is shipped.RATES["h200"]  # another model of GPU
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rates_of(HERE) == measured(bf16=2e14)


def test_a_file_of_another_model_of_gpu_does_not_count_and_that_is_said_once(monkeypatch, tmp_path, recwarn):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(kept.described(measured("NVIDIA H200"))))
    monkeypatch.setenv(kept.VARIABLE, str(path))
    with pytest.warns(UserWarning, match=f"rates of NVIDIA H200, which do not count for {DEVICE}"):
        assert rates_of(HERE).source == "the data sheet of a100"
    recwarn.clear()
    assert rates_of(HERE).source == rates_of(Target.named("a100")).source and not recwarn.list


def test_a_file_that_is_named_and_holds_no_rates_is_an_error(monkeypatch, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        monkeypatch.setenv(kept.VARIABLE, str(path))
        with pytest.raises(kept.RatesError, match="environment variable QUARTET_RATES: .* holds no rates"):
            rates_of(HERE)


def test_a_home_in_the_variable_is_found_and_none_is_made_up(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rates.json").write_text(json.dumps(kept.described(measured(bf16=2e14))))
    monkeypatch.setenv(kept.VARIABLE, "~/rates.json")
    assert rates_of(HERE) == measured(bf16=2e14)
    monkeypatch.setenv(kept.VARIABLE, "~unknown/rates.json")
    with pytest.raises(kept.RatesError, match="environment variable QUARTET_RATES: ~unknown is nobody's home"):
        rates_of(HERE)


# measuring

def test_the_constants_follow_from_the_times():
    known, elements = shipped.RATES["h200"], measure.ROWS * measure.COLS
    target = Target("cuda", "sm_90", name="NVIDIA H200", gpu=gpus.named("h200"))
    passes = {name: elements * rate + known.launch for name, rate in known.passes.items()}
    for name, folds in measure.FOLDS.items():
        passes[name] += folds * passes["fold"]
    products = {(dtype, (m, n, k)): float(known.product(dtype, m, n, k).device)
                for m, n, k in measure.PRODUCTS for dtype in ("bf16", "fp8")}
    found = measure.rates_from(target, passes, products)
    assert found.flops == pytest.approx(known.flops, rel=0.005) and set(found.output) == {"bf16", "fp8"}
    assert found.passes == pytest.approx(known.passes, rel=0.01) and found.launch == known.launch
    assert kept.read(json.loads(json.dumps(kept.described(found)))) == found


def test_what_cannot_be_measured_follows_from_a_copy():
    known, elements = shipped.RATES["h200"], measure.ROWS * measure.COLS
    found = measure.rates_from(HERE, {"copy": 2 * elements * known.passes["copy"] + known.launch},
                               {("bf16", size): 1e-2 for size in measure.PRODUCTS})
    assert found.passes["rows"] == pytest.approx(2 * known.passes["rows"], rel=0.01)
    assert set(found.flops) == {"bf16"}


@pytest.mark.parametrize("copy, product, said", [
    (5.4e-6, 1e-2, "a pass 'copy' over 16384 × 8192 elements was measured to take 5.4 µs"),
    (0.0, 1e-2, "a pass 'copy' .* take 0 µs"), (float("inf"), 1e-2, "a pass 'copy' .* take inf µs"),
    (1e-4, 4e-6, "a product 8192 × 4096 × 4096 in bf16 was measured to take 4 µs, of which .* are its launch")])
def test_times_that_no_rate_follows_from_are_refused(copy, product, said):
    with pytest.raises(measure.MeasurementError, match=said):
        measure.rates_from(HERE, {"copy": copy}, {("bf16", size): product for size in measure.PRODUCTS})


def test_what_is_timed_runs(monkeypatch):
    """On a CPU, where the references of the same ops run."""
    monkeypatch.setattr(measure, "ROWS", 64)
    monkeypatch.setattr(measure, "COLS", 96)
    cpu, hopper = torch.device("cpu"), Target.named("h100")
    calls = dict(measure._passes(cpu, hopper))
    assert set(calls) == set(PASSES) and list(calls)[0] == "copy"
    assert set(dict(measure._passes(cpu, Target.named("a100")))) == {"copy", "amax", "unrotate"}
    for call in calls.values():
        call()
    assert set(dict(measure._products(cpu, hopper, 64, 32, 32))) == {"bf16", "fp8", "int8"}
    assert set(dict(measure._products(cpu, Target.named("a100"), 64, 32, 32))) == {"bf16", "int8"}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that measures as told."""
    monkeypatch.setattr("quartet.runtime.devices.absent", lambda device: None)
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: HERE))
    monkeypatch.setattr("quartet.cli.calibrate.measure", lambda device, seconds: measured())


def test_calibrate_keeps_what_it_measured_and_shows_it(gpu, capsys, folder):
    assert main(["calibrate"]) == 0
    out = capsys.readouterr().out
    assert "until now the data sheet of a100" in out and f"kept in {folder}" in out and "bf16 TFLOPS" in out
    assert "not those of distributed runs (torchrun)" in out and "--out FILE and set QUARTET_RATES=FILE" in out
    assert rates_of(HERE) == measured()
    assert main(["cache"]) == 0 and f"rates of {DEVICE}" in capsys.readouterr().out


def test_clearing_the_cache_keeps_what_was_measured_unless_it_is_named(capsys, folder):
    path = kept.keep(measured())
    built = folder / f"quartet_kernels-{'0' * 32}.so"
    built.write_bytes(b"built")
    assert main(["cache", "clear"]) == 0
    out = capsys.readouterr().out
    assert "removed 1 object" in out and f"kept the rates of {DEVICE}" in out and "clear --rates" in out
    assert path.exists() and not built.exists()
    assert main(["cache", "clear", "--rates"]) == 0
    assert f"removed the rates of {DEVICE}" in capsys.readouterr().out and not list(folder.iterdir())
    assert main(["cache", "list", "--rates"]) == 2


def test_calibrate_writes_a_file_for_many_machines(gpu, capsys, tmp_path):
    assert main(["calibrate", "--out", str(tmp_path / "a100.json")]) == 0
    assert "QUARTET_RATES=" in capsys.readouterr().out
    assert kept.read(json.loads((tmp_path / "a100.json").read_text())) == measured() and kept.here(HERE) is None


def test_calibrate_says_that_it_cannot_keep_anything_before_it_measures(gpu, capsys, folder, monkeypatch):
    monkeypatch.setattr("quartet.cli.calibrate.measure", lambda *args: sys.exit("measured"))
    folder.mkdir()
    folder.chmod(0o777)
    assert main(["calibrate"]) == 1
    assert "chmod 700" in capsys.readouterr().err


def test_calibrate_keeps_nothing_of_a_measurement_that_tells_nothing(gpu, capsys, monkeypatch):
    def fails(*args):
        raise measure.MeasurementError("a copy took no time")

    monkeypatch.setattr("quartet.cli.calibrate.measure", fails)
    assert main(["calibrate"]) == 1 and capsys.readouterr().err == "quartet: a copy took no time\n"
    assert kept.listed() == []


@pytest.mark.parametrize("argv, said", [
    ([], "cannot measure this device: it measures an NVIDIA GPU, but no CUDA device is here"),
    (["--seconds", "0"], "use more than 0"), (["--device", "-1"], "use 0 or more")])
def test_calibrate_needs_a_gpu(argv, said, capsys):
    if argv or not torch.cuda.is_available():
        assert main(["calibrate", *argv]) == 2
        assert said in capsys.readouterr().err


# measuring at the first use

@pytest.fixture
def asked(monkeypatch):
    """How often a GPU was measured, where the environment asks for it."""
    found = []
    monkeypatch.setenv(first_use.VARIABLE, "1")
    monkeypatch.setattr(first_use, "_failed", set())
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: HERE))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(measure, "measure", lambda device: found.append(device) or measured())
    return found


CUDA = torch.device("cuda", 0)


def test_the_first_compilation_measures_and_the_next_does_not(asked):
    for _ in range(2):
        first_use.calibrate_once(CUDA)
        assert rates_of(HERE) == measured() and len(asked) == 1


def test_a_damaged_file_is_measured_anew(asked):
    kept.keep(measured()).write_text("{")
    kept.forget()
    with pytest.warns(UserWarning, match="damaged"):
        first_use.calibrate_once(CUDA)
    assert rates_of(HERE) == measured() and len(asked) == 1


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: launch failed"), torch.OutOfMemoryError("no room"),
                                   measure.MeasurementError("a copy took no time"), TypeError("no such kernel")])
def test_a_measurement_that_fails_ends_nothing_and_is_not_tried_again(asked, error, monkeypatch, caplog):
    def fails(device):
        asked.append(device)
        raise error

    monkeypatch.setattr(measure, "measure", fails)
    with caplog.at_level("WARNING", "quartet"):
        for _ in range(2):
            first_use.calibrate_once(CUDA)
    assert len(asked) == 1 and rates_of(HERE).source == "the data sheet of a100"
    (record,) = caplog.records
    assert f"were not measured, and its tables decide: {type(error).__name__}: {error}" in record.getMessage()


@pytest.mark.parametrize("name, value", [(first_use.VARIABLE, "0"), ("WORLD_SIZE", "2")])
def test_it_does_not_unless_it_is_asked_and_alone(asked, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    first_use.calibrate_once(CUDA)
    first_use.calibrate_once(torch.device("cpu"))
    assert not asked


@pytest.mark.parametrize("value", ["true", "yes", "2", " 1"])
def test_what_the_environment_cannot_mean_is_refused(asked, monkeypatch, value):
    monkeypatch.setenv(first_use.VARIABLE, value)
    with pytest.raises(OptionError, match=f"QUARTET_CALIBRATE is '{value}'; possible: 1, or 0"):
        first_use.calibrate_once(torch.device("cpu"))
    assert not asked


@pytest.mark.parametrize("unfit", [Target("cuda", "sm_75", name="Tesla T4"), Target("cuda", "gfx942")])
def test_what_calibrate_refuses_is_not_measured_at_the_first_use(asked, monkeypatch, unfit, capsys):
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: unfit))
    first_use.calibrate_once(CUDA)
    assert not asked and main(["calibrate"]) == 2
    assert kept.unfit(unfit) in capsys.readouterr().err


def test_it_does_not_while_a_graph_is_recorded(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first_use.calibrate_once(CUDA)
    assert not asked


def test_what_cannot_be_kept_is_not_measured(asked, folder, caplog):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="chmod 700"), caplog.at_level("WARNING", "quartet"):
        first_use.calibrate_once(CUDA)
    assert not asked and "were not measured, and its tables decide" in caplog.text
