"""What ``where_it_pays`` leaves in the model's dtype, told by explaining small models for a GPU with made-up rates."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from harness import compile_eager
from torch import nn
from torch.utils.checkpoint import checkpoint

import quartet
from quartet import Policy, explain, recipes
from quartet.backend import compile_graph
from quartet.lowering import registry
from quartet.lowering.cost import Cost
from quartet.lowering.rates import PASSES, Rates
from quartet.lowering.recipe.types import ROLES
from quartet.model import trained
from quartet.options import Options
from quartet.passes import pipeline
from quartet.passes.plan import profitability as pays
from quartet.passes.quantize import sum_first
from quartet.runtime.capture import Pretence
from quartet.runtime.devices import Target

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
    (Policy("fp8-block", where_it_pays=True), torch.float32, "'scaled-mm'"),
])
def test_a_kernel_without_measurements_is_not_chosen_where_others_have_some(rates, policy, dtype, kernels):
    found = report(policy, dtype=dtype)
    assert {r.kernel for r in found.records} == {None} and {r.role for r in found.records} == set(ROLES)
    for r in found.records:
        if kernels in ("'int-mm'", "'scaled-mm'"):
            assert r.reason == f"no measured rates for kernel {kernels}: name it in a rule"
        else:
            assert r.reason.startswith(f"would not pay: kernel {kernels}")
            assert r.reason.endswith(" multiplies in the model's dtype here, which saves no time")


@pytest.fixture
def own():
    """A kernel of one's own for every product, of which one costs ``price`` times one in the model's dtype."""
    def add(price, **more):
        def cost(rates, recipe, layer, role):
            return None if price is None else price * rates.product("bf16", *layer.dims(role))

        registry.register(registry.Kernel("own", "", lambda *question: None, price=cost, **more), before="cpp")
    yield add
    registry.unregister("own")


def test_a_registered_kernel_is_chosen_by_its_own_price(rates, own):
    own(0.25)
    found = report(Policy("int8-all", where_it_pays=True), 512, 1024, 1024)
    assert {r.kernel for r in found.records} == {"own"}
    assert {r.notes for r in found.records} == {
        ("predicted 805 µs quantised, 3221 µs in the model's dtype, forward and backward, by rates measured on free "
         "passes",)}


def test_a_registered_kernel_that_is_dearer_than_the_models_dtype_is_left_by_its_own_price(rates, own):
    own(2)
    found = report(Policy("int8-all", where_it_pays=True), 512, 1024, 1024)
    assert {(r.kernel, r.reason) for r in found.records} == {
        (None, "would not pay: predicted 6442 µs quantised, 3221 µs in the model's dtype, forward and backward, by "
               "rates measured on free passes")}


def test_a_registered_kernel_without_a_price_is_named(rates, own):
    own(None)
    found = report(Policy("int8-all", where_it_pays=True))
    assert {(r.kernel, r.reason) for r in found.records} == {
        (None, "no measured rates for kernel 'own': name it in a rule")}


def test_a_rule_still_takes_it(rates):
    found = report(Policy("tetrajet", where_it_pays=True).on("linear", "tetrajet"), dtype=torch.float32)
    assert None not in {r.kernel for r in found.records}


def test_a_gpu_of_which_nothing_is_known_is_left_alone_and_a_cpu_is_not():
    model, x = nn.Linear(64, 96).bfloat16(), torch.randn(32, 64).bfloat16()
    for name, quantises in (("cpu", True), ("gfx950", False)):
        found = explain(model, x, options={"policy": "auto"}, target=name)
        assert {r.kernel is not None for r in found.records} == {quantises}
        assert all(r.reason.startswith(f"no rates of {name}") for r in found.records if not quantises)
        named = explain(model, x, options={"policy": "quartet"}, target=name)
        assert None not in {r.kernel for r in named.records} and not any(r.notes for r in named.records)


@pytest.mark.parametrize("target, possible", [
    (Target("cuda", "sm_75", name="Tesla T4", pretended=True), False), (Target.named("gfx942"), False),
    (Target("cuda", "sm_80", name="an A100's part", pretended=True), True)])
def test_a_reason_names_calibrate_where_that_measures_the_device(monkeypatch, target, possible):
    monkeypatch.setattr(Target, "named", staticmethod(lambda name: target))
    found = report("auto")
    assert all(r.reason.startswith(f"no rates of {target.title}") and r.reason.endswith(pays.HELP) is possible
               for r in found.records)
    assert all(("`quartet calibrate` measures" in note) is possible for note in found.notes if "default" in note)


@pytest.mark.parametrize("policy", [Policy(name, where_it_pays=True) for name in ("quartet", "fp8")])
def test_what_pays_says_both_times(rates, policy):
    rates(casts_at(1e-13))
    found = report(policy, 512, 1024, 2048)
    assert None not in {r.kernel for r in found.records}
    for r in found.records:
        (note,) = (n for n in r.notes if n.startswith("predicted "))
        assert note.endswith("µs in the model's dtype, forward and backward, by rates measured on made up")
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
                                    "forward and backward, by rates measured on made up",)
    more = best - product / 2 + weight + thin
    assert found["dgrad"].reason == found["fprop"].reason == (
        f"would not pay: predicted {more:.0f} µs for the layer with it quantised, {best:.0f} µs without, forward and "
        "backward, by rates measured on made up")


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
            self.elsewhere = nn.ModuleList(nn.Linear(out, 1024) for out in outs)  # else these are heads

        def forward(self, x):
            return sum(layer(x).sum() for layer in self.layers)

    rates(casts_at(1.625e-10))
    policy = Policy("fp8", where_it_pays=True)
    x, w, e, gain = 64 * 1024, 512 * 1024, 64 * 512, 3 * 64 * 1024 * 512 * 1e-12
    assert (x / 2 + w + e) * 1.625e-10 < 0.96 * gain < gain < (x + w + e) * 1.625e-10  # 2 % of all that it takes
    alike = report(policy, 64, 1024, model=Net(512, 512).bfloat16())
    assert {r.kernel for r in alike.records} == {"cublaslt"}
    unlike = report(policy, 64, 1024, model=Net(512, 32).bfloat16())
    assert {r.kernel for r in unlike.records} == {None}


class Branches(nn.Module):
    """Three layers that read one X, and what else may be done with it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.above, self.below = kind, nn.Linear(64, 64), nn.Linear(192, 64)
        self.norm = nn.RMSNorm(64) if kind == "a norm" else nn.Tanh()
        self.layers = nn.ModuleList(nn.Linear(64, out) for out in (64, 32, 96))

    def forward(self, x):
        x = self.norm(self.above(x))
        with torch.autocast("cpu", torch.bfloat16, self.kind == "a cast"):
            y = checkpoint(self.read, x, use_reentrant=False) if self.kind == "all again" else self.read(x)
            return self.below(y) + (x if self.kind == "a residual" else 0)

    def read(self, x):
        one, *others = self.layers
        first = checkpoint(one, x, use_reentrant=False) if self.kind == "one again" else one(x)
        return torch.cat([torch.tanh(y) for y in (first, *(layer(x) for layer in others))], -1)


