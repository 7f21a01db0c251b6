"""What ``where_it_pays`` leaves in the model's dtype, told by explaining small models for a GPU with made-up rates."""

import pytest
import torch
from torch import nn

import quartet
from quartet import Policy, explain, recipes
from quartet.lowering.rates import PASSES, Rates
from quartet.lowering.recipe import ROLES
from quartet.passes import pays

pytest.importorskip("triton")
FREE = Rates("free passes", {"bf16": 1e12, "fp8": 2e12}, {"bf16": 0.0, "fp8": 0.0}, dict.fromkeys(PASSES, 0.0), 0.0)


def casts_at(seconds):
    """Rates under which an FP8 product halves 2·m·n·k / 10¹² s, and its casts take so long an element."""
    return Rates("made up", FREE.flops, FREE.output, {**FREE.passes, "cast": seconds}, 0.0)


def report(policy, tokens=32, width=64, out=96, dtype=torch.bfloat16, model=None):
    model = model or nn.Linear(width, out, bias=False).to(dtype)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    return explain(model, x, options={"policy": policy}, target="sm_90")


@pytest.fixture
def rates(monkeypatch):
    def use(made):
        monkeypatch.setattr(pays, "rates_of", lambda target: made)
    use(FREE)
    return use


@pytest.mark.parametrize("policy, dtype, kernels", [
    ("auto", torch.float32, "'triton'"), ("auto", torch.float16, "'triton'"),
    (Policy("nvfp4", where_it_pays=True), torch.bfloat16, ""),
    (Policy("nvfp4", where_it_pays=True), torch.float32, ""),
    (Policy("int8-all", where_it_pays=True), torch.bfloat16, "'int-mm'"),
    (Policy("fp8-block", where_it_pays=True), torch.float32, ""),
])
def test_a_kernel_without_measurements_is_not_chosen_where_others_have_some(rates, policy, dtype, kernels):
    found = report(policy, dtype=dtype)
    assert {r.kernel for r in found.records} == {None} and {r.role for r in found.records} == set(ROLES)
    for r in found.records:
        assert r.reason.startswith(f"no measured rates for kernel {kernels}")
        assert r.reason.endswith(": name it in a rule")


def test_a_rule_still_takes_it(rates):
    found = report(Policy("tetrajet", where_it_pays=True).on("linear", "tetrajet"), dtype=torch.float32)
    assert None not in {r.kernel for r in found.records}


def test_an_unmeasured_device_still_quantises_everything():
    model, x = nn.Linear(64, 96).bfloat16(), torch.randn(32, 64).bfloat16()
    found = explain(model, x, options={"policy": "auto"}, target="sm_89")
    assert None not in {r.kernel for r in found.records} and not any(r.notes for r in found.records)


@pytest.mark.parametrize("policy", ["auto", Policy("fp8", where_it_pays=True)])
def test_what_pays_says_both_times(rates, policy):
    rates(casts_at(1e-13))
    found = report(policy, 512, 1024, 2048)
    assert None not in {r.kernel for r in found.records}
    for r in found.records:
        (note,) = (n for n in r.notes if n.startswith("predicted "))
        assert note.endswith("µs in the model's dtype, forward and backward")
        quantised, plain = (float(word) for word in note.split() if word.isdigit())
        assert quantised < plain == pytest.approx(6 * 512 * 1024 * 2048 / 1e6, abs=1)
    assert note in str(found)


def test_products_that_share_no_codes_are_decided_one_by_one(rates):
    """At few tokens the weight is what costs: fprop and dgrad cast it, wgrad does not."""
    rates(casts_at(1e-10))
    found = {r.role: r for r in report(Policy("fp8-rowwise", where_it_pays=True), 32, 1024, 1024).records}
    assert {role: r.kernel for role, r in found.items()} == {"fprop": None, "dgrad": None, "wgrad": "cublaslt"}
    product, weight, thin = 2 * 32 * 1024 * 1024 / 1e6, 1024 * 1024 / 1e4, 32 * 1024 / 1e4
    best = 2.5 * product + 2 * thin
    assert found["wgrad"].notes == (f"predicted {best:.0f} µs quantised, {3 * product:.0f} µs in the model's dtype, "
                                    "forward and backward",)
    more = best - product / 2 + weight + thin
    assert found["dgrad"].reason == found["fprop"].reason == (
        f"would not pay: predicted {more:.0f} µs for the layer with it quantised, {best:.0f} µs without, forward and "
        "backward")


def test_products_of_one_set_of_codes_stay_together(rates):
    rates(casts_at(1e-10))
    found = report(Policy("fp8", where_it_pays=True), 32, 1024, 1024)
    assert {r.kernel for r in found.records} == {None}
    assert {r.reason.split(":")[0] for r in found.records} == {"would not pay"}


@pytest.mark.parametrize("name", [name for name, recipe in recipes().items() if recipe.quantizes])
def test_units_are_closed_under_what_backward_reads_of_forward(name):
    recipe = recipes()[name]
    parts = pays.units(recipe, ROLES)
    quantised = [role for role in ROLES if getattr(recipe, role) is not None]
    assert sorted(role for part in parts for role in part) == sorted(quantised)
    for part in parts:
        assert ("fprop" in part) or all(getattr(recipe, role).b.source == "original" for role in part)
        recipe.only(part)  # is a recipe: refused where backward would read codes that are not made


def test_units_of_some_recipes():
    def units(name):
        return [set(part) for part in pays.units(recipes()[name], ROLES)]

    assert units("quartet") == [set(ROLES)] and units("fp8-rowwise") == [{"fprop"}, {"dgrad"}, {"wgrad"}]
    assert units("int8-all") == [{"fprop", "dgrad"}, {"wgrad"}] and units("int8") == [{"fprop", "dgrad"}]


def test_what_leaves_shares_no_cost_any_more(rates):
    """Half of the X of a wide layer is on the account of a narrow one; when that leaves, the wide one has it all."""
    class Net(nn.Module):
        def __init__(self, *outs):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1024, out, bias=False) for out in outs)

        def forward(self, x):
            return sum(layer(x).sum() for layer in self.layers)

    rates(casts_at(1.65e-10))
    policy = Policy("fp8", where_it_pays=True)
    x, w, e, gain = 64 * 1024, 512 * 1024, 64 * 512, 3 * 64 * 1024 * 512 * 1e-12
    assert (x / 2 + w + e) * 1.65e-10 < gain < (x + w + e) * 1.65e-10
    alike = report(policy, 64, 1024, model=Net(512, 512).bfloat16())
    assert {r.kernel for r in alike.records} == {"cublaslt"}
    unlike = report(policy, 64, 1024, model=Net(512, 16).bfloat16())
    assert {r.kernel for r in unlike.records} == {None}


@pytest.mark.parametrize("name", ["quartet", "fp8", "fp8-rowwise", "fp8-delayed", "halo-fp8-2", "mxfp8", "bitnet"])
@pytest.mark.parametrize("sizes", [(64, 64, 96), (4096, 1024, 2048)])
def test_by_the_measured_rates_nothing_slower_is_chosen(name, sizes):
    for r in report(Policy(name, where_it_pays=True), *sizes).records:
        predicted = [note for note in r.notes if note.startswith("predicted ")]
        assert bool(predicted) == (r.kernel is not None)
        for note in predicted:
            quantised, plain = (float(word) for word in note.split() if word.isdigit())
            assert quantised < plain
    assert quartet.recipes()[name].quantizes
