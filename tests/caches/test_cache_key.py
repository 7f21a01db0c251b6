"""``Pipeline.uuid()``: equal for equal work, different when anything that shapes the graph differs."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

import quartet
from quartet.backend import make_pipeline
from quartet.inspect import Inspector
from quartet.lowering import registry
from quartet.lowering.rates import rates_of
from quartet.lowering.recipe.types import ROLES
from quartet.options import AS_TRAINED, OptionError, Options, _one_of, _switch, option
from quartet.passes import pipeline
from quartet.passes.compilation import Compilation
from quartet.passes.residuals.budget import Budget
from quartet.policy import Policy
from quartet.runtime.devices import Target

MINE = replace(quartet.recipes()["quartet"], name="mine")


def key(options=None, weight_is_parameter=True, name="w"):
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder(name)
    graph.output(graph.call_function(torch.mm, (x, w)))
    weight = torch.randn(64, 64)
    inputs = [torch.randn(32, 64), torch.nn.Parameter(weight) if weight_is_parameter else weight]
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    return make_pipeline(gm, inputs, options or Options()).uuid()


def test_equal_work_has_an_equal_key():
    assert key() == key(Options()) == key(Options(Policy("quartet", where_it_pays=True, alternatives=("fp8",))))
    assert key(Options(Policy(MINE))) == key(Options(Policy(replace(MINE))))


ANOTHER = {  # a value of each field of a compilation other than the one that it has without any options
    "policy": Policy("fp8"), "options": "others", "weights": {1: "v"}, "regions": {("(2, 2) torch.float32",): {0: "v"}},
    "strict": True, "disable_passes": ("share",), "disable_kernels": ("cpp",), "recompute": "gemm",
    "accumulation": "promoted", "reuse_weights": False, "portable_rounding": True, "eval": None,
    "target": Target.named("sm_100a"), "stream": 3, "replayed": True, "autotune": True, "anchor": 7,
    "modules": {"L['self']": "m"}, "widths": frozenset({3}), "written": frozenset({3}), "layers": 9,
    "inputs": {0: "x"}, "priced": True, "rates": "others", "tokens": {"m": 8}, "guessed": {"m": 8}, "answers": "others",
    "threads": 77, "version": "2.13.9", "memory": Budget("least"), "partition": lambda *graph, **kwargs: None,
}
UNKEYED = {"observers": "a graph that somebody watches is in no cache at all"}


def compilation(**options):
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.mm, (graph.placeholder("x"), graph.placeholder("w"))))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    return make_pipeline(gm, [torch.randn(64, 64), torch.nn.Parameter(torch.randn(64, 64))], Options(**options)).config


@pytest.mark.parametrize("name", [f.name for f in fields(Compilation)])
def test_every_field_of_a_compilation_is_in_the_key_or_says_that_it_is_not(name):
    made = compilation() if name != "guessed" else replace(compilation(), priced=True)
    assert getattr(made, name) != ANOTHER.get(name, (made,))
    changed = replace(made, **{name: ANOTHER.get(name, (made,))})
    assert (changed.key() == made.key()) == (name in UNKEYED)
    assert pipeline.Pipeline(changed).uuid() != pipeline.Pipeline(made).uuid()


def test_rates_are_in_the_key_where_they_decide(monkeypatch):
    here, other = (rates_of(Target.named(name)) for name in ("h200", "h100"))
    keys = {}
    for policy in ("fp8", "quartet", Policy(where_it_pays=True)):  # fp8 neither weighs layers nor computes any again
        for rates in (here, other):
            monkeypatch.setattr("quartet.backend.rates_of", lambda target, rates=rates: rates)
            keys[str(policy), rates.device] = key(Options(Policy.coerce(policy), target=Target.named("h200")))
    assert len(set(keys.values())) == 5


def test_the_key_does_not_depend_on_the_order_of_names():
    made = compilation()
    assert replace(made, widths=frozenset({8, 16}), modules={"a": "b", "c": "d"}).key() == replace(
        made, widths=frozenset({16, 8}), modules={"c": "d", "a": "b"}).key()


def test_without_prices_only_batches_below_a_block_decide():
    made = compilation()
    keys = [replace(made, priced=priced, tokens={"m": count}).key()
            for priced in (False, True) for count in (8, 64, 128)]
    assert keys[1] == keys[2] and len(set(keys)) == 5


WITHOUT_A_FIELD = {"open_attention": "compile_graph reads it", "dump": "an observer", "mode": "Inductor's",
                   "inductor": "Inductor's", "inspect": "inspection, what of it shapes a graph",
                   "same_bits": "who runs a graph says it"}
GIVEN = {  # a value of each option other than its default
    "policy": Policy("quartet"), "dump": "graphs", "strict": True, "disable_passes": ("share",),
    "disable_kernels": ("cpp",), "recompute": "none", "target": Target.named("sm_100a"), "mode": "max-autotune",
    "inductor": {"max_autotune": True}, "accumulation": "promoted", "reuse_weights": False, "portable_rounding": True,
    "open_attention": True, "eval": None, "memory": Budget("share", 0.7), "same_bits": (0, 1),
    "inspect": Inspector(what_if=["fp8"]), "check": "finite",
}


@pytest.mark.parametrize("name", [f.name for f in fields(Options)])
def test_every_option_is_in_the_key_and_reaches_the_passes(name):
    given = {name: GIVEN[name]}
    changed, plain = Options(**given), Options()
    assert getattr(changed, name) != getattr(plain, name)
    assert (changed.key() == plain.key()) == (name in ("dump", "mode", "inductor", "same_bits"))
    if name in WITHOUT_A_FIELD:
        assert name not in {f.name for f in fields(Compilation)}
    else:
        assert getattr(compilation(**given), name) == GIVEN[name]
    if name not in ("mode", "same_bits"):
        assert key(changed) != key()


@dataclass(frozen=True)
class More(Options):
    """A package with two more options: each is the one line of its declaration."""

    gentle: bool = option(False, _switch, "be gentle")
    speed: str | None = option("fast", _one_of("fast", "slow", none="take your time"), "how fast")


def test_an_option_is_one_line():
    parsed = More.parse(None, {"gentle": True, "max-autotune": True})
    assert parsed == More(gentle=True, inductor={"max_autotune": True}) and parsed.speed == "fast"
    assert tuple(More.declared()) == (*Options.declared(), "gentle", "speed")
    with pytest.raises(OptionError, match="'gentle' is True or False, not int 1"):
        More.parse(None, {"gentle": 1})
    with pytest.raises(OptionError, match="'slwo'; did you mean 'slow'.*possible: fast, slow, or None to take"):
        More.parse(None, {"speed": "slwo"})
    with pytest.raises(OptionError, match="'gentel'; did you mean 'gentle'.*eval, gentle, speed and any"):
        More.parse(None, {"gentel": True})
    assert len({key(More()), key(More(gentle=True)), key(More(speed=None)), key(More(speed="slow"))}) == 4


def test_the_documentation_lists_every_option():
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    for name, declared in Options.declared().items():
        assert f"`{name}`" in page.partition("## Other options")[2] and declared.metadata["doc"]
    assert Options().eval == AS_TRAINED == Options.declared()["eval"].default


@pytest.mark.parametrize("options", [
    Options(Policy("quartet")),
    Options(Policy("quartet-paper")),
    Options(Policy().on("*.down_proj", None)),
    Options(Policy(MINE)),
], ids=repr)
def test_a_policy_is_in_the_key(options):
    assert key(options) != key()


def test_what_is_dumped_has_no_key_and_so_is_compiled_every_time():
    assert key(Options(dump="graphs")) is None


def test_the_content_of_a_recipe_counts_and_not_its_name():
    assert key(Options(Policy(MINE))) != key(Options(Policy(replace(MINE, keep_weights=False))))


def test_which_inputs_are_parameters_and_their_names_are_in_the_key():
    assert len({key(), key(weight_is_parameter=False), key(name="v")}) == 3


def test_threads_and_the_version_of_torch_are_in_the_key(monkeypatch):
    before = key()
    with monkeypatch.context() as changed:
        changed.setattr(torch, "get_num_threads", lambda: 77)
        assert key() != before
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "2.13.9")
        assert key() != before
    assert key() == before


def test_the_random_stream_of_a_rank_is_not_in_the_key(monkeypatch):
    """Ranks share a compiled graph, and draw from the stream of the process that runs it."""
    before = key()
    monkeypatch.setattr("quartet.runtime.streams.rank", lambda: 3)
    assert key() == key(Options(same_bits=(1, 3))) == before


class Own(CustomGraphPass):
    """A user's pass."""

    def __init__(self, name):
        self.name = name

    def __call__(self, graph):
        pass

    def uuid(self):
        return self.name


