"""Where the default quantises nothing: one line says so, and what would pay there."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import quartet
from quartet.lowering.rates import kept
from quartet.lowering.recipe.records import MatmulRecord
from quartet.lowering.recipe.types import ROLES
from quartet.report.advice import advice
from quartet.runtime.devices import Target


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


def records(m, n, k, dtype="bfloat16", reason="would not pay: for a reason"):
    return [MatmulRecord(0, "up", "linear", role, m, n, k, dtype, reason=reason) for role in ROLES]


@pytest.mark.parametrize("name, size, said", [
    ("a100", (16384, 14336, 4096), "On a100 'int8-all' would: 1.23 times"),
    ("rtx 3090", (8192, 4096, 4096), "On rtx 3090 'int8-all' would: 2."),
    ("a100", (2048, 1024, 1024), "No recipe pays on a100 at these sizes, by the data sheet of a100"),
    ("h100", (8192, 4096, 4096), "On h100 'fp8' would: 1."),
    ("gfx950", (8192, 4096, 4096), "What would pay cannot be told, nor can `quartet calibrate` measure it: it "
                                   "measures an NVIDIA GPU, but gfx950 is AMD's"),
])
def test_what_would_pay(name, size, said):
    text = advice(records(*size), Target.named(name))
    assert text.startswith(said) and text.endswith("quantises whether it pays or not, for its memory or to study it")


def test_advice_counts_what_the_plan_did():
    """A model of this one layer is behind its own call, one of four such layers is not."""
    alone, one_of_four = ([replace(r, called=part) for r in records(8192, 4096, 4096)] for part in (1.0, 0.25))
    assert advice(alone, Target.named("h200")).startswith("No recipe pays on h200 at these sizes")
    assert advice(one_of_four, Target.named("h200")).startswith("On h200 'fp8' would: 1.")


@pytest.mark.parametrize("target, possible", [
    (Target("cuda", "sm_75", name="Tesla T4"), False), (Target.named("gfx942"), False),
    (Target("cuda", "sm_80", name="NVIDIA A100-SXM4-40GB MIG 1g.5gb"), True)])
def test_to_calibrate_is_advised_only_where_that_can_be_done(target, possible):
    assert (kept.unfit(target) is None) is possible
    assert advice([], target).startswith("`quartet calibrate` measures") is possible


def test_a_dtype_that_no_narrow_product_has_is_what_is_said_first():
    assert advice(records(8192, 4096, 4096, "float32"), Target.named("h100")).startswith(
        "What is fast on h100 is for bfloat16: train in it")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_not_compared_by_the_rates_of_bfloat16(dtype):
    text = advice(records(16384, 14336, 4096, dtype), Target.named("a100"))
    assert text.startswith(f"How fast a100 multiplies in {dtype} is not among its rates") and " times " not in text
    mixed = records(16384, 14336, 4096, dtype) + records(2048, 1024, 1024)
    assert advice(mixed, Target.named("a100")) == advice(records(2048, 1024, 1024), Target.named("a100"))


def test_sizes_that_are_symbols_are_passed_over():
    assert advice(records("s0", 14336, 4096), Target.named("a100")).startswith("No recipe pays on a100")


@pytest.mark.parametrize("target, lowered", [("a100", False), ("rtx 3090", False), ("h100", True), ("b200", True)])
def test_the_default_of_a_large_layer_on_a_gpu_that_is_named(target, lowered):
    pytest.importorskip("triton")
    x = torch.empty(16384, 4096, dtype=torch.bfloat16, requires_grad=True)
    model = nn.utils.skip_init(nn.Linear, 4096, 14336, bias=False, dtype=torch.bfloat16)
    report = quartet.explain(model, x, target=target)
    assert {r.lowered for r in report.records} == {lowered}
    if lowered:
        assert report.notes == () and all(f"by the data sheet of {target}" in r.notes[0] for r in report.records)
    else:
        assert {r.reason for r in report.records} == {
            "would not pay: kernel 'triton' multiplies in the model's dtype here, which saves no time"}
        (note,) = report.notes
        assert note.startswith(f"the default quantises nothing here. On {target} 'int8-all' would: ")
        assert note in str(report)
