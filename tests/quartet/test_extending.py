"""docs/extending.md, run: a recipe, a format, an op class, a kernel and a pass from files of a user's own."""

import importlib
import importlib.util
import re
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import quartet
from quartet import Policy, PolicyError, QuantSpec, SpecError, register_pass
from quartet.backend import compile_graph
from quartet.extend import (
    Element,
    ExtensionError,
    Kernel,
    register_element,
    register_kernel,
    register_op_class,
    unregister_element,
    unregister_kernel,
    unregister_op_class,
    unregister_pass,
)
from quartet.kernels import extension, reference
from quartet.kernels.element import ELEMENTS, decode, encode
from quartet.lowering import ir, registry
from quartet.lowering.ir.graph import aten, shape
from quartet.lowering.recipe.op_classes import op_classes
from quartet.lowering.recipe.types import ROLES
from quartet.options import OptionError, Options
from quartet.passes import pipeline
from quartet.passes.compilation import Compilation
from quartet.passes.sites import Decided, Found, Planned, Quantized
from quartet.runtime.capture import Capture

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
FILES = {re.match(r"# (\w+)\.py", block)[1]: block for block in PYTHON if block.startswith("# ")}
USES = [block for block in PYTHON if not block.startswith("# ")]
UNREGISTER = {"element": unregister_element, "op class": unregister_op_class, "kernel": unregister_kernel,
              "pass": unregister_pass}


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """Every test starts, and leaves, with what is built in."""
    assert not extension._added
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(importlib.import_module("quartet.recipes"), "_registered", {})
    yield
    for kind, name in list(extension._added):
        UNREGISTER[kind](name)


