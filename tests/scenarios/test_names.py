"""Layers are called as in ``named_modules()`` of what was compiled, whatever way a graph reaches them."""

import warnings
from functools import partial

import pytest
import torch
from harness import compile_eager, eager_backend
from torch import nn
from torch.nn.utils import prune

import quartet
from quartet import Policy
from quartet.backend import make_pipeline
from quartet.model import names
from quartet.options import Options
from quartet.passes.naming import module_path, parameter_path

WIDTH = 32


def linear(fan_in=WIDTH, fan_out=WIDTH):
    return nn.Linear(fan_in, fan_out)


def x(rows=16):
    return torch.randn(rows, WIDTH)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.ff = linear(), nn.Sequential(nn.ReLU(), linear())

    def forward(self, x):
        return self.ff(self.up(x))


class Eager(nn.Module):
    """A module that dynamo does not look into."""

    def __init__(self):
        super().__init__()
        self.fc = linear()

    @torch.compiler.disable
    def forward(self, x):
        return self.fc(x)


class Broken(nn.Module):
    """The second layer lies on the stack while the eager module runs: nothing in the graph says where it is from."""

    def __init__(self):
        super().__init__()
        self.first, self.eager, self.last = linear(), Eager(), Block()

    def forward(self, x):
        return self.last(self.eager(self.first(x)))


class BrokenBlock(Block):
    def forward(self, x):
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.ff(x)


class Stack(nn.Module):
    def __init__(self, block=Block, count=3):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Forwarding(nn.Module):
    """A wrapper through which one reaches the attributes of what it holds."""

    def __init__(self, inner):
        super().__init__()
        self.base = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x):
        return self.base(self.up(x))


class Keys(nn.Module):
    def __init__(self, keys):
        super().__init__()
        self.of = nn.ModuleDict({key: linear() for key in keys})

    def forward(self, x):
        for key in self.of:
            x = self.of[key](x)
        return x


class Trainer:
    """An object that holds its model and is no module itself."""

    def __init__(self, model):
        self.network, self.all = model, [model]

    def step(self, x):
        return self.network(x)

    def first(self, x):
        return self.all[0](x)


def seen(run, *inputs, **options):
    """Names of all products in the graphs of one call."""
    compiled, backend = compile_eager(run, "fp8", fullgraph=False, **options)
    compiled(*inputs)
    return {r.fqn for r in backend.records}


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


BLOCK = {"up", "ff.1"}


def test_a_layer_on_the_stack_after_a_graph_break():
    model = Broken()
    assert seen(model, x()) == linears(model) - {"eager.fc"}


def test_a_block_whose_own_forward_breaks():
    assert seen(Stack(BrokenBlock, 1), x()) == {"blocks.0.up", "blocks.0.ff.1"}


def test_a_wrapper_that_forwards_attributes():
    model = Forwarding(Block())
    assert seen(model, x()) == linears(model)


def test_keys_that_are_no_identifiers():
    model = Keys(["it's", 'a "b" c', "x[0]", "µ"])
    assert seen(model, x()) == linears(model)


@pytest.mark.parametrize("hook", (partial(prune.l1_unstructured, name="weight", amount=0.5), nn.utils.weight_norm,
                                  nn.utils.spectral_norm))
def test_a_weight_that_an_older_hook_computes(hook):
    model = Block()
    hook(model.up)
    assert seen(model, x()) == linears(model)
    report = quartet.explain(model, x(), options={"policy": Policy(None).on("up", "fp8")})
    assert {r.fqn for r in report.records if r.lowered} == {"up"}
    assert not any("take no part" in note for note in report.notes)


GLOBAL = Block()


def of_global(x):
    return GLOBAL(x)


def of_passed(anything, x):
    return anything(x)


def of_closed_over(model):
    return lambda x: model(x)


