"""The ``quartet`` command: output, exit status, and errors that name the nearest legal value."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cutlass_tools import fake_toolchain

import quartet.explain  # noqa: F401  the fixture replaces its function
from quartet.cli import usage
from quartet.cli.describe import describe_recipe
from quartet.cli.main import main
from quartet.cli.parser import COMMANDS
from quartet.kernels.cutlass import toolchain
from quartet.lowering import registry
from quartet.lowering.rates import rates_of
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.recipe.types import Rotation
from quartet.recipes import built_in, recipes
from quartet.report.table import Report
from quartet.runtime.devices import Target

EXAMPLE = '''
import torch

import quartet.explain  # noqa: F401  the fixture replaces its function

class Double(torch.nn.Module):
    def forward(self, x, scale=2):
        return x * scale

SIZE = 3

def make():
    return Double(), (torch.ones(SIZE),)

def named():
    return Double(), {"x": torch.ones(SIZE), "scale": 4}

def wrong():
    return Double()

def listed():
    return Double(), [torch.ones(SIZE)]

def sized(size):
    return Double(), (torch.ones(size),)

class Sized:
    def __init__(self, size):
        pass
'''


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A folder with ``an_example_model.py`` as the working directory."""
    (tmp_path / "an_example_model.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("an_example_model", None)


@pytest.fixture
def explained(monkeypatch):
    """Replaces the compilation by a recorder; returns the calls it saw."""
    calls = []

    def explain(model, *args, options=None, **kwargs):
        calls.append((model(*args, **kwargs), options))
        return Report([MatmulRecord(0, "lm_head", "lm_head", "fprop", 1, 2, 3, "float32", reason="skipped")],
                      graphs=options.get("dump"))

    monkeypatch.setattr(sys.modules["quartet.explain"], "explain", explain)
    return calls


def fails(capsys, *argv: str) -> str:
    """The message of a command that has to exit with 2."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("quartet: ")
    return captured.err


def test_recipes_lists_each_with_its_paper(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for recipe in recipes().values():
        assert recipe.name in out and recipe.summary in out and recipe.paper in out


def test_recipe_in_full_names_every_operand(capsys):
    assert main(["recipes", "quartet"]) == 0
    out = capsys.readouterr().out
    recipe = recipes()["quartet"]
    assert all(equation in out for equation in ("Y = X · Wᵀ", "gX = E · W", "gW = Eᵀ · X"))
    assert out.count(str(recipe.fprop.a.spec)) == 2
    assert out.count(str(recipe.dgrad.a.spec)) == 4
    assert out.count("from the saved codes of fprop") == 2
    assert "H32 with fixed signs -++-++++++-" in out and out.count("H32 with fresh random signs") == 2


def test_recipe_that_leaves_roles_alone_says_so():
    forward_only = recipes()["quartet"].only({"fprop"})
    fixed = replace(forward_only, recompute="gemm", keep_weights=False,
                    fprop=replace(forward_only.fprop, rotation=Rotation(16, (1, -1) * 8)))
    text = describe_recipe(fixed)
    assert text.count("in the model's dtype") == 2
    assert "H16 with fixed signs +-+-+-+-+-+-+-+-" in text
    assert "quantised again in backward" in text and "computed again in backward" in text


def test_unknown_recipe_names_the_nearest(capsys):
    assert "did you mean 'quartet-paper'?" in fails(capsys, "recipes", "quartet-papr")


def test_unknown_command_names_the_nearest(capsys):
    assert "did you mean 'doctor'?" in fails(capsys, "docter")


def test_unknown_option_names_the_nearest(capsys):
    assert "did you mean '--policy'?" in fails(capsys, "explain", "a:b", "--polici=fp8")


def test_no_command_shows_the_usage(capsys):
    assert "usage: quartet" in fails(capsys)


def test_explain_prints_and_writes(example, explained, capsys):
    argv = ["explain", "an_example_model:make", "--policy", "quartet", "--html", "a.html", "--json", "a.json",
            "--dump", "graphs"]
    assert main(argv) == 0
    assert "lm_head" in capsys.readouterr().out
    assert "lm_head" in (example / "a.html").read_text()
    assert json.loads((example / "a.json").read_text())["matmuls"][0]["reason"] == "skipped"
    (result, options), = explained
    assert torch.equal(result, torch.full((3,), 2.0)) and options == {"policy": "quartet", "dump": "graphs"}


def test_explain_passes_a_dict_as_keywords(example, explained):
    assert main(["explain", "an_example_model:named"]) == 0
    assert torch.equal(explained[0][0], torch.full((3,), 4.0)) and explained[0][1] == {}


@pytest.mark.parametrize("target, message", [
    ("an_example_model", "is not MODULE:FACTORY"),
    ("an_exmple_model:make", "did you mean 'an_example_model'?"),
    ("an_example_model:mak", "did you mean 'make'?"),
    ("an_example_model:SIZE", "'SIZE' is not a function but int"),
    ("an_example_model:wrong", "returned Double; expected (model, inputs)"),
    ("an_example_model:listed", "returned (Double, list); expected (model, inputs) with inputs a tuple or a dict"),
    ("..:x", "'..' is not a module's name: write it from"),
    (".an_example_model:make", "is not a module's name"),
    ("an_example_model..:make", "is not a module's name"),
    ("an_example_model:sized", "takes (size) and is called without arguments: missing a required argument: 'size'; "
                               "give them defaults, or name a function that needs none"),
    ("an_example_model:Sized", "takes (size) and is called without arguments"),
])
def test_explain_refuses_a_wrong_target(example, explained, capsys, target, message):
    assert message in fails(capsys, "explain", target)
    assert explained == []


def test_explain_refuses_an_unknown_policy_before_it_builds_the_model(example, explained, capsys):
    assert "quartet-paper" in fails(capsys, "explain", "an_example_model:make", "--policy", "quartet-papr")
    assert "an_example_model" not in sys.modules


def test_explain_refuses_rates_that_are_none_before_it_compiles(example, explained, capsys, monkeypatch):
    monkeypatch.setenv("QUARTET_RATES", "none.json")
    assert "QUARTET_RATES: none.json holds no rates" in fails(capsys, "explain", "an_example_model:make")
    assert explained == []


def test_explain_refuses_a_missing_folder_before_it_compiles(example, explained, capsys):
    assert "does not exist; make it first" in fails(capsys, "explain", "an_example_model:make", "--html", "no/a.html")
    assert explained == []


@pytest.mark.parametrize("option", ("--html", "--json"))
def test_explain_refuses_what_it_cannot_write_before_it_compiles(example, explained, capsys, monkeypatch, option):
    assert "it is a folder; name a file in it" in fails(capsys, "explain", "an_example_model:make", option, ".")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "you may not write there" in fails(capsys, "explain", "an_example_model:make", option, "a.html")
    assert explained == []


@pytest.mark.parametrize("option", ["--html", "--json", "--dump", "--policy"])
def test_a_home_that_the_shell_left_is_found(example, explained, capsys, monkeypatch, tmp_path, option):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, "explain", "an_example_model:make", option, "~unknown/a.toml")
    assert "~unknown is nobody's home folder here; write the path from / on" in message
    (tmp_path / "a.toml").write_text('default = "fp8"')
    assert main(["explain", "an_example_model:make", option, "~/a.toml" if option != "--dump" else "~/a"]) == 0
    assert not list(tmp_path.glob("~*"))


def test_a_full_disk_costs_the_page_and_not_the_table(example, explained, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quartet.kernels.files.write_text", full)
    assert main(["explain", "an_example_model:make", "--html", "a.html"]) == 2
    said = capsys.readouterr()
    assert "lm_head" in said.out and said.err == "quartet: cannot write a.html: No space left on device\n"


@pytest.mark.parametrize("code, frame, error, sentence", [
    ("import a_package_that_is_not_there\n", "line 1, in <module>", "No module named 'a_package_that_is_not_there'",
     "importing 'an_example_broken' raised ModuleNotFoundError"),
    ("def make(:\n", "line 1", "SyntaxError", "importing 'an_example_broken' raised SyntaxError"),
    ("def make():\n    return inner()\ndef inner():\n    raise ValueError('no such size')\n",
     "line 4, in inner", "ValueError: no such size", "an_example_broken:make raised ValueError"),
    ("import torch\nclass Wrong(torch.nn.Module):\n    def forward(self, x):\n        return x @ x\n"
     "def make():\n    return Wrong(), (torch.ones(2, 3),)\n", "line 4, in forward", "RuntimeError: mat1 and mat2",
     "the model of an_example_broken:make, run by itself with these inputs, raised RuntimeError"),
], ids=["import", "syntax", "factory", "model"])
def test_what_the_users_code_raises_is_shown_with_their_frames_alone(example, explained, capsys, code, frame, error,
                                                                     sentence):
    (example / "an_example_broken.py").write_text(code)
    sys.modules.pop("an_example_broken", None)
    assert main(["explain", "an_example_broken:make"]) == 1
    said = capsys.readouterr().err
    assert "an_example_broken.py" in said and frame in said and error in said
    assert said.endswith(f"quartet: {sentence}\n") and os.path.join("quartet", "") not in said


def test_a_dump_that_cannot_be_written_is_refused_before_the_work_or_ends_in_status_2(example, capsys, monkeypatch):
    (example / "an_example_model.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(64, 64), (torch.ones(64, 64),)\n")
    with monkeypatch.context() as patch:
        patch.setattr(usage.tempfile, "TemporaryFile", lambda dir: os.open(f"{dir}/none/such", os.O_RDONLY))
        assert "no file can be made in" in fails(capsys, "explain", "an_example_model:make", "--dump", "graphs")
    assert "an_example_model" not in sys.modules

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quartet.report.dump.write_text", full)
    with pytest.warns(UserWarning, match="could not dump"):
        assert main(["explain", "an_example_model:make", "--dump", "graphs"]) == 2
    assert "note      the dump in graphs is not whole: OSError: [Errno 28] No space left" in capsys.readouterr().out


def test_doctor_shows_versions_compilers_and_kernels(monkeypatch, capsys):
    monkeypatch.setattr(registry, "probe", lambda device: [
        ("mxfp4", "first", None), ("mxfp4", "second", "needs sm_100"), ("mxfp8", "first", "block 16 only")])
    assert main(["doctor", "-v"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "g++" in out and "nvcc" in out and "cpu (" in out
    assert "no: needs sm_100" in out and "no: block 16 only" in out
    assert out.count("mxfp4") == out.count("mxfp8") >= 1
    assert main(["doctor"]) == 0
    brief = capsys.readouterr().out
    assert len(brief) < len(out) and "needs sm_100" not in brief and brief.rstrip().endswith(".")
    assert brief.splitlines()[-1] == out.splitlines()[-1]


@pytest.mark.parametrize("probe, message", [
    (lambda device: [("mxfp4", "only", "not here")], "none: only: not here"),
    (lambda device: 1 // 0, "probing failed: ZeroDivisionError"),
])
def test_doctor_reports_a_device_without_kernels_by_its_status(monkeypatch, capsys, probe, message):
    monkeypatch.setattr(registry, "probe", probe)
    assert main(["doctor"]) == 1
    assert message in capsys.readouterr().out


def test_doctor_names_the_command_that_gets_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain.os, "access", lambda path, mode: False)
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "probe", lambda device: [("mxfp4", "only", None)])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for command in ("apt-get install g++", "apt-get install cuda-nvcc-13-0", "pip install nvidia-cutlass"):
        assert command in out


def test_doctor_finds_the_compiler_that_builds(tmp_path, monkeypatch, capsys):
    fake_toolchain(tmp_path, monkeypatch, nvcc="13.7.12", cutlass=(4, 9, 1))
    monkeypatch.setattr(registry, "probe", lambda device: [("mxfp4", "only", None)])
    main(["doctor"])
    out = capsys.readouterr().out
    assert f"13.7.12  {tmp_path}/cuda/bin/nvcc" in out and f"4.9.1  {tmp_path}/cutlass/include" in out


def test_doctor_marks_what_a_format_gets(monkeypatch, capsys):
    monkeypatch.setattr(registry, "probe", lambda device: [
        ("mxfp4", "first", "no nvcc"), ("mxfp4", "second", None), ("mxfp4", "third", None), ("int8", "first", None)])
    main(["doctor", "-v"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-2:] for row in rows if {"first", "second", "third"} & set(row)][:4] == [
        ["no", "nvcc"], ["yes,", "chosen"], ["third", "yes"], ["yes,", "chosen"]]


@pytest.mark.parametrize("target, kernel", [("sm_100a", "cutlass"), ("sm_120a", "cutlass"), ("sm_90", "triton-fp8"),
                                            ("rtx 3090", "triton"), ("h100", "triton-fp8")])
def test_doctor_shows_the_order_of_a_pretended_gpu(capsys, target, kernel):
    pytest.importorskip("triton")
    assert main(["doctor", "-v", "--target", target]) == 0
    out = capsys.readouterr().out
    order = out[out.index("\n  mx e2m1 ") + 1:].splitlines()
    chosen, = (line for line in order[:len(registry.KERNELS)] if "yes, chosen" in line)
    assert kernel in chosen.split() and f"{Target.named(target)} (pretended" in out and "cpu (" not in out
    assert f"decided by {rates_of(Target.named(target)).source}" in out
    assert out.count("yes, chosen") >= 4


@pytest.mark.parametrize("argv", (["doctor"], ["explain", "an_example_model:make"]))
def test_a_target_that_does_not_exist(example, explained, capsys, argv):
    assert "there is no target 'b201'; possible: cpu, sm_80" in fails(capsys, *argv, "--target", "b201")
    assert explained == []


def test_explain_for_a_pretended_gpu(example, capsys):
    (example / "an_example_model.py").write_text(
        "import torch\n\ndef make():\n    x = torch.randn(64, 64, dtype=torch.bfloat16)\n"
        "    return torch.nn.Linear(64, 64, dtype=torch.bfloat16), (x,)\n")
    assert main(["explain", "an_example_model:make", "--target", "sm_100a", "--policy", "nvfp4"]) == 0
    out = capsys.readouterr().out
    assert "sm_100a" in out and out.count("cutlass") == 2  # fprop and wgrad: x needs no gradient


@pytest.mark.parametrize("argv, status", [(["recipes"], 0), (["recipe"], 2)])
def test_the_package_runs_as_a_module(monkeypatch, capsys, argv, status):
    monkeypatch.setattr(sys, "argv", ["quartet", *argv])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("quartet", run_name="__main__")
    assert exit.value.code == status
    assert ("quartet-paper" if status == 0 else "did you mean 'recipes'?") in "".join(capsys.readouterr())


@pytest.mark.parametrize("argv, status", [
    (["--help"], 0), (["--version"], 0), (["explain", "--help"], 0), (["docter"], 2),
    (["explain", "a:b", "--polici"], 2),
    (["explain", "a:b", "--policy", "quartet-papr"], 2), (["explain", "a:b", "--policy", "no.toml"], 2),
    (["explain", "a:b", "--target", "b201"], 2), (["explain", "a"], 2), (["explain", "a:b", "--json", "no/a.json"], 2),
    (["explain", "a:b", "--dump", "a_file/graphs"], 2), (["bench", "a:b", "--policy", "fp8,fp9"], 2),
    (["bench", "a:b", "--steps", "1"], 2), (["diff", "a.json", "b.json"], 2), (["recipes", "fp9"], 2),
    (["build", "--arch", "b201"], 2), (["tune", "1,2"], 2), (["calibrate", "--seconds", "0"], 2), (["cache", "lst"], 2),
    (["bench", "a:b", "--lr", "-1"], 2), (["bench", "a:b", "--lr", "nan"], 2), (["suggest", "a:b", "--error", "-1"], 2),
    (["suggest", "a:b", "--time", "0"], 2), (["replay", "no_dump"], 2),
    (["explain", "no_such_module:make"], 2), (["explain", "a_module:mak"], 2), (["explain", "a:b", "--html", "-"], 2),
    (["bench", "a:b", "--plot", "a.txt"], 2), (["diff", "a_file", "a_file"], 2),
    (["recipes", "fp8", "--markdown"], 2), (["recipes", "--markdown", "--json", "-"], 2),
    (["cache", "clear", "--json", "-"], 2),
])
def test_what_is_typed_is_answered_before_pytorch_is_imported(tmp_path, argv, status):
    (tmp_path / "a_file").touch()
    (tmp_path / "a_module.py").write_text("def make(): pass\n")
    program = ("import sys\nfrom quartet.cli.main import main\ntry:\n    status = main(sys.argv[1:])\n"
               "except SystemExit as end:\n    status = end.code\nassert 'torch' not in sys.modules\nsys.exit(status)")
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) <= (2 if status else 0)


def test_the_names_of_recipes_are_known_without_pytorch():
    assert usage.RECIPES == tuple(recipe.name for recipe in built_in())


def test_each_command_shows_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0 and f"  quartet {command}" in capsys.readouterr().out


def test_doctor_ends_with_what_another_gpu_would_multiply(capsys):
    main(["doctor", "--target", "a100"])
    assert capsys.readouterr().out.splitlines()[-1] == "sm_80 would multiply int8 a row on tensor cores."


@pytest.mark.parametrize("argv, key", [(["doctor"], "verdict"), (["recipes", "fp8"], "fprop"), (["cache"], "objects")])
def test_data_is_written_alone_to_the_standard_output(capsys, tmp_path, argv, key):
    assert main([*argv, "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert key in data
    assert main([*argv, "--json", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out and json.loads((tmp_path / "a.json").read_text()).keys() == data.keys()


def test_cache_lists_without_making_a_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "none"))
    assert main(["cache"]) == 0 and "0 objects" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_report_fits_a_narrow_terminal(example, explained, capsys, monkeypatch):
    monkeypatch.setattr("quartet.cli.output.terminal_width", lambda: 80)
    assert main(["explain", "an_example_model:make"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_diff_shows_what_changed_between_two_reports(tmp_path, capsys):
    for name, kernel in (("a", None), ("b", "cpp")):
        records = [MatmulRecord(i, f"layers.{i}.up", "linear", "fprop", 1, 2, 3, "float32", recipe="fp8", kernel=kernel,
                                reason="" if kernel else "skipped") for i in range(2)]
        (tmp_path / f"{name}.json").write_text(json.dumps(Report(records, 64, policy="fp8").to_dict()))
    argv = ["diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "lowered   0 of 2 → 2 of 2", "FLOPs     0.0 % → 100.0 %",
        "layers.*.up fprop × 2: left alone (skipped) → fp8 by cpp"]
    assert main([argv[0], argv[1], argv[1]]) == 0 and capsys.readouterr().out == "nothing changed\n"
    (tmp_path / "b.json").write_text("{}")
    assert "is no report of `quartet explain --json`: it has no 'matmuls'" in fails(capsys, *argv)


def test_bench_compares_the_model_as_it_is_with_each_policy(example, capsys, monkeypatch):
    (example / "an_example_model.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(8, 8), (torch.ones(4, 8),)\n")
    monkeypatch.setattr(torch, "compile", lambda model, **chosen: model)
    argv = ["bench", "an_example_model:make", "--policy", "fp8,quartet", "--steps", "5", "--json", "a.json"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "as it is" in out and "mean square of its first output" in out and "simulation" in out
    runs = json.loads((example / "a.json").read_text())["runs"]
    assert [run["policy"] for run in runs] == ["as it is", "fp8", "quartet"]
    assert all(len(run["losses"]) == 5 and run["losses"] == runs[0]["losses"] for run in runs)
    assert runs[0]["losses"][-1] < runs[0]["losses"][0] and runs[0]["kept_bytes"] > 0


def test_bench_ends_with_status_1_where_a_policy_does_not_train(example, capsys, monkeypatch):
    (example / "an_example_model.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(8, 8), (torch.ones(4, 7),)\n")
    monkeypatch.setattr(torch, "compile", lambda model, **chosen: model)
    assert main(["bench", "an_example_model:make", "--policy", "fp8", "--steps", "2"]) == 1
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in capsys.readouterr().out


def test_replay_refuses_a_file_without_tensors(tmp_path, capsys):
    (tmp_path / "inputs.pt").write_text("junk")
    assert "as tensors that torch.save wrote" in fails(
        capsys, "replay", str(tmp_path), "--inputs", str(tmp_path / "inputs.pt"))