@pytest.mark.parametrize("kind, summed", [("nothing", True), ("a norm", True), ("all again", True),
                                          ("a residual", False), ("a cast", False), ("one again", False),
                                          ("one left", False), ("without the pass", False)])
def test_gradients_of_one_x_leave_its_basis_at_one_price_where_they_are_added_up_before(monkeypatch, kind, summed):
    """Told alike with backward and without it, of which checkpointing cannot be seen."""
    seen, added, move = [], [], sum_first._move

    def note(recipe, layer, rates):
        seen.append((layer.sharing, layer.summed))
        return Cost(1.0, 2.0)

    def moved(state, add):
        before = len(state.gm.graph.nodes)
        move(state, add)
        added.append(len(state.gm.graph.nodes) > before)

    monkeypatch.setattr(pays, "predict", note)
    monkeypatch.setattr(sum_first, "_move", moved)
    policy = Policy("quartet", where_it_pays=True)
    policy, sharing = (policy.on("layers.1", None), 2) if kind == "one left" else (policy, 3)
    model = Branches(kind).to(torch.float32 if kind == "a cast" else torch.bfloat16)
    x = torch.zeros(32, 64, dtype=model.below.weight.dtype)
    more = {"disable_passes": "sum_first"} if kind == "without the pass" else {}
    priced(model, x, True, policy, **more)
    assert {one for of, one in seen if of > 1} == {summed} and max(seen)[0] == sharing
    assert sum(added) == 2 or not summed
    seen.clear()
    priced(model, x, False, policy, **more)
    assert {one for of, one in seen if of > 1} == {summed or kind == "one again"}


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