@pytest.mark.parametrize("run, inputs", [
    (of_global, ()), (of_passed, (Block(),)), (of_closed_over(Block()), ()),
    (Trainer(Block()).step, ()), (Trainer(Block()).first, ()), (Block().forward, ()),
], ids=["global", "passed", "closed over", "attribute", "in a list", "method"])
def test_functions_and_methods(run, inputs):
    assert seen(run, *inputs, x()) == BLOCK


def hooked(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    layer.register_forward_hook(lambda module, args, out: out * 2)
    return layer


BARE = [linear(), hooked(linear()), nn.Conv2d(WIDTH, WIDTH, 3), nn.Embedding(9, WIDTH)]


def given_to(layer):
    if isinstance(layer, nn.Embedding):
        return torch.arange(6)
    return x() if isinstance(layer, nn.Linear) else torch.randn(2, WIDTH, 8, 8)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("layer", BARE, ids=["linear", "hooks", "convolution", "embedding"])
def test_a_layer_of_torch_that_is_compiled_alone(layer, fullgraph):
    """Dynamo skips the code of torch's own modules, and compiles a function around the module instead."""
    policy = Policy("fp8").on("embedding", "fp8").on("conv", "fp8")
    for other in (*BARE, layer, layer.forward):  # compiled after others, it has no other name
        compiled, backend = compile_eager(other, policy, fullgraph=fullgraph)
        compiled(given_to(layer if other == layer.forward else other))
        assert {r.fqn for r in backend.records} == {"weight"}


def test_parameters_of_a_layer_of_torch_that_is_compiled_alone():
    run = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0, batch_first=True)
    names = {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    assert names <= seen(run, torch.randn(2, 8, WIDTH))


def test_what_is_explained_of_a_layer_alone():
    assert {r.fqn for r in quartet.explain(linear(), x(), options={"policy": "fp8"}).records} == {"weight"}


def test_a_function_that_is_given_a_method_is_no_part_of_its_module():
    first, model = linear(), Block()
    assert seen(lambda run, x: first(run(x)), model.forward, x()) == {"first", *BLOCK}


def test_lone_layers_of_a_function_have_the_names_of_their_variables():
    first, others = linear(), [linear(), linear()]
    assert seen(lambda x: others[1](others[0](first(x))), x()) == {"first", "others.0", "others.1"}


def test_a_function_that_breaks_with_a_layer_on_the_stack():
    model = Broken()
    assert seen(lambda x: model.last(model.eager(model.first(x))), x()) == linears(model) - {"eager.fc"}


def test_a_trainer_whose_model_breaks():
    model = Stack(BrokenBlock, 1)
    assert seen(Trainer(model).step, x()) == linears(model)


def test_functional_call_with_the_models_parameters_and_with_others():
    def run(parameters, x):
        return torch.func.functional_call(model, parameters, x)

    model = Block()
    own = dict(model.named_parameters())
    others = {name: nn.Parameter(p.detach().clone()) for name, p in own.items()}
    assert seen(run, own, x()) == seen(run, others, x()) == BLOCK


def test_parameters_that_are_in_no_module():
    weight, listed = nn.Parameter(torch.randn(WIDTH, WIDTH)), [nn.Parameter(torch.randn(WIDTH, WIDTH))]
    assert seen(lambda x: x @ weight @ listed[0], x()) == {"weight", "listed.0"}


@pytest.mark.parametrize("in_place", [True, False])
def test_a_block_that_is_compiled_by_itself_has_names_of_its_own(in_place):
    model, backend = Stack(), eager_backend("fp8")
    for i, block in enumerate(model.blocks):
        if in_place:
            block.compile(backend=backend)
        else:
            model.blocks[i] = torch.compile(block, backend=backend)
    model(x())
    assert {r.fqn for r in backend.records} == BLOCK


@pytest.mark.parametrize("part, own", [("blocks.1", "up"), ("blocks.1.up", "weight")])
@pytest.mark.parametrize("whole", [False, True])
def test_rules_name_a_part_that_is_compiled_by_itself_from_the_model(part, own, whole):
    """Also a layer alone; what torch.compile puts around it counts, as in ``named_modules()``."""
    found = {own}
    name = f"{part}._orig_mod" + (".up" if own == "up" else "")
    for pattern, hit in ((f"fqn:{name}", True), (f"fqn:{own}", True), ("fqn:blocks.9.up", False)):
        torch._dynamo.reset()
        model, backend = Stack(count=2), eager_backend(Policy(None).on(pattern, "fp8"))
        model.set_submodule(part, torch.compile(model.get_submodule(part), backend=backend))
        if whole:  # dynamo looks into it
            model, found = torch.compile(model, backend=backend), {name}
            hit = pattern == f"fqn:{name}"
        if hit:
            model(x(64))
            assert {r.fqn for r in backend.records if r.lowered} == found
        else:
            with pytest.warns(UserWarning, match="matches no matmul"):
                model(x(64))
            assert not backend.lowered()


def test_a_rule_for_a_part_tells_it_from_no_module_around_it():
    model, backend = nn.Sequential(nn.Sequential(linear()), linear()), eager_backend(Policy(None).on("0.*", "fp8"))
    model[0] = torch.compile(model[0], backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(x(64))
    assert set(backend.lowered()) == {"0"}


def test_what_is_compiled_inside_of_a_larger_model_is_named_from_itself():
    backend = eager_backend("fp8")
    model = nn.Sequential(linear(), torch.compile(Broken(), backend=backend))
    model(x())
    assert {r.fqn for r in backend.records} == linears(Broken()) - {"eager.fc"}


@pytest.mark.parametrize("raw, name", [
    ("L['self']", ""), ("L['m']", ""), ("G['net'].fc", "fc"), ("layers.1", "layers.1"),
    ("L['self']._modules['layers']._modules['3'].mlp", "layers.3.mlp"),
    ("L['self'].__dict__['_modules']['base'].fc", "base.fc"),
    ("L['fn'].__closure__[0].cell_contents.fc", "fc"),
    ("getattr(L['self'].ff, '0')", "ff.0"),
    ("L['self'].layers[2].mlp", "layers.2.mlp"),
    ("L['p']['fc.weight']", "fc.weight"),
    ("L['self'].d._modules[\"it's\"]", "d.it's"),
])
def test_what_dynamo_writes_of_a_module_that_nobody_finds(raw, name):
    assert module_path(raw) == name


@pytest.mark.parametrize("raw, name", [("L['w']", "w"), ("L['ws'][0]", "ws.0"), ("L['self'].w", "w"),
                                       ("L['p']['fc.weight']", "fc.weight"), ("L['layer'].weight", "layer.weight"),
                                       ("L['___stack0'].weight", "weight"), ("", "")])
def test_what_dynamo_writes_of_a_parameter_that_is_in_no_module(raw, name):
    assert parameter_path(raw) == name


def test_widths_are_those_that_the_whole_model_reads():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.stack, self.head = nn.Embedding(100, WIDTH), Stack(), linear(WIDTH, 7)
            self.aside = linear(48, 96)

        def forward(self, ids):
            return self.head(self.stack(self.embed(ids)))

    found = []

    def backend(gm, inputs):
        found.append(make_pipeline(gm, inputs, Options.parse()).config.widths)
        return gm.forward

    model, ids = Model(), torch.randint(100, (4, 8))
    torch.compile(model, backend=backend)(ids)
    for block in model.stack.blocks:
        block.compile(backend=backend)
    model(ids)
    assert set(found) == {frozenset({WIDTH, 48})} and len(found) > 1


def test_reading_widths_computes_no_weight():
    layer = nn.utils.parametrizations.spectral_norm(linear(48, WIDTH))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert set(names._read(layer)) == {48}
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())


def test_names_hold_no_model():
    import gc
    import weakref

    model = Broken()
    compiled, _ = compile_eager(model, "fp8", fullgraph=False)
    compiled(x())
    gone = weakref.ref(model)
    torch._dynamo.reset()
    del model, compiled, _
    gc.collect()
    assert gone() is None
