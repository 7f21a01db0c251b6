"""What is said while a graph is compiled, and what a structured trace gets."""

import json
import logging
import math
import time

import pytest
import torch

from quartet.backend import make_pipeline
from quartet.lowering.recipe.records import MatmulRecord
from quartet.options import Options
from quartet.report import announce
from quartet.report.observing import dump_of


def record(**changes):
    return MatmulRecord(**{"site": 0, "fqn": "a", "op_class": "linear", "role": "fprop", "m": 1, "n": 2, "k": 3,
                           "dtype": "bfloat16"} | changes)


def test_a_summary_counts_kernels_and_reasons():
    ours = [record(recipe="fp8", kernel="cublaslt")] * 2
    text = announce.summary([*ours, *(record(reason=reason) for reason in ("x", "x", "y", "z", "w"))])
    assert text == ("2 of 7 matmuls quantised; 2 × fp8 by cublaslt; "
                    "left alone: 2 × x, 1 × y, 1 × z and 1 other reasons")


def test_a_long_compilation_says_that_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(announce, "PATIENCE", 0.01)
    gm, begin = torch.fx.symbolic_trace(torch.nn.ReLU()), time.monotonic()

    def said():
        return [r.getMessage() for r in caplog.records if "so far" in r.getMessage()]

    with caplog.at_level(logging.WARNING, "quartet"), announce.patiently(gm):
        while len(said()) < 4 and time.monotonic() < begin + 60:
            time.sleep(0.01)
    assert "a graph of 3 operations" in said()[0]
    assert 4 <= len(said()) < math.log2((time.monotonic() - begin) / 0.01 + 1) + 0.5, "0.01, 0.02, 0.04 seconds apart"


@pytest.mark.parametrize("trace, dump, observed, cached", [
    (None, None, False, True), ("a folder", None, True, True), (None, "graphs", True, False),
    ("a folder", "graphs", True, False)])
def test_a_structured_trace_gets_the_graphs_and_keeps_the_caches(monkeypatch, trace, dump, observed, cached):
    monkeypatch.delenv("TORCH_TRACE", raising=False)
    if trace:
        monkeypatch.setenv("TORCH_TRACE", trace)
    options = Options.parse(options={"policy": "fp8", **({"dump": dump} if dump else {})})
    assert (dump_of(options, {}, "cpu") is not None) == observed
    step = make_pipeline(torch.fx.symbolic_trace(torch.nn.ReLU()), [torch.randn(4)], options)
    assert (step.uuid() is not None) == cached


def test_a_dump_says_what_was_compiled(tmp_path):
    options = Options.parse(options={"policy": "fp8", "dump": str(tmp_path), "strict": True})
    about = json.loads(json.dumps(dump_of(options, {}, "cpu").about))
    assert about["policy"] == "Policy('fp8')" and about["options"] == "strict=True" and about["device"] == "cpu"
