"""explain(target=…) for Blackwell: anyone can see on a laptop what would run there."""

import pytest
import torch
from torch import nn

import quartet

TARGETS = ("sm_100a", "sm_103a", "sm_120a")


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


def model():
    module = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(torch.bfloat16)
    return module, torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("recipe", "without"), [("quartet", "dot-scaled"), ("nvfp4", "scaled-mm"),
                                                 ("mxfp8", "scaled-mm")])
def test_every_product_is_on_the_tensor_cores(target, recipe, without):
    pytest.importorskip("triton")
    module, x = model()
    for disabled, kernel in ((), "cutlass"), (("cutlass",), without):
        report = quartet.explain(module, x, target=target, options={"policy": recipe, "disable_kernels": disabled})
        lowered, layers = report.lowered, 1 if recipe == "nvfp4" else 2  # which leaves the last layer alone
        assert sorted((r.role, r.kernel) for r in lowered) == [(role, kernel) for role in ("dgrad", "fprop", "wgrad")
                                                               for _ in range(layers)]
        assert all("keeps the last" in r.reason for r in report.left_alone)
        assert report.flops_share() == layers / 2 and target in report.title() and kernel in report.table()


def test_auto_says_that_nothing_could_be_weighed_on_a_cpu():
    module, x = model()
    report = quartet.explain(module, x, target="cpu", options={"policy": "auto"})
    assert report.notes == ("no measured rates for cpu: whether it pays is not asked",)
    assert report.notes[0] in str(report) and report.to_dict()["notes"] == list(report.notes)
    assert not report.left_alone


@pytest.mark.parametrize("target", TARGETS)
def test_auto_weighs_by_the_data_sheet_and_says_so_in_one_line(target):
    pytest.importorskip("triton")
    module, x = model()
    report = quartet.explain(module, x, target=target, options={"policy": "auto"})
    (note,) = report.notes
    assert note.startswith("the default quantises nothing here") and "by the data sheet of " in note
    assert note in str(report) and not report.lowered
    wide = nn.Linear(4096, 14336, bias=False, dtype=torch.bfloat16)
    x = torch.empty(16384, 4096, dtype=torch.bfloat16, requires_grad=True)
    report = quartet.explain(wide, x, target=target, options={"policy": "auto"})
    assert {r.kernel for r in report.records} == {"cutlass"} and report.notes == ()  # quartet, faster there than fp8
    assert all("by the data sheet of " in r.notes[0] for r in report.records)


@pytest.mark.parametrize(("target", "policy"), [("sm_100a", "quartet"), ("sm_90", "fp8")])
def test_no_note_where_the_user_chose(target, policy):
    pytest.importorskip("triton")
    module, x = model()
    assert quartet.explain(module, x, target=target, options={"policy": policy}).notes == ()


def test_the_device_of_the_model_is_weighed_too():
    module, x = model()
    assert quartet.explain(module, x, options={"policy": "auto"}).notes == (
        "no measured rates for cpu: whether it pays is not asked",)