@pytest.fixture
def load(tmp_path):
    """Import a file of the page, by its name."""
    def load(name, more=""):
        path = tmp_path / f"{name}.py"
        path.write_text(FILES[name] + more, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


def execute(block):
    """The names that a block of the page defines."""
    names = {}
    exec(compile(block, "docs/extending.md", "exec"), names)
    return names


def classes_and_kernels(report):
    return {(row["fqn"], row["role"]): (row["op_class"], row["kernel"]) for row in report.to_dict()["matmuls"]}


def compile_eager(model, **options):
    """The compiled model, its graphs run eagerly, and the pipelines that made them."""
    parsed = Options.parse(None, options, passes=pipeline.OPTIONAL, kernels=registry.NAMES)
    records, capture = [], Capture()
    backend = partial(compile_graph, options=parsed, inner_compile=capture, collect=records.extend)
    return torch.compile(model, backend=lambda gm, inputs: backend(gm, inputs)), records, capture


def train(policy, steps=60):
    """Losses of a small regression under a policy; None is high precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    x = torch.randn(128, 64)
    target = torch.tanh(x @ torch.randn(64, 64) / 8)
    compiled, records, capture = compile_eager(model, policy=Policy(policy))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = (compiled(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, records


def test_the_page_has_its_files():
    assert list(FILES) == ["hybrid", "mxfp6", "adapters", "mine", "unrotate", "probe"] and len(USES) == 4


# --- a recipe --------------------------------------------------------------------------------------------------------

def test_recipe(load, capsys):
    recipe = load("hybrid").hybrid
    names = execute(USES[0])
    found = classes_and_kernels(names["report"])
    assert {fqn for (fqn, _), (_, kernel) in found.items() if kernel} == {"body"}
    assert "hybrid" in capsys.readouterr().out
    again = Policy.from_toml(names["policy"].to_toml())
    assert again == names["policy"] and again.default == recipe
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert Policy.from_toml(toml) == names["policy"]


def test_recipe_trains(load):
    load("hybrid")
    losses, records = train("hybrid")
    assert losses[-1] < 0.35 * losses[0] and losses != train(None)[0]
    assert {r.role for r in records if r.lowered} == set(ROLES)


# --- a format --------------------------------------------------------------------------------------------------------

def test_element_is_mxfp6(load):
    module = load("mxfp6")
    values = module.decode(torch.arange(64, dtype=torch.uint8))
    published = np.arange(64, dtype=np.uint8).view(ml_dtypes.float6_e2m3fn).astype(np.float32)
    assert np.array_equal(values.numpy(), published)
    x = torch.cat((torch.randn(4096) * 3, values, (values[:31] + values[1:32]) / 2)).clamp(-7.5, 7.5)
    assert np.array_equal(module.encode(x).numpy(), x.numpy().astype(ml_dtypes.float6_e2m3fn).view(np.uint8))


@pytest.mark.parametrize("text", [
    "e2m3/32 e8m0 ceil nearest", "e2m3/16 e8m0 floor nearest mask", "e2m3/row fp32 amax nearest",
    "e2m3/tensor fp32 amax_pow2 nearest", "e2m3/16x16 fp32 amax nearest", "e2m3/128 fp32 amax nearest"])
def test_a_registered_element_goes_with_all_scales(load, text):
    load("mxfp6")
    spec = QuantSpec.parse(text)
    assert str(spec) == text and (spec.bits, spec.max, spec.packed) == (6, 7.5, False)
    x = torch.randn(48, 100)
    codes, scales, mask = torch.ops.quartet.quantize(x, text, None, 0)
    assert codes.dtype is torch.uint8 and codes.shape[0] == 48 and codes.shape[1] >= 100
    assert mask.numel() == (codes.numel() // 8 if spec.mask else 0)
    values = torch.ops.quartet.dequantize(codes, scales, text, torch.float32)
    error = (values[:, :100] - x).norm() / x.norm()
    assert 0.01 < error < 0.06  # 3 mantissa bits
    product = torch.ops.quartet.scaled_mm(codes, scales, codes, scales, text, text, torch.float32)
    torch.testing.assert_close(product, values @ values.t(), rtol=1e-4, atol=1e-4)


def test_recipe_of_a_registered_element_trains(load):
    load("mxfp6")
    losses, records = train("mxfp6")
    high = train(None)[0]
    assert losses[-1] < 0.35 * losses[0] and abs(losses[-1] - high[-1]) < 0.1 * high[0] and losses != high
    assert {(r.role, r.kernel) for r in records if r.lowered} == {(role, "inductor") for role in ROLES}


def test_a_registered_element_keeps_its_codes_for_backward(load):
    """What forward saved is read as what it is, by kernels that know packed codes only."""
    load("mxfp6")
    mx = quartet.Operand(QuantSpec.parse("e2m3/32 e8m0 ceil nearest"))
    fp4 = quartet.Operand(QuantSpec.parse("e2m1/32 e8m0 ceil nearest"))
    saved = quartet.Operand(fp4.spec, "saved")
    recipe = quartet.Recipe("both", fprop=quartet.Gemm(mx, mx), dgrad=quartet.Gemm(fp4, saved),
                            wgrad=quartet.Gemm(fp4, saved))
    model, x = nn.Linear(64, 64), torch.randn(64, 64, requires_grad=True)
    compiled, records, _ = compile_eager(model, policy=Policy(recipe))
    compiled(x).backward(torch.eye(64))
    assert len(records) == 3 and all(r.lowered for r in records)
    values = [reference.dequantize(*reference.quantize(t.detach(), mx.spec)[:2], mx.spec) for t in (model.weight, x)]
    again = [reference.dequantize(*reference.quantize(v.t(), fp4.spec)[:2], fp4.spec).t() for v in values]
    torch.testing.assert_close(x.grad, again[0])
    torch.testing.assert_close(model.weight.grad, again[1])


def test_through_inductor(load):
    """The functions of a format are traced into the code that Inductor makes of the reference."""
    load("mxfp6")
    model, x = nn.Linear(64, 32), torch.randn(48, 64)
    eager = compile_eager(model, policy="mxfp6")[0](x)
    torch._dynamo.reset()
    made = torch.compile(model, backend="quartet", options={"policy": "mxfp6"})(x)
    torch.testing.assert_close(made, eager, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(made, model(x), rtol=1e-5, atol=1e-5)


def test_names_of_elements():
    with pytest.raises(SpecError, match="element 'e2m3' does not exist; possible: e2m1, e4m3, e5m2, int8, ternary$"):
        QuantSpec("e2m3")
    whole = Element("int4", 4, 7.0, torch.int8)
    assert register_element(whole) is whole and register_element(whole) is whole
    with pytest.raises(SpecError, match="possible: e2m1, e4m3, e5m2, int8, ternary, int4"):
        QuantSpec("e2m3")
    with pytest.raises(SpecError, match="int4 has no 'e8m0' scales"):
        QuantSpec("int4")
    with pytest.raises(PolicyError, match="possible: .*int4"):
        Policy.from_toml('default = "a"\n[recipe.a]\nfprop = {a = "int3/row fp32 amax nearest", b = "int4/row"}')
    codes = encode(torch.tensor([-9.0, -0.5, 1.5, 2.5, 9.0]), whole)
    assert codes.tolist() == [-7, 0, 2, 2, 7] and decode(codes, whole).dtype is torch.float32
    spec = QuantSpec.parse("int4/row fp32 amax nearest")
    unregister_element("int4")
    with pytest.raises(SpecError, match="'int4' does not exist"):
        QuantSpec.parse(str(spec))
    with pytest.raises(SpecError, match="element 'int4' of quantiser .* is not registered in this process; import"):
        _ = spec.max
    with pytest.raises(ExtensionError, match="no element 'int4' is registered; registered: none"):
        unregister_element("int4")
    assert list(ELEMENTS) == ["e2m1", "e4m3", "e5m2", "int8", "ternary"]


def third(x):
    return torch.where(x.abs() < 0.5, 0, torch.where(x > 0, 1, 2)).to(torch.uint8)


def three(codes):
    return torch.tensor([0.0, 1.1, -1.1, 0.0])[codes.int()]


@pytest.mark.parametrize("fields, message", [
    ({"name": "e4m3"}, "element 'e4m3' is built in; give yours another name, for example 'my_e4m3'"),
    ({"name": "E2M3"}, "'E2M3' is not possible: use lower-case"),
    ({"bits": 9}, "bits=9 is not possible; use 2 to 8"),
    ({"max": 8}, "max=8 is not possible; use a finite float"),
    ({"max": 8.0, "emax": 3}, r"largest value of its 64 codes, up to max=8\.0, is 7\.5, and has to be max itself"),
    ({"max": 7.0}, r"encode is to nearest and saturates, but -10\.5 becomes -7\.5"),
    ({"emax": 3}, r"emax=3 is not the exponent of max=7\.5; use 2, or None"),
    ({"storage": torch.int16}, "not stored as torch.int16; possible: torch.uint8"),
    ({"packed": True}, "packed in e2m1 only"),
    ({"decode": None}, "one of encode and decode; give both or neither"),
    ({"encode": lambda x: third(x)}, "encode is to nearest and saturates, but .* becomes"),
    ({"decode": lambda codes: codes}, "decode is elementwise from torch.uint8 to float32"),
    ({"encode": third, "decode": three, "bits": 2, "max": 1.100000023841858, "emax": 0}, "no bfloat16 number"),
    ({"encode": lambda x: x}, "encode is elementwise from float32 to torch.uint8; it gave torch.float32"),
])
def test_elements_that_are_refused(load, fields, message):
    module = load("mxfp6")
    unregister_element("e2m3")
    good = {"name": "mine", "bits": 6, "max": 7.5, "storage": torch.uint8, "emax": 2, "encode": module.encode,
            "decode": module.decode}
    with pytest.raises(ExtensionError, match=message):
        register_element(Element(**good | fields))
    assert not extension._added and "mine" not in ELEMENTS


# --- an op class -----------------------------------------------------------------------------------------------------

def test_op_class(load):
    load("adapters")
    names = execute(USES[1])
    skipped, named = (classes_and_kernels(names[name]) for name in ("skipped", "named"))
    assert {fqn: op for (fqn, _), (op, _) in skipped.items()} == {"base": "linear", "down": "lora", "up": "lora"}
    assert {fqn for (fqn, _), (_, kernel) in skipped.items() if kernel} == {"base"}
    quantised = {at for at, (_, kernel) in named.items() if kernel}
    assert quantised == {("down", "fprop"), ("up", "fprop"), ("base", "fprop"), ("base", "wgrad")}
    reasons = [row["reason"] for row in names["skipped"].to_dict()["matmuls"] if row["op_class"] == "lora"]
    assert set(reasons) == {"recipe 'fp8' leaves lora in high precision unless a rule names it"}


def test_op_class_in_policies(load):
    with pytest.raises(PolicyError, match="unknown op class 'lora'; possible: linear, .*saved, attention$"):
        Policy("fp8").on("*", "fp8", op="lora")
    module_rule = Policy("fp8").on("lora", None)
    load("adapters")
    policy = Policy("fp8").on("lora", "mxfp8").on(recipe="fp8", shape="k > 4")
    assert Policy.from_toml(policy.to_toml()) == policy and policy.rules[0].op == "lora"
    assert Policy.from_toml(module_rule.to_toml()) == module_rule and 'pattern = "fqn:lora"' in module_rule.to_toml()
    assert policy.resolve("lora", "a.b", 8, 8, 64).fprop.recipe.name == "mxfp8"  # a rule without a name is not about it
    with pytest.raises(PolicyError, match="unknown op class 'lorra'; did you mean 'lora'"):
        Policy("fp8").on("*", "fp8", op="lorra")
    assert "lora" in op_classes()
    unregister_op_class("lora")
    with pytest.raises(PolicyError, match="unknown op class 'lora'"):
        Policy.from_toml(policy.to_toml().replace("pattern", "op"))


@pytest.mark.parametrize("register, said", [
    (lambda: register_element("int4"), "expected a quartet.extend.Element, not str 'int4'"),
    (lambda: register_kernel("mine"), "expected a quartet.extend.Kernel, not str 'mine'"),
    (lambda: register_op_class("wide", "n > k"), "op class 'wide': the predicate is a function .* not str"),
])
def test_what_is_no_addition_is_refused(register, said):
    with pytest.raises(ExtensionError, match=said):
        register()


def test_op_classes_that_are_refused():
    for name, message in (("linear", "op class 'linear' is built in"), ("attention", "'attention' is built in"),
                          ("a*", "is not possible"), (3, "3 is not possible")):
        with pytest.raises(ExtensionError, match=message):
            register_op_class(name, bool)
    register_op_class("wide", bool)
    register_op_class("wide", bool)
    with pytest.raises(ExtensionError, match=r"registered already.*unregister_op_class\('wide'\)"):
        register_op_class("wide", callable)


def test_a_failing_predicate_says_whose_it_is():
    register_op_class("odd", lambda site: site.nothing)
    with pytest.raises(Exception, match=r"predicate of op class 'odd' failed on .* \(m=4 n=24 k=8\): AttributeError"):
        compile_eager(nn.Linear(8, 24), policy="fp8")[0](torch.randn(4, 8))


def test_predicates_see_structure_and_the_first_counts():
    seen = []

    def second(site):
        seen.append((site.fqn, shape(site.products["fprop"].node)))
        return site.fqn == "1"

    register_op_class("second_layer", second)
    register_op_class("all_layers", lambda site: site.op_class == "linear")
    run, records, _ = compile_eager(nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8)), policy="fp8")
    run(torch.randn(4, 8))
    assert [(r.fqn, r.op_class) for r in records if r.role == "fprop"] == [("0", "all_layers"), ("1", "second_layer")]
    assert seen == [("0", (4, 24)), ("1", (4, 8))]


# --- a kernel --------------------------------------------------------------------------------------------------------

def test_kernel(load):
    load("mine")
    assert registry.NAMES.index("mine") == registry.NAMES.index("inductor") - 1
    names = execute(USES[2])
    assert {kernel for _, kernel in classes_and_kernels(names["chosen"]).values()} == {"mine"}
    assert {kernel for _, kernel in classes_and_kernels(names["without"]).values()} == {"inductor"}
    assert "mine" in str(names["chosen"])
    rows = {(format, kernel): reason for format, kernel, reason in registry.probe(torch.device("cpu"))}
    assert rows["mx e4m3", "mine"] is None and rows["mx e5m2", "mine"].startswith("multiplies MXFP8 of E4M3, not 'e5m2")
    with pytest.raises(OptionError, match="unknown kernel 'mien'; did you mean 'mine'"):
        compile_eager(nn.Linear(8, 8), disable_kernels="mien")


def test_kernel_computes_the_same(load):
    load("mine")
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    x, results = torch.randn(64, 64), []
    for disabled in ((), ("mine",)):
        torch._dynamo.reset()
        model.zero_grad()
        compiled, records, capture = compile_eager(model, policy="mxfp8", disable_kernels=disabled)
        loss = compiled(x).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        ops = [str(n.target) for gm in capture.graphs for n in gm.graph.nodes]
        assert ops.count("mine.matmul.default") == (0 if disabled else 5)
        assert ops.count("quartet.scaled_mm.default") == (5 if disabled else 0)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_kernels_that_are_refused():
    for name, before, message in (("cpp", "inductor", "kernel 'cpp' is built in"),
                                  ("grouped-mm", "cpp", "is not possible"), ("reference", "cpp", "is built in"),
                                  ("mine", "inducter", "no kernel 'inducter' to stand before; did you mean 'indu")):
        with pytest.raises(ExtensionError, match=message):
            register_kernel(Kernel(name, "", lambda *a: None), before=before)
    assert registry.NAMES[-2:] == ("inductor", "grouped-mm") and not extension._added
    kernel = Kernel("mine", "", lambda *a: "never")
    assert register_kernel(kernel) is kernel and register_kernel(kernel) is kernel
    with pytest.raises(ExtensionError, match=r"registered already.*unregister_kernel\('mine'\)"):
        register_kernel(Kernel("mine", "another", lambda *a: "never"))


# --- a pass ----------------------------------------------------------------------------------------------------------

def test_pass(load, tmp_path, monkeypatch):
    probe = load("probe")
    monkeypatch.chdir(tmp_path)
    assert pipeline.NAMES.index("probe_gradients") == pipeline.NAMES.index("plan") + 1
    names = execute(USES[3])
    kernels = [classes_and_kernels(names[report]) for report in ("probed", "without")]
    assert kernels[0] == kernels[1] and all(kernel for _, kernel in kernels[0].values())
    assert list((tmp_path / "graphs").rglob("*probe_gradients*"))
    with pytest.raises(OptionError, match="unknown pass 'probe_gradient'; did you mean 'probe_gradients'"):
        compile_eager(nn.Linear(8, 8), disable_passes="probe_gradient")
    probe.LARGEST.clear()
    train("mxfp8", steps=1)
    assert set(probe.LARGEST) == {"0", "2"} and all(0 < largest < 1 for largest in probe.LARGEST.values())


@pytest.mark.parametrize("policy", ["mxfp8", "quartet", "fp8"])
def test_a_probe_changes_no_number(load, policy):
    plain, _ = train(policy, steps=3)
    load("probe")
    assert train(policy, steps=3)[0] == plain


def clip(stage):
    """What quantisers of E read, clamped to eight times its mean magnitude."""
    for site in stage.at(Quantized):
        for e in [stage.current(gemm.a) for role, gemm in site.gemms.items() if role != "fprop"]:
            for quantizer in [user for user in e.users if user.target is ir.QUANTIZE]:
                build = stage.build(before=quantizer)
                limit = build(aten.mul.Tensor, build(aten.mean.default, build(aten.abs.default, e)), 8.0)
                clipped = build(aten.maximum.default, e, build(aten.neg.default, limit))
                quantizer.replace_input_with(e, build(aten.minimum.default, clipped, limit))


def test_pass_in_the_quantised_graph():
    register_pass(clip)
    x, results = torch.randn(32, 64), []
    e = torch.randn(32, 64)
    e[3, 5] = 1e4
    for disabled in ((), ("clip",)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        compiled, records, capture = compile_eager(model, policy="mxfp8", disable_passes=disabled)
        compiled(x).backward(e)
        ops = [str(n.target) for gm in capture.graphs for n in gm.graph.nodes]
        assert ("aten.minimum.default" in ops) == (not disabled) and all(r.lowered for r in records)
        results.append((model.weight.grad, model.bias.grad))
    (clipped, bias), (whole, same) = results
    others = torch.arange(64) != 5
    assert torch.equal(bias, same) and torch.equal(clipped[others], whole[others])
    assert clipped[5].abs().max() < whole[5].abs().max() / 2


def test_passes_see_sites_in_the_phase_of_their_place():
    seen = {}

    def before(stage):
        seen["plan"] = [type(site) for site in stage.sites]

    def later(stage):
        seen["lower"] = [type(site) for site in stage.at(Found)]
        seen["products"] = len(stage.graph.find_nodes(op="call_function", target=ir.SCALED_MM))

    register_pass(later, after="lower")
    register_pass(before, after="plan")
    run, _, _ = compile_eager(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), policy=Policy("fp8").on("1", None))
    run(torch.randn(32, 64))
    assert seen["plan"] == [Planned, Decided]
    assert seen["lower"] == [Quantized, Decided] and seen["products"] == 2


def test_passes_run_in_the_order_in_which_they_were_registered():
    def first(stage): ...
    def second(stage): ...
    def third(stage): ...

    before = pipeline.PASSES
    for function in (first, second):
        assert register_pass(function, after="share") is register_pass(function, after="share") is function
    register_pass(third, after="first")
    at = pipeline.NAMES.index("share")
    assert pipeline.NAMES[at:at + 4] == ("share", "first", "second", "third")
    assert set(pipeline.OPTIONAL) > {"first", "second", "third"}
    with pytest.raises(ExtensionError, match=r"registered already.*unregister_pass\('first'\)"):
        register_pass(first, after="save")
    for name in ("first", "second", "third"):
        unregister_pass(name)
    assert pipeline.PASSES == before and "first" not in pipeline.OPTIONAL


def test_passes_that_are_refused():
    def share(stage): ...
    def mine(stage): ...

    for function, after, message in ((share, "quantize", "pass 'share' is built in"),
                                     (lambda stage: None, "quantize", "'<lambda>' is not possible"),
                                     (mine, "quantise", "no pass 'quantise' to come after; did you mean 'quantize'")):
        with pytest.raises(ExtensionError, match=message):
            register_pass(function, after=after)
    assert not extension._added


@pytest.mark.parametrize("fail", [lambda stage: stage.nothing,
                                  lambda stage: stage.graph.erase_node(next(iter(stage.graph.nodes)))])
def test_a_failing_pass_says_whose_it_is(fail):
    def odd(stage):
        fail(stage)

    register_pass(odd, after="plan")
    with pytest.raises(Exception, match="pass 'odd' failed: (AttributeError|RuntimeError): "):
        compile_eager(nn.Linear(64, 64), policy="fp8")[0](torch.randn(32, 64))


# --- the key of the caches -------------------------------------------------------------------------------------------

def key():
    return pipeline.Pipeline(Compilation(Policy("fp8"))).uuid()


@pytest.mark.parametrize("name", ["mxfp6", "adapters", "mine", "probe"])
def test_what_is_registered_is_in_the_key(load, name):
    before = key()
    load(name)
    registered = key()
    assert None not in (before, registered) and registered != before
    for kind, added in list(extension._added):
        UNREGISTER[kind](added)
    assert key() == before
    load(name, "\n# another source\n")
    assert key() not in (None, before, registered)


def test_functions_that_hold_values_keep_graphs_out_of_the_caches():
    limit = 16
    for predicate in (lambda site: site.n < limit, eval("lambda site: False"), lambda site, most=16: site.n < most,
                      bool):
        register_op_class("narrow", predicate)
        assert key() is None
        unregister_op_class("narrow")
    register_op_class("narrow", lambda site: site.n < 16)
    assert key() is not None


def test_a_provider_of_an_op(load):
    from quartet.lowering.ir.ops.fused import unrotate

    module = load("unrotate")
    try:
        assert [provider.name for provider in unrotate.providers] == ["triton", "plain", "cpp", "reference"]
        x = torch.randn(8, 64)
        found = unrotate(x, None, 32, None, 0.5, 60, torch.float32)
        assert torch.equal(found, module.unrotate(x, None, 32, None, 0.5, 60, torch.float32))
        assert "unrotate.plain" in registry.disableable()
    finally:
        unrotate.withdraw("plain")
    assert [provider.name for provider in unrotate.providers] == ["triton", "cpp", "reference"]
