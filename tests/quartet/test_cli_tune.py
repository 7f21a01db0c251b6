"""``quartet tune``: what it refuses, and its table, with a clock that only pretends."""

import pytest
import torch
from cutlass_tools import pretend

from quartet.cli import kernel_commands
from quartet.cli.main import main
from quartet.kernels.build_cache import BuildError
from quartet.kernels.cutlass import selection
from quartet.kernels.cutlass import tune as tuning
from quartet.kernels.cutlass.configuration import Configuration

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "cache"))
    selection.forget()
    yield tmp_path / "cache"
    selection.forget()


def test_the_table_and_what_is_kept(cache, monkeypatch, capsys):
    calls, times = pretend(monkeypatch), iter([4.0, 2.0, 3.0, 7.0, 5.0, 6.0])

    def clock(run, device):
        run()
        return next(times)

    monkeypatch.setattr(tuning, "microseconds", clock)
    products = [("mxf4", "bf16", (1024, 512, 256)), ("mxf8", "fp16", (256, 128, 512))]
    assert kernel_commands.tune_products(products, CPU) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["product", "kernel", "µs", "TFLOPS"],
        ["mxf4", "bf16", "1024×512×256", "256x128x256_2x1_2sm", "2.0", "134", "from", "now", "on"],
        ["128x128x256_1x1_1sm", "3.0", "89"], ["256x256x256_2x1_2sm", "4.0", "67"],
        ["mxf8", "fp16", "256×128×512", "256x128x128_2x1_2sm", "5.0", "7", "from", "now", "on"],
        ["128x128x128_1x1_1sm", "6.0", "6"], ["256x256x128_2x1_2sm", "7.0", "5"]]
    product = selection.Product("sm_100a", "mxf4", "bf16", False, False, 1024, 512, 256)
    assert selection.select(product, CPU, 148).tile == (256, 128, 256)
    shapes = [(c.problem.m, c.problem.n, c.problem.k) for c in calls if hasattr(c, "problem")]
    assert shapes == [(1024, 512, 256)] * 3 + [(256, 128, 512)] * 3
    assert {c.output for c in calls if isinstance(c, Configuration)} == {"bf16", "fp16"}
    assert main(["cache"]) == 0
    assert "tuned for pretended GPU: mxf4 bf16 1024x512x256, mxf8 fp16 256x128x512\n" in capsys.readouterr().out
    main(["cache", "clear"])
    capsys.readouterr()
    main(["cache"])
    assert "tuned" not in capsys.readouterr().out


def test_what_cannot_be_built_ends_with_status_1(cache, monkeypatch, capsys):
    def fail(*operands, **settings):
        raise BuildError("nvcc is missing")

    monkeypatch.setattr(kernel_commands, "tune", fail)
    assert kernel_commands.tune_products([("mxf4", "bf16", (64, 64, 64))], CPU) == 1
    assert capsys.readouterr().err == "quartet: mxf4 bf16 64×64×64: nvcc is missing\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["8192,4096"], "'8192,4096' is not M,N,K; for example 8192,4096,4096"),
    (["8192,4096,x"], "is not M,N,K"),
    (["8192,4096,100"], "need K a multiple of 32, not 100; pad it to 128"),
    (["8192,0,128"], "N = 0 is not an extent"),
    (["8192,4096,4096", "--kinds", "nvfp4"], "--kinds 'nvfp4' does not exist; did you mean 'nvf4'?"),
    ([], "usage: quartet tune"),
])
def test_wrong_usage(capsys, arguments, message):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_needs_a_blackwell(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "8192,4096,4096"]) == 2
    assert "tune measures kernels on a Blackwell GPU, but no CUDA device is here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert main(["tune", "8192,4096,4096"]) == 2
    assert "but this one is NVIDIA H200" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(kernel_commands, "tune_products", lambda *given: asked.append(given) or 0)
    assert main(["tune", "8192,4096,4096", "64,64,64", "--kinds", "nvf4", "--output", "bf16,fp32"]) == 0
    assert asked == [([("nvf4", output, shape) for shape in ((8192, 4096, 4096), (64, 64, 64))
                       for output in ("bf16", "fp32")], torch.device("cuda", 0))]
