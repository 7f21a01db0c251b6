"""The code and the commands of README and docs/, run as they stand there on a small model, without generated code."""

import importlib
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import quartet
from quartet.cli.parser import COMMANDS, options, parser
from quartet.runtime import compat
from quartet.runtime.capture import Capture

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|toml)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# not run: other tools, several processes, and what a test of its own runs
READ = ("works_with.md", "distributed.md", "extending.md")
SHORTER = {"range(20)": "range(1)", "num_hidden_layers=4": "num_hidden_layers=1", "(8, 64)": "(2, 32)"}
GIVEN = """
import os, tempfile, torch, quartet, torch.distributed.checkpoint as dcp
from collections import OrderedDict
from quartet import Policy
torch.manual_seed(0)
model = torch.nn.Sequential(OrderedDict(up_proj=torch.nn.Linear(64, 96), down_proj=torch.nn.Linear(96, 64)))
x = tokens = torch.randn(64, 64)
inputs, p, weights = (x,), Policy("fp8"), model.state_dict()
path = os.path.join(tempfile.mkdtemp(dir="."), "state")
"""


def blocks(page, kind):
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == kind]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compat, "compile_fx", partial(compat.compile_fx, inner_compile=Capture()))
    monkeypatch.setattr(importlib.import_module("quartet.recipes"), "_registered", {})
    torch._dynamo.reset()
    names = {"__name__": "page"}
    for number, text in enumerate(blocks(page, "python")):
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        code = compile(text, f"{page.name}, block {number}", "exec")
        if page.name not in READ:
            exec(GIVEN, names)
            with warnings.catch_warnings(), torch._functorch.config.patch(enable_autograd_cache=False):
                warnings.simplefilter("ignore")
                exec(code, names)


@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks(page, "toml")])
def test_the_policies_of_the_pages_are_read(text):
    policy = quartet.Policy.from_toml(text)
    assert quartet.Policy.from_toml(policy.to_toml()) == policy


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_taken(page):
    known = options(parser(""))
    for line in re.findall(r"`quartet ([^`]+)`", page.read_text(encoding="utf-8")):
        command, *words = line.split()
        assert command in COMMANDS and all(word in known for word in words if word.startswith("-")), line