class Chain(nn.Module):
    """Square layers with activations between, of which some are frozen."""

    def __init__(self, width, frozen=()):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        for i in frozen:
            self.layers[i].requires_grad_(False)

    def forward(self, x):
        for layer, act in zip(self.layers, (torch.relu, torch.nn.functional.gelu, torch.tanh), strict=True):
            x = act(layer(x))
        return x


def priced(model, x, grad=True, policy="auto", target="sm_90", **more):
    """(module, role) → whether it is quantised in a compilation for a GPU, a Hopper; the records."""
    parsed = Options.parse(options={"policy": policy, **more}, passes=pipeline.OPTIONAL)
    options = replace(parsed, target=Target.named(target))
    records = []

    def compile(gm, inputs):
        return compile_graph(gm, inputs, options, inner_compile=Pretence(), collect=records.extend)

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=compile)(x)
    return {(r.fqn, r.role): r.kernel is not None for r in records}, records


@pytest.mark.parametrize("options, again", [
    ({}, False), ({"memory": "fastest"}, False), ({"recompute": "none"}, False), ({"memory": "recipe"}, True),
    ({"memory": "least"}, True), ({"memory": 0.5}, True), ({"recompute": "gemm"}, True)])
def test_a_product_that_the_default_budget_keeps_is_priced_once(monkeypatch, options, again):
    """Of a product whose result gelu reads in backward, in graphs with backward and without."""
    seen = []
    monkeypatch.setattr(pays, "predict", lambda recipe, layer, rates: seen.append(layer.recompute))
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU()).bfloat16()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            explain(model, bf16(32, 64), options={"policy": Policy("quartet", where_it_pays=True), **options},
                    target="sm_90")
        assert set(seen) == {again}
        seen.clear()


def bf16(tokens, width=1024):
    return torch.zeros(tokens, width, dtype=torch.bfloat16)


@pytest.mark.parametrize("tokens", [64, 2048, 32768])
@pytest.mark.parametrize("name", ["quartet", "fp8", "fp8-rowwise"])
def test_evaluation_and_frozen_layers_get_what_training_gets(tokens, name):
    policy = Policy(name, where_it_pays=True)
    found = [priced(Chain(2048, frozen).bfloat16(), bf16(tokens, 2048), grad, policy)[0]
             for grad in (True, False) for frozen in ((), (0, 1), (2,))]
    for other in found[1:]:
        assert all(found[0][key] == taken for key, taken in other.items() if key in found[0])


def test_a_layer_is_priced_for_the_tokens_that_it_was_first_trained_with(rates):
    rates(casts_at(1e-10))
    model, policy = Chain(1024).bfloat16(), Policy("fp8", where_it_pays=True)
    taken, records = priced(model, bf16(512), policy=policy)
    assert all(taken.values()) and not any("tokens" in r.notes[0] for r in records)
    for tokens, grad in ((32, True), (32, False), (8192, True)):
        taken, records = priced(model, bf16(tokens), grad, policy)
        assert all(taken.values()) and all("of 512 tokens" in r.notes[0] for r in records)
    assert not any(priced(Chain(1024).bfloat16(), bf16(32), policy=policy)[0].values())


