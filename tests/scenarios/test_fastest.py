"""Which of several recipes a layer gets under a policy with alternatives, told for GPUs that need not be there."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_profitability import FREE, Branches, Chain, bf16, casts_at, priced, rates, report  # noqa: F401
from torch import nn

from quartet import Policy, PolicyError, recipes
from quartet.passes.plan import profitability as pays
from quartet.policy.recipes import recipes_of
from quartet.report.predicted import predicted_speed
from quartet.runtime.devices import Target

pytest.importorskip("triton")
AUTO = Policy.coerce("auto")
SLOW = 1e-9  # seconds an element, of a pass that decides


def rates_with(**passes):
    """Rates of free passes but for some, where FP4 is twice as fast as FP8 and that as bfloat16."""
    fast = {"bf16": 1e12, "fp8": 2e12, "fp4": 4e12}
    return replace(FREE, flops=fast, output=dict.fromkeys(fast, 0.0), passes={**FREE.passes, **passes})


def chosen(found):
    """(module, role) → recipe, None where it is left alone."""
    return {(r.fqn, r.role): r.recipe if r.lowered else None for r in found}


@pytest.mark.parametrize("gpu, recipe", [("h200", "fp8"), ("h100", "fp8"), ("rtx 4090", "fp8"), ("l40s", "fp8"),
                                         ("b200", "quartet"), ("a100", None), ("rtx 3090", None)])
def test_the_default_by_what_is_known_of_gpus(monkeypatch, gpu, recipe):
    """A layer as wide as those of an 8B model, in a graph of few tokens: it was trained with more."""
    layer = pays._layer
    monkeypatch.setattr(pays, "_layer", lambda *site: replace(layer(*site), m=16384, n=14336, k=4096))
    found = report_for(gpu, "auto")
    assert set(chosen(found.records).values()) == {recipe}
    assert ("recipe pays" in str(found.notes) or "'int8-all' would" in str(found.notes)) is (recipe is None)


def report_for(gpu, policy):
    from quartet import explain

    return explain(nn.Linear(64, 96, bias=False).bfloat16(), bf16(32, 64).requires_grad_(),
                   options={"policy": policy}, target=gpu)


@pytest.mark.parametrize("passes, recipe", [({"rows": SLOW}, "fp8"), ({"cast": SLOW}, "quartet"),
                                            ({"cast": SLOW, "rows": SLOW}, None)])
def test_the_faster_recipe_is_taken_and_the_others_time_is_told(monkeypatch, passes, recipe):
    monkeypatch.setattr(pays, "rates_of", lambda target: rates_with(**passes))
    found = report_for("sm_100", "auto")
    assert set(chosen(found.records).values()) == {recipe}
    other = "quartet" if recipe == "fp8" else "fp8"
    for r in found.records:
        text = r.reason or r.notes[-1]
        assert text.startswith("predicted " if recipe else "would not pay: predicted ")
        assert text.endswith(f" µs by {other!r}")


def test_fewer_bits_have_to_save_what_prices_may_be_wrong_by(monkeypatch):
    def use(fp4: float):
        made = rates_with()
        monkeypatch.setattr(pays, "rates_of", lambda target: replace(made, flops={**made.flops, "fp4": fp4}))
        return set(chosen(report_for("sm_100", "auto").records).values())

    assert use(2.03e12) == {"fp8"} and use(2.05e12) == {"quartet"}  # 2 %
    assert use(1.9e12) == {"fp8"}


def test_layers_of_one_x_get_one_recipe(monkeypatch):
    """By themselves the widest of three would be in FP4 and the narrowest in FP8."""
    monkeypatch.setattr(pays, "rates_of", lambda target: rates_with(requantise=6.7e-11))
    model = Branches("nothing").bfloat16()
    _, records = priced(model, bf16(64, 64), policy="auto", target="sm_100")
    taken = chosen(records)
    assert len({taken[f"layers.{i}", "fprop"] for i in range(3)}) == 1 and None not in taken.values()


@pytest.fixture
def by_length(monkeypatch):
    """Layers 64 wide are faster in FP8 at 32 tokens and in FP4 at 4096."""
    made = rates_with(**{"both axes": 3.3e-11, "requantise": 3.3e-11})
    monkeypatch.setattr(pays, "rates_of", lambda target: made)


def test_graphs_of_one_model_agree(by_length):
    """With backward and without, of another length than it was trained with, and with layers frozen."""
    model = Chain(64).bfloat16()
    assert set(chosen(priced(model, bf16(4096, 64), target="sm_100")[1]).values()) == {"quartet"}
    for grad, count in ((False, 4096), (True, 32), (False, 32)):
        assert set(chosen(priced(model, bf16(count, 64), grad, target="sm_100")[1]).values()) == {"quartet"}
    frozen = chosen(priced(Chain(64, (0, 1)).bfloat16(), bf16(32, 64), target="sm_100")[1])
    assert set(frozen.values()) == {"fp8"} and ("layers.0", "wgrad") not in frozen


def test_training_that_takes_another_recipe_than_evaluation_says_so(by_length):
    model = Chain(64).bfloat16()
    assert set(chosen(priced(model, bf16(32, 64), False, target="sm_100")[1]).values()) == {"fp8"}
    with pytest.warns(UserWarning, match="3 layers are decided otherwise for training than in the graphs"):
        after = chosen(priced(model, bf16(4096, 64), target="sm_100")[1])
    assert set(after.values()) == {"quartet"}


def test_a_rule_is_done_as_it_says_beside_alternatives(rates):  # noqa: F811
    rates(casts_at(1e-13))
    policy = AUTO.on("layers.0", "quartet").on("layers.1", None)
    taken = chosen(priced(Chain(64).bfloat16(), bf16(64, 64), policy=policy)[1])
    assert {taken["layers.0", role] for role in ("fprop", "wgrad")} == {"quartet"}
    assert taken["layers.1", "fprop"] is None and taken["layers.2", "fprop"] == "fp8"


def test_where_nothing_is_weighed_the_default_is_taken():
    assert set(chosen(report_for("cpu", "auto").records).values()) == {"quartet"}


def test_the_predicted_speed_is_of_what_was_chosen(monkeypatch):
    layer = pays._layer
    monkeypatch.setattr(pays, "_layer", lambda *site: replace(layer(*site), m=8192, n=4096, k=4096, called=0.0))
    one = report_for("h200", Policy("fp8"))
    assert report_for("h200", "auto").predicted == pytest.approx(one.predicted)


def test_what_a_budget_adds_is_in_the_predicted_speed():
    policy = Policy("quartet")
    records, target = report_for("h200", policy).records, Target.named("h200")
    alone = predicted_speed(records, policy, target)
    longer, longest = (predicted_speed(records, policy, target, [SimpleNamespace(seconds=s)]) for s in (1e-3, 2e-3))
    assert alone > longer > longest
    assert 1 / longest - 1 / longer == pytest.approx(1 / longer - 1 / alone)


def test_alternatives_are_part_of_a_policy():
    own = replace(recipes()["fp8"], name="mine")
    policy = Policy("quartet", where_it_pays=True, alternatives=("fp8", own)).on("lm_head", None)
    assert Policy.from_toml(policy.to_toml()) == policy and Policy.from_dict(policy.to_dict()) == policy
    assert "alternatives=('fp8', 'mine')" in str(policy) and policy.digest() != AUTO.on("lm_head", None).digest()
    assert eval(repr(AUTO)) == AUTO == Policy("quartet", where_it_pays=True, alternatives=["fp8"])
    assert {recipe.name for recipe in recipes_of(AUTO)} == {"quartet", "fp8"}  # whose kernels are in the key
    assert [one.default for one in AUTO.candidates()] == ["quartet", "fp8"]


@pytest.mark.parametrize("arguments, message", [
    ({"alternatives": ("fp8",)}, "where_it_pays=True goes with them"),
    ({"where_it_pays": True, "alternatives": "fp8"}, "alternatives are recipes, such as"),
    ({"where_it_pays": True, "alternatives": ("fp9",)}, "did you mean 'fp8'"),
    ({"where_it_pays": True, "alternatives": ("quartet",)}, "'quartet' is there twice"),
    ({"where_it_pays": True, "alternatives": ("e4m3/16",)}, "'e4m3/16' quantises no matmul"),
    ({"where_it_pays": True, "alternatives": ("fp8", None)}, "recipe 'none' quantises no matmul"),
])
def test_alternatives_that_are_none_are_refused(arguments, message):
    with pytest.raises(PolicyError, match=message):
        Policy("quartet", **arguments)


def test_there_has_to_be_a_default_that_is_weighed():
    with pytest.raises(PolicyError, match="weighs the default recipe, and the default is None"):
        Policy(None, where_it_pays=True)
