"""What cannot be meant is refused, or said, where it is written."""

import warnings

import pytest
import torch

import quartet
from quartet import Gemm, Operand, Policy, PolicyError, QuantSpec, Recipe, SpecError
from quartet.policy.shadowed import shadowed

MX = "e2m1/32 e8m0 floor nearest"


def test_an_operand_is_written_as_text_too():
    assert Operand(MX) == Operand(QuantSpec.parse(MX)) and Gemm(MX, MX) == Gemm(Operand(MX), Operand(MX))
    for wrong in (lambda: Operand("e2m1/32"), lambda: Operand(4), lambda: Gemm(MX, 4)):
        with pytest.raises(SpecError):
            wrong()


@pytest.mark.parametrize("make, said", [
    (lambda: Policy(Recipe("mine")), "quantises nothing: give it fprop, dgrad, wgrad or saved"),
    (lambda: quartet.register(Recipe("mine")), "quantises nothing"),
    (lambda: Policy("fp8").on("a", "bf16", role="backward"), r"role=\('dgrad', 'wgrad'\)"),
    (lambda: Policy("fp8").on("a", "none"), "is written None"),
])
def test_a_policy_that_cannot_be_meant(make, said):
    with pytest.raises(PolicyError, match=said):
        make()


@pytest.mark.parametrize("make, said", [
    (lambda: Recipe("mine", fprop=MX), "recipe 'mine': fprop is a Gemm or None, not str 'e2m1"),
    (lambda: Recipe("mine", saved="e4m3/16"), "saved is a Saved or None, not str"),
    (lambda: Recipe("mine", history=1024), "history is a Delayed, not int 1024"),
    (lambda: Recipe("mine", history=None), "history is a Delayed, not NoneType"),
    (lambda: QuantSpec.parse(4), "cannot read quantiser '4'; expected 'element/block"),
    (lambda: Policy("fp8", rules=4), r"rules are made by Policy.on\(…\), got int 4"),
    (lambda: Policy.from_toml("policies/mine.tml"), "not valid TOML: .*give a path object, or a string that ends in"),
])
def test_what_is_of_another_type_is_told_from_what_is_meant(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_state_of_what_is_no_model():
    with pytest.raises(TypeError, match="expected a model, not dict"):
        quartet.State({})


@pytest.mark.parametrize("policy, found", [
    (Policy("fp8").on("a", "bf16").on("*", "mxfp8"), [0]),
    (Policy("fp8").on("a", "bf16").on("a", "mxfp8"), [0]),
    (Policy("fp8").on("a", "bf16").on("a", "mxfp8", role="wgrad"), []),
    (Policy("fp8").on("a", "bf16", role="wgrad").on("a", "mxfp8"), [0]),
    (Policy("fp8").on("*", "mxfp8").on("a", "bf16"), []),
    (Policy("fp8").on("a.*", "bf16").on("linear", "mxfp8"), []),
    (Policy("fp8").on("attention_qk", "mxfp8").on("attention", "mxfp8"), [0]),
    (Policy("fp8").on("lm_head", "mxfp8").on(recipe="mxfp8"), []),
    (Policy("fp8").on("lm_head", "mxfp8").on(recipe=None), [0]),
    (Policy("fp8").on("linear", "mxfp8").on(recipe="mxfp8"), [0]),
    (Policy("fp8").on("a", "mxfp8").on("a", "bf16", shape="k > 64"), []),
    (Policy("fp8").on("a", "e4m3/16", op="saved").on("a", "bf16"), []),
])
def test_a_rule_that_a_later_one_leaves_nothing_is_told(policy, found):
    assert [i for i, _ in shadowed(policy.rules)] == found


def test_it_is_said_once_when_the_model_is_compiled():
    policy = Policy("fp8").on("1", "bf16").on("*", "mxfp8")
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quartet.explain(model, torch.randn(32, 32), options={"policy": policy})
    assert sum("decides nothing" in str(w.message) for w in seen) == 1


def test_explain_tells_an_option_from_an_argument_of_the_model():
    with pytest.raises(TypeError, match="policy is an option.*options={'policy': 'fp8'}"):
        quartet.explain(torch.nn.Linear(32, 32), torch.randn(32, 32), policy="fp8")
    with pytest.raises(TypeError, match="takes a module or a function, not NoneType"):
        quartet.explain(None, torch.randn(32, 32))


def test_a_plain_optimizer_of_low_bit_weights_names_ours():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quartet.direct.convert(model, bits=4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    with pytest.raises(NotImplementedError, match="quartet.direct.Optimizer"):
        optimizer.step()
