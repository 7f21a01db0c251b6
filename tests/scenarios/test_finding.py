"""Which matmuls are found and lowered, whatever form a model writes them in; and that gradients stay good."""

import pytest
import torch
from harness import assert_close, assert_same, compile_eager, compile_plain, cosine, step
from models import CASES
from torch import nn


@pytest.mark.parametrize("name", CASES)
def test_lowers_the_expected_matmuls(name):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    compiled, backend = compile_eager(model)
    got = step(compiled, model, inputs)
    assert backend.lowered() == case.lowered
    assert backend.alone() == case.alone
    assert_close(got, step(model, model, inputs))


@pytest.mark.parametrize("name", CASES)
def test_policy_bf16_is_torch_compile_bit_for_bit(name):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    compiled, backend = compile_eager(model, "bf16")
    got = step(compiled, model, inputs)
    assert not backend.lowered() and backend.records
    assert_same(got, step(compile_plain(model), model, inputs))


FORMS = {"w x": lambda w, x: torch.matmul(w, x), "x w": lambda w, x: torch.matmul(x.transpose(1, 2), w.t()),
         "four axes": lambda w, x: torch.matmul(w, x.unflatten(0, (2, -1))),
         "expanded": lambda w, x: torch.bmm(w.expand(len(x), -1, -1), x),
         "expanded and turned": lambda w, x: torch.bmm(x.transpose(1, 2), w.expand(len(x), -1, -1).transpose(1, 2))}


class Shared(nn.Module):
    """One weight for each matrix of a batch."""

    def __init__(self, form):
        super().__init__()
        self.first, self.form = nn.Linear(64, 64), form
        self.weight = nn.Parameter(torch.randn(96, 64) / 8)

    def forward(self, x):
        return self.form(self.weight, self.first(x).transpose(1, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_weight_for_a_batch_is_a_layer_whether_it_is_trained_or_not(form, dynamic):
    model, inputs = Shared(FORMS[form]), (torch.randn(4, 32, 64),)
    compiled, backend = compile_eager(model, "int8-all", dynamic=dynamic)
    trained = compiled(*inputs)
    assert backend.lowered()["weight"] == {"fprop", "dgrad", "wgrad"}
    got, want = step(compiled, model, inputs)[1], step(model, model, inputs)[1]
    assert all(cosine(got[name], want[name]) > 0.999 for name in want)
    model.weight.requires_grad_(False)
    assert torch.equal(compiled(*inputs), trained) and cosine(step(compiled, model, inputs)[1]["first.weight"],
                                                              want["first.weight"]) > 0.999
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), trained)
    assert {r.op_class for r in backend.records} == {"linear"} and all(r.lowered for r in backend.records)
    assert compiled(inputs[0][:0]).numel() == 0