def test_training_wins_over_an_earlier_evaluation_and_says_so(rates, recwarn):
    rates(casts_at(1e-10))
    model, policy = Chain(1024).bfloat16(), Policy("fp8", where_it_pays=True)
    assert not any(priced(model, bf16(32), False, policy)[0].values())
    assert not [w for w in recwarn if "decided otherwise" in str(w.message)]
    with pytest.warns(UserWarning, match="3 layers are decided otherwise for training than in the graphs"):
        assert all(priced(model, bf16(512), policy=policy)[0].values())
    recwarn.clear()
    assert all(priced(model, bf16(32), False, policy)[0].values())
    assert not [w for w in recwarn if "decided otherwise" in str(w.message)]


def test_a_look_at_a_model_decides_nothing(rates):
    rates(casts_at(1e-10))
    model, policy = Chain(1024).bfloat16(), Policy("fp8", where_it_pays=True)
    assert not any(r.lowered for r in explain(model, bf16(32), options={"policy": policy}, target="sm_90").records)
    assert all(priced(model, bf16(512), policy=policy)[0].values())
    assert all(r.lowered for r in explain(model, bf16(32), options={"policy": policy}, target="sm_90").records)


def test_a_length_that_changes_keeps_the_decision_and_its_number(rates):
    rates(casts_at(1e-10))
    model, policy = Chain(1024).bfloat16(), Policy("fp8", where_it_pays=True)
    x = bf16(512)
    torch._dynamo.mark_dynamic(x, 0)
    taken, records = priced(model, x, policy=policy)
    assert all(taken.values()) and all("of 512 tokens" in r.notes[0] and isinstance(r.m, str) for r in records
                                       if r.role == "fprop")


def test_memory_holds_no_model(rates):
    model = Chain(64).bfloat16()
    priced(model, bf16(64, 64))
    seen = weakref.ref(model)
    before = len(trained._remembered)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert seen() is None and len(trained._remembered) < before


@pytest.mark.parametrize("call", [
    lambda m, x: F.linear(x, m.w), lambda m, x: x @ m.w.t(), lambda m, x: torch.matmul(x, m.w.mT),
    lambda m, x: torch.einsum("btk,nk->btn", x, m.w), lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w.t()),
    lambda m, x: (m.w @ x.flatten(0, 1).t()).t(), lambda m, x: F.linear(x, m.w.to(torch.float64).float()),
    lambda m, x: checkpoint(F.linear, x, m.w, use_reentrant=False)])
def test_tokens_are_read_from_the_graph_of_dynamo(call):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.zeros(48, 64)), nn.Parameter(torch.zeros(48))

        def forward(self, x):
            return call(self, x)

    found = []

    def backend(gm, inputs):
        found.append(trained.tokens_of(gm, {i: "w" for i, v in enumerate(inputs) if isinstance(v, nn.Parameter)
                                            and v.dim() == 2}))
        return gm

    torch.compile(Model(), backend=backend)(torch.zeros(3, 7, 64))
    assert found == [{"w": 21}]


@pytest.mark.parametrize("evaluation", ["as trained", None])
def test_what_evaluation_computes(evaluation):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(40, 64)
    exact = model(x)
    compiled, backend = compile_eager(model, "quartet", eval=evaluation)
    trained_with = compiled(x)
    assert not torch.equal(trained_with, exact) and {r.kernel is None for r in backend.records} == {False}
    backend.records.clear()
    with torch.no_grad():
        found = compiled(x)
    if evaluation is None:
        torch.testing.assert_close(found, exact)
        assert {r.reason for r in backend.records} == {"evaluation stays in the model's dtype: option eval=None"}
    else:
        assert torch.equal(found, trained_with) and {r.kernel is None for r in backend.records} == {False}
