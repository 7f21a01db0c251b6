"""The programs for other people's tools and for several processes run to their end, and learn.

As shipped they take up to half a minute of generated code each: ``QUARTET_EXAMPLES=all`` (``make examples``).
"""

import importlib.util
import os
import re
from pathlib import Path

import gloo
import pytest
import torchrun

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHIPPED = os.environ.get("QUARTET_EXAMPLES") == "all"
SHORT = {"finetune_hf": ("--steps", "12", "--seq", "64"), "lora": ("--steps", "12", "--seq", "64"),
         "fsdp_llama": ("--steps", "12", "--seq", "64"), "tensor_parallel": ("--steps", "12", "--seq", "64"),
         "vit": ("--steps", "30",)}
PACKAGES = {"finetune_hf": ("transformers", "accelerate"), "lora": ("transformers", "peft")}


def run(name, folder, ranks=1, *more):
    """What a program prints."""
    for package in PACKAGES.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    program = EXAMPLES / f"{name}.py"
    if SHIPPED:
        return torchrun.run(program, *more, ranks=ranks, folder=folder)
    alone = Path(__file__).with_name("without_code.py")
    return torchrun.run(alone, program, *SHORT[name], *more, ranks=ranks, folder=folder)


def losses(text):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]


def test_fine_tuning(tmp_path):
    before, after = map(float, re.search(r"validation loss (\S+) → (\S+) nats", run("finetune_hf", tmp_path)).groups())
    assert after < before - 0.3
    assert {"model.safetensors", "config.json"} <= {file.name for file in (tmp_path / "finetune-out/model").iterdir()}


def test_adapters(tmp_path):
    first, *_, last = losses(run("lora", tmp_path))
    assert last < first and (tmp_path / "lora-out/adapter_model.safetensors").exists()


def test_images(tmp_path):
    text = run("vit", tmp_path)
    assert losses(text)[-1] < losses(text)[0] and "unseen images are named right" in text


@gloo.available
def test_sharded(tmp_path):
    first, *_, last = losses(run("fsdp_llama", tmp_path, 2, "--policy", "fp8-delayed"))
    assert last < first - 0.5
    if SHIPPED:  # on another number of processes
        assert losses(run("fsdp_llama", tmp_path, 1, "--policy", "fp8-delayed", "--resume"))[0] < first - 0.5


@gloo.available
def test_divided_layers(tmp_path):
    text = run("tensor_parallel", tmp_path, 2)
    assert losses(text)[-1] < losses(text)[0] - 0.5 and "differ by at most 0.0" in text
