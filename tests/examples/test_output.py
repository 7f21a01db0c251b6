"""Programs that train say what is missing before they train, and keep their results whatever fails after."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def examples(monkeypatch):
    """The folder in the path, as for a program in it."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.fixture
def without(tmp_path):
    """Environment variables under which a package cannot be imported."""
    def environment(package):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / f"{package}.py").write_text(f"raise ImportError('no {package} here')\n")
        return os.environ | {"PYTHONPATH": str(tmp_path / "broken"), "OMP_NUM_THREADS": "1"}

    return environment


@pytest.mark.parametrize("program", ("examples/train_llama.py", "examples/fp8_trillion.py", "benchmarks/cpu_step.py"))
def test_without_rich_a_program_ends_at_once_in_words(without, tmp_path, program):
    done = subprocess.run([sys.executable, str(ROOT / program)], env=without("rich"), cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == ("this program needs rich (no rich here): run `pip install rich`, or `pip install -e "
                           "'.[demo]'` for all of them\n")


@pytest.mark.parametrize("module", ("descent", "direct_ternary"))
def test_what_prints_nothing_needs_no_rich(without, module):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); import {module}"
    subprocess.run([sys.executable, "-c", code], env=without("rich"), check=True)


def test_a_picture_is_left_out_without_matplotlib_and_the_results_are_there(examples, tmp_path, monkeypatch):
    outcome = examples("outcome")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = SimpleNamespace(name="a", losses=[2.0, 1.0], seconds=[], first_step=math.nan, validation=math.nan,
                          saved_bytes=0, state_bytes=1)
    assert outcome.pyplot() is None
    outcome.save(tmp_path / "result.json", [run, SimpleNamespace(**vars(run) | {"name": "b"})], {"seed": 0})
    outcome.plot([run], tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    saved = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert saved["runs"]["a"]["losses"] == [2.0, 1.0] and saved["runs"]["b"]["validation_loss"] is None
    assert "comparison" not in saved


@pytest.mark.parametrize("program, option", [
    ("examples/train_llama.py", "--out"), ("examples/train_llama.py", "--checkpoint"),
    ("examples/fp8_trillion.py", "--out"), ("examples/direct_ternary.py", "--out"),
    ("benchmarks/cpu_step.py", "--out"), ("benchmarks/saved_activations.py", "--json"),
])
def test_where_nothing_can_be_written_nothing_is_trained(tmp_path, program, option):
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run([sys.executable, str(ROOT / program), option, "file/results/x"], cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("cannot write to the folder file/results")
    assert done.stderr.endswith(f"Not a directory; name another with {option}\n") and "step" not in done.stdout


def test_safetensors_are_asked_for_before_training(examples, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit, match="needs safetensors .*pip install safetensors"):
        examples("direct_ternary").main(["--out", str(tmp_path / "a.safetensors")])


def test_a_file_is_there_whole_or_not_at_all(examples, tmp_path):
    output = examples("output")
    output.write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), output.whole(tmp_path / "a") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_under_the_files_name_is_replaced_and_not_followed(examples, tmp_path):
    output = examples("output")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "result.json").symlink_to(tmp_path / "precious")
    output.write_json(tmp_path / "result.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "result.json").is_symlink()
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}
