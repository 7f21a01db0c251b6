"""``quartet build`` and ``quartet cache``, with an nvcc that only pretends."""

import re

import pytest
import torch
from cutlass_tools import compiled, fake_toolchain

from quartet.cli import kernel_commands
from quartet.cli.main import main
from quartet.kernels import build_cache


@pytest.fixture
def log(tmp_path, monkeypatch):
    return fake_toolchain(tmp_path, monkeypatch)


def test_build_shows_every_kernel_and_builds_it_once(log, capsys):
    assert main(["build", "--arch", "sm_120a", "--kinds", "mxf4", "-j", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"nvcc 13\.0\.88 \(.*/nvcc\), CUTLASS 4\.2\.0, cache .*/cache", said)
    assert len(re.findall(r"\[\d/3\] quartet_mxf4_sm_120a_\w+: 0 s, 168 registers, 0 bytes spilled", said)) == 3
    assert said.endswith("3 built, 0 in the cache already\n") and compiled(log) == 3
    assert main(["build", "--arch", "sm_120a", "--kinds", "mxf4,nvf4"]) == 0
    said = capsys.readouterr().out
    assert said.count("in the cache\n") == 3 and said.endswith("3 built, 3 in the cache already\n")
    assert compiled(log) == 6


def test_build_takes_epilogues(log, capsys):
    chosen = ["--arch", "sm_100a", "--kinds", "nvf4", "--output", "bf16,fp32"]
    assert main(["build", *chosen, "--bias", "--accumulate"]) == 0
    said = capsys.readouterr().out
    assert said.count("_fp32_bias_accumulate:") == said.count("_bf16_bias_accumulate:") == 2


def test_build_reports_failures(log, capsys):
    assert main(["build", "--arch", "sm_120a", "--kinds", "mxf8", "--output", "fp16,bf16"]) == 1
    caught = capsys.readouterr()
    assert "_pingpong_fp16: failed\n" in caught.out
    assert caught.out.endswith("2 built, 0 in the cache already, 2 failed\n")
    assert caught.err.count("error: no such kernel") == 2


def test_build_without_a_compiler(log, capsys, monkeypatch):
    monkeypatch.setattr(kernel_commands, "toolchain", missing)
    assert main(["build", "--arch", "sm_100a"]) == 1
    assert capsys.readouterr().err == "quartet: nvcc is missing: install it\n"


def missing():
    raise build_cache.BuildError("nvcc is missing: install it")


def test_build_with_an_old_compiler(tmp_path, monkeypatch, capsys):
    log = fake_toolchain(tmp_path, monkeypatch, nvcc="12.8.93")
    assert main(["build", "--arch", "sm_100a,sm_103a"]) == 1
    assert "sm_103a needs 12.9 or newer" in capsys.readouterr().err and compiled(log) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["build", "--arch", "sm_100"], "--arch 'sm_100' does not exist; did you mean 'sm_100a'?"),
    (["build", "--arch", "sm_100a", "--kinds", "nvfp4"], "--kinds 'nvfp4' does not exist; did you mean 'nvf4'?"),
    (["build", "--arch", "sm_100a", "--output", "half"], "--output 'half' does not exist; possible: bf16, fp16, fp32"),
    (["build", "--arch", "sm_100a", "-j", "0"], "--jobs 0 is not possible; use 1 or more"),
    (["build", "--arhc", "sm_100a"], "did you mean '--arch'?"),
    (["cache", "claer"], "unknown action 'claer' of cache; did you mean 'clear'? possible: list, clear"),
])
def test_wrong_usage(log, capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and compiled(log) == 0


def test_build_for_the_devices_that_are_there(log, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 + index, 0))
    assert main(["build", "--kinds", "mxf4"]) == 0
    said = capsys.readouterr().out
    assert said.count("quartet_mxf4_sm_100a") == 3 and "sm_103a" not in said
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["build"]) == 2
    assert "no Blackwell GPU; say what to build for with --arch: sm_100a" in capsys.readouterr().err


def test_cache_lists_and_clears(log, capsys):
    assert main(["cache"]) == 0
    assert re.fullmatch(r".*/cache: 0 objects, 0\.0 MiB\n", capsys.readouterr().out)
    main(["build", "--arch", "sm_100a", "--kinds", "mxf4"])
    capsys.readouterr()
    damaged = build_cache.entries()[0].path
    damaged.write_bytes(b"")
    assert main(["cache", "list"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("/cache: 3 objects, 0.0 MiB") and rows[0].split() == ["kernel", "KiB", "built", "seconds",
                                                                                "registers"]
    assert len(rows) == 4 and sum("damaged, will be built again" in row for row in rows) == 1
    assert all("quartet_mxf4_sm_100a_" in row and "168" in row for row in rows[1:])
    assert main(["cache", "clear"]) == 0
    assert re.search(r"removed 3 objects, 0\.0 MiB", capsys.readouterr().out)
    assert build_cache.entries() == []


def test_cache_that_others_can_write(log, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert main(["cache", "clear"]) == 1
    assert "run `chmod 700" in capsys.readouterr().err


def test_a_bar_on_a_terminal(log, capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich, which draws the bar, is not installed")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["build", "--arch", "sm_100a", "--kinds", "mxf4"]) == 0
    assert "[3/3] quartet_mxf4_sm_100a_" in capsys.readouterr().out