def test_a_users_own_pass_is_in_the_key():
    keys = [key(Options(inductor={"joint_custom_pre_pass": own})) for own in (None, Own("a"), Own("b"), Own("b"))]
    assert keys[0] == key() and len(set(keys)) == 3 and keys[2] == keys[3]


ROOT = Path(pipeline.__file__).parents[1]
SOURCES = ["passes/quantize/share.py", "passes/pipeline.py", "lowering/ir/ops/core.py", "lowering/targets/inductor.py",
           "runtime/compat.py", "kernels/reference/quantize.py", "kernels/spec.py", *(
               str(path.relative_to(ROOT)) for path in sorted((ROOT / "kernels/cpu").glob("*.cpp")))]


@pytest.mark.parametrize("source", SOURCES)
def test_an_edited_source_file_changes_the_key(monkeypatch, source):
    before, edited, read = key(), (ROOT / source).resolve(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"\n" * (path.resolve() == edited))
    pipeline.source_digest.cache_clear()
    try:
        assert key() != before
    finally:
        monkeypatch.undo()
        pipeline.source_digest.cache_clear()
    assert key() == before


def test_the_key_of_a_process_is_computed_from_files_once(monkeypatch):
    before = key()

    def refuse(path):
        raise AssertionError(f"read {path} again")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert key() == before


