"""``quartet.suggest``: the errors of what-if and the prices of the cost model, and what follows from them."""

import math
from itertools import product

import pytest
import torch
from gated import Gated, data
from torch import nn

import quartet
from quartet.inspect.suggest import Option, _fastest, _least_error, _parsed

LARGE = {"target": "b200", "scale": 64}


@pytest.fixture(scope="module")
def suggestion():
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), Gated()).bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = quartet.suggest(model, [x.bfloat16() for x in data()], 0.1, **LARGE)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    return found


def test_every_layer_gets_the_fastest_recipe_within_its_error(suggestion):
    assert list(suggestion.chosen) == [f"{i}.{name}" for i in range(2) for name in ("gate", "up", "down")]
    for layer, option in suggestion.chosen.items():
        allowed = [o for o in suggestion.options[layer] if o.error <= 0.1]
        assert option.seconds == min(o.seconds for o in allowed)
        assert {o.recipe for o in suggestion.options[layer]} >= {"bf16", "quartet", "mxfp8"}
        assert ("nvfp4" in {o.recipe for o in suggestion.options[layer]}) == layer.startswith("0."), "it keeps the last"
        assert option.recipe in ("mxfp8", "fp8") and 0 < option.error < 0.1


def test_errors_are_ordered_as_formats_are_and_prices_below_bf16s(suggestion):
    by_recipe = {o.recipe: o for o in suggestion.options["0.up"]}
    assert by_recipe["bf16"].error == 0 < by_recipe["mxfp8"].error < by_recipe["nvfp4"].error < 0.5
    assert max(by_recipe["nvfp4"].seconds, by_recipe["mxfp8"].seconds) < by_recipe["bf16"].seconds
    assert suggestion.uniform("mxfp8").seconds == pytest.approx(sum(
        {o.recipe: o for o in options}["mxfp8"].seconds for options in suggestion.options.values()))
    with pytest.raises(ValueError, match="'fp9' was not measured; did you mean 'fp8'"):
        suggestion.uniform("fp9")
    assert [o.recipe for o in suggestion.uniform("nvfp4").chosen.values()] == ["nvfp4"] * 3 + ["bf16"] * 3


def test_another_budget_measures_nothing_anew(suggestion):
    share = suggestion.uniform("mxfp8").seconds / suggestion.plain_seconds
    mixed = suggestion.within(f"{100 * share + 1e-6}%")
    assert mixed.options is suggestion.options and mixed.error <= suggestion.uniform("mxfp8").error
    assert set(suggestion.within(0.0).policy.rules) == set()


def test_the_policy_says_what_was_chosen(suggestion):
    report = quartet.explain(nn.Sequential(Gated(), Gated()), *data(), options={"policy": suggestion.policy},
                             target="b200")
    assert {r.fqn: r.recipe for r in report.records if r.role == "fprop"} == {
        layer: option.recipe for layer, option in suggestion.chosen.items()}
    assert quartet.Policy.from_toml(suggestion.policy.to_toml()) == suggestion.policy
    assert "b200" in str(suggestion) and "0.up" in str(suggestion)


def test_the_least_error_within_a_time():
    generator = torch.Generator().manual_seed(0)
    names = ("bf16", "a", "b")
    found = {}
    for layer in range(5):
        times, errors = (torch.rand(3, generator=generator).tolist() for _ in range(2))
        found[f"l{layer}"] = [Option("bf16", 1.0, 0.0),
                              *(Option(name, t, e) for name, t, e in zip(names[1:], times, errors, strict=False))]
    for share in (0.5, 0.7, 0.9, 1.0):
        picked = _least_error(found, share)
        all_of_them = [c for c in product(*found.values()) if sum(o.seconds for o in c) <= share * 5 + 1e-12]
        best = min(sum(o.error**2 for o in c) for c in all_of_them)
        assert sum(o.seconds for o in picked.values()) <= share * 5 + 1e-9
        assert sum(o.error**2 for o in picked.values()) == pytest.approx(best, rel=1e-9)
    with pytest.raises(ValueError, match="the fastest takes"):
        _least_error(found, 0.01)
    assert {o.recipe for o in _fastest(found, 0.0).values()} == {"bf16"}


@pytest.mark.parametrize("budget, value", [(0.1, 0.1), ("70%", 0.7), (0, 0.0)])
def test_budgets(budget, value):
    assert math.isclose(_parsed(budget), value)


@pytest.mark.parametrize("budget", ["70", "much", -1, None, True, math.nan, "nan%", "inf%"])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="is none: give the error"):
        _parsed(budget)


def test_a_layer_that_is_called_twice_takes_twice_as_long():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.again(self.again(self.first(x).relu()).relu())

    found = quartet.suggest(Twice(), data(), 1e9, recipes=["mxfp8"], **LARGE)
    (plain, mxfp8), (plain_twice, mxfp8_twice) = (found.options[name] for name in ("first", "again"))
    assert plain_twice.seconds == pytest.approx(2 * plain.seconds)
    assert mxfp8_twice.seconds == pytest.approx(2 * mxfp8.seconds, rel=0.05)
    assert mxfp8_twice.error == pytest.approx(mxfp8.error, rel=0.2), "a mean over its products"


def test_what_cannot_be_suggested():
    with pytest.raises(ValueError, match="data is empty"):
        quartet.suggest(Gated(), [], 0.1, target="h200")
    with pytest.raises(ValueError, match="'gate' is not a number under any of mxfp8: .*not finite"):
        quartet.suggest(Gated(), [x * math.nan for x in data()], 0.1, recipes=["mxfp8"], **LARGE)
    for wrong, said in (({"scale": 0}, "scale is a whole number, 1 or more, not 0"), ({"scale": math.nan}, "not nan"),
                        ({"recipes": []}, "recipes is empty"), ({"recipes": "fp9"}, "unknown recipe 'fp9'"),
                        ({"loss": lambda out: 1.0}, "one number, not float"),
                        ({"loss": lambda out: out}, r"one number, not shape \[")):
        with pytest.raises(ValueError, match=said):
            quartet.suggest(Gated(), data(), 0.1, **{"target": "h200", "recipes": ["mxfp8"]} | wrong)
    for batch in (data()[0], {"x": data()[0]}, 3):
        with pytest.raises(TypeError, match=f"several batches, not one {type(batch).__name__}"):
            quartet.suggest(Gated(), batch, 0.1, target="h200")
    with pytest.raises(TypeError, match="takes a module, not int"):
        quartet.suggest(3, data(), 0.1, target="h200")
    with pytest.raises(ValueError, match="name a GPU"):
        quartet.suggest(Gated(), data(), 0.1)


class Rows:
    """A data set as torch has them: numbers lead to its batches."""

    def __getitem__(self, i):
        return data()[i]


def test_data_may_be_what_is_read_by_number_and_scale_a_whole_float():
    given = (quartet.suggest(Gated(), batches, 0.1, recipes=["mxfp8"], **LARGE | {"scale": scale})
             for batches, scale in ((Rows(), 64.0), (data(), 64)))
    assert len({str(one.policy) for one in given}) == 1
