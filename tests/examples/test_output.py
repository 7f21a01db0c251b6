"""Programs that train say what is missing before they train, and keep their results whatever fails after."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def examples(monkeypatch):
    """The folders in the path, as for a program in them."""
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module


def test_without_rich_a_program_ends_at_once_in_words(examples, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "console", raising=False)
    with pytest.raises(SystemExit, match=r"^this program needs rich .*: run `pip install rich`, or `pip install -e "):
        examples("console")


def test_what_prints_nothing_needs_no_rich():
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); sys.modules['rich'] = None; "
            "import descent, direct_ternary")
    subprocess.run([sys.executable, "-c", code], check=True)


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
    ("train_llama", "--out"), ("train_llama", "--checkpoint"), ("fp8_trillion", "--out"), ("direct_ternary", "--out"),
    ("cpu_step", "--out"), ("saved_activations", "--json"), ("bench_linear", "--out"),
])
def test_where_nothing_can_be_written_nothing_is_trained(examples, tmp_path, monkeypatch, program, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", [program, option, "file/results/x"])
    with pytest.raises(SystemExit, match=rf"^cannot write to the folder file/results.*directory; name .* {option}$"):
        examples(program).main()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


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


@pytest.mark.parametrize("program", ["train_llama", "fp8_trillion"])
@pytest.mark.parametrize("arguments, said", [
    (["--steps", "0"], "--steps is 0; use 1 or more"), (["--stop-at", "0"], "--stop-at is 0"),
    (["--checkpoint-every", "0"], "--checkpoint-every is 0"), (["--lr", "nan"], "--lr is nan; use a number above 0"),
    (["--data", "none.txt"], "--data: there is no file none.txt"), (["--resume", "."], "--resume: . is no file"),
])
def test_arguments_that_cannot_be_meant_end_a_program_in_words(examples, tmp_path, monkeypatch, capsys, program,
                                                               arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        examples(program).parse(arguments)
    assert f"error: {said}" in capsys.readouterr().err


def test_a_policy_that_is_none_ends_the_demo_in_words(examples, capsys):
    with pytest.raises(SystemExit):
        examples("train_llama").parse(["--policy", "fp9"])
    assert "error: --policy: unknown policy 'fp9'; did you mean 'fp8'?" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_named(examples, tmp_path):
    import torch

    program, path = examples("train_llama"), tmp_path / "other.pt"
    path.write_text("junk")
    with pytest.raises(ValueError, match="other.pt is no checkpoint: torch.load cannot read it"):
        program.load_checkpoint(path, [], {})
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="other.pt is no checkpoint of this program"):
        program.load_checkpoint(path, [], {})