def kernels_and_key(recipe, kind="cpu"):
    """(the kernels that a layer's products get, the key) under a policy here; a target that will run."""
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.mm, (graph.placeholder("x"), graph.placeholder("w"))))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    inputs = [torch.randn(64, 64), torch.nn.Parameter(torch.randn(64, 64))]
    options = Options(Policy(recipe))
    gemms = [gemm for role in ROLES if (gemm := getattr(quartet.recipes()[recipe], role)) is not None]
    pairs = [tuple((side.spec, gemm.rotation.n if gemm.rotation else 0) for side in (gemm.a, gemm.b)) for gemm in gemms
             if gemm.a.spec is not None]
    target = Target("cpu") if kind == "cpu" else Target("cuda", "sm_100")
    kernels = [kernel and kernel.name for pair in pairs for dtype in registry.QUANTIZED
               for kernel in [registry.choose(target, dtype, pair)[0]]]
    return kernels, make_pipeline(gm, inputs, replace(options, target=None if kind == "cpu" else target)).uuid()


def no(*arguments):
    return "not here"


FACTS = {
    "no compiler of C++": ("cpu", "quartet.kernels.cpu.ops.unavailable", no),
    "no VNNI": ("cpu", "torch.cpu.get_capabilities", dict),
    "no nvcc, headers or objects": ("cuda", "quartet.kernels.cutlass.build.unready", no),
    "no Triton": ("cuda", "quartet.lowering.targets.triton_quantizers.without_triton", no),
    "no GPU": ("cuda", "quartet.runtime.devices.Target.lacks", no),
}


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("recipe", sorted(quartet.recipes()))
def test_what_a_choice_of_kernels_rests_on_here_is_in_the_key(monkeypatch, recipe, fact):
    kind, question, answer = FACTS[fact]
    monkeypatch.setattr("quartet.kernels.cpu.ops.unavailable", lambda: None)
    monkeypatch.setattr("quartet.kernels.cutlass.build.unready", lambda *arguments: None)
    monkeypatch.setattr("quartet.lowering.targets.triton_quantizers.without_triton", lambda target: None)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_vnni": True})
    kernels, before = kernels_and_key(recipe, kind)
    assert kernels_and_key(recipe, kind) == (kernels, before)
    monkeypatch.setattr(question, answer)
    others, after = kernels_and_key(recipe, kind)
    assert others == kernels or after != before


def test_what_a_kernel_of_ones_own_asks_the_machine_is_in_the_key():
    here = True
    own = registry.Kernel("mine", "", lambda target, dtype, spec, rotation: None if here else "not here")
    registry.register(own, before="cpp")
    try:
        there = registry.answers([Target("cpu")], [quartet.recipes()["quartet"].fprop])
        here = False
        assert registry.answers([Target("cpu")], [quartet.recipes()["quartet"].fprop]) != there
    finally:
        registry.unregister("mine")


def test_a_kernel_that_is_switched_off_or_never_wanted_is_not_asked_for(monkeypatch):
    def build():
        raise AssertionError("asked for")

    monkeypatch.setattr("quartet.kernels.cpu.ops.unavailable", build)
    for options in (Options(Policy("bf16")), Options(Policy("fp8")), Options(disable_kernels=("cpp",))):
        assert key(options)
    specs = tuple((side.spec, 32) for side in (MINE.fprop.a, MINE.fprop.b))
    kernel, reasons = registry.choose(Target("cpu"), torch.float32, specs, ("cpp",))
    assert kernel.name == "inductor" and reasons["cpp"] == "disabled: disable_kernels names 'cpp'"
