"""What is said of a model takes all its graphs together: rules that are about nothing, layers that share a graph, and
that nothing was quantised. Each once."""

import gc
import logging
import warnings
from dataclasses import replace

import pytest
import torch
from harness import compile_eager, eager_backend
from test_names import Block, Broken, BrokenBlock, Stack, x
from torch import nn

from quartet import Policy, explain
from quartet.backend import compile_graph
from quartet.model.judge import _judges
from quartet.options import Options
from quartet.runtime.capture import Pretence
from quartet.runtime.devices import Target


def said(run):
    """Our warnings while ``run`` runs, on code that dynamo has not met."""
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in seen if "quartet" in str(w.message)]


def compiled(model, policy, *inputs, **options):
    def run():
        made, _ = compile_eager(model, policy, fullgraph=False, **options)
        made(*inputs or (x(),))
    return run


def by_blocks(model, policy):
    backend = eager_backend(policy)

    def run():
        for block in model.blocks:
            block.compile(backend=backend)
        model(x())
    return run, backend


RULES = Policy("fp8").on("first", "bf16").on("last.*", None).on("*.ff.1", "mxfp8").on("linear", "mxfp8", role="wgrad")


def explained(model, policy):
    return lambda: explain(model, x(), options={"policy": policy})


LOOKS = pytest.mark.parametrize("look", [compiled, explained])


@LOOKS
def test_a_rule_about_another_graph_of_the_model_is_none_about_nothing(look):
    assert said(look(Broken(), RULES)) == []


@LOOKS
def test_a_rule_about_no_graph_of_the_model_is(look):
    policy = Policy("fp8").on("lst.ff.1", None).on("attention", None).on("last.*", None).on("eager.fc", None)
    first, second, third = said(look(Broken(), policy))
    assert "rule 0" in first and "nearest: 'last.ff.1'" in first
    assert "rule 1" in second and second.endswith("op classes in the model: linear")
    assert "rule 3" in third and "multiplies nothing in the compiled graphs" in third


def test_a_rule_is_told_once_for_all_graphs_and_recompilations():
    model, policy = Stack(BrokenBlock), Policy("fp8").on("nobody", None)
    made, _ = compile_eager(model, policy, fullgraph=False, dynamic=False)
    assert len(said(lambda: (made(x()), made(x(8)), model(x(4))))) == 1
    assert len(said(compiled(Stack(BrokenBlock), policy))) == 1


def test_rules_about_saved_activations_wait_for_all_graphs_too():
    class Normed(Broken):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)

        def forward(self, x):
            return self.norm(self.eager(torch.nn.functional.gelu(self.first(x))))

    policy = Policy("bf16").on("norm", "e4m3/16", op="saved")
    inputs = x().requires_grad_()
    assert said(compiled(Normed(), policy, inputs)) == []
    assert len(said(compiled(Normed(), policy.on("nrm", "e4m3/16", op="saved"), inputs))) == 1


def test_rules_name_a_block_that_is_compiled_by_itself_from_the_model_too():
    for policy in (Policy("fp8").on("blocks.*.up", None), Policy("fp8").on("up", None)):
        run, backend = by_blocks(Stack(), policy)
        assert said(run) == []
        assert set(backend.lowered()) == {"ff.1"}, policy


def test_a_rule_that_tells_apart_what_one_graph_serves():
    run, _ = by_blocks(Stack(), Policy("fp8").on("blocks.0.up", None).on("blocks.*.ff.1", "mxfp8"))
    (text,) = said(run)
    assert text.startswith("quartet policy: rule 0: on('blocks.0.up', None) tells 'blocks.0.up' from 'blocks.1.up'")
    assert "all 3 modules" in text
    (text,) = said(explained(Stack(BrokenBlock), Policy("fp8").on("blocks.1.*", None)))
    assert "tells 'blocks.0.up' from 'blocks.1.up'" in text
    assert said(compiled(Stack(), Policy("fp8").on("blocks.1.*", None))) == []


class Region(Block):
    forward = torch.compiler.nested_compile_region(Block.forward)


@pytest.mark.parametrize("rule, told", [("blocks.0.up", 1), ("blocks.2.*", 1), ("blocks.*.up", 0), ("*.ff.1", 0)])
def test_a_rule_that_tells_regions_apart(rule, told):
    texts = said(compiled(Stack(Region), Policy("fp8").on(rule, None), x().requires_grad_()))
    assert len(texts) == told and all("tells 'blocks.0" in text for text in texts)


def plain(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_nothing_quantised_is_told_once_with_reason_and_remedy():
    model = Block().double()
    made, _ = compile_eager(model, "fp8", dynamic=False)
    texts = said(lambda: (made(x().double()), made(x(8).double())))
    assert len(texts) == 1
    assert texts[0].startswith("quartet: none of the 5 matmuls of the model is quantised. The first, up (float64): ")
    assert "autocast" in texts[0]


def test_plain_tensors_in_place_of_parameters():
    model = Block()
    made, _ = compile_eager(lambda p, x: torch.func.functional_call(model, p, x), "fp8")
    (text,) = said(lambda: made(plain(model), x()))
    assert "'up.weight', is a plain tensor" in text and "nn.Parameter" in text


@pytest.mark.parametrize("policy", ["bf16", Policy(None), Policy("fp8").on("*", None), Policy("bf16").on("up", None)])
def test_nothing_is_said_where_the_policy_wants_it_so(policy):
    assert said(compiled(Block(), policy)) == []
    model = Block()
    run = compiled(lambda p, x: torch.func.functional_call(model, p, x), "bf16", plain(model), x())
    assert said(run) == []


def test_nothing_is_said_of_a_part_where_another_is_quantised():
    class Mixed(Broken):
        def __init__(self):
            super().__init__()
            self.first.double()

        def forward(self, x):
            return self.last(self.eager(self.first(x).float()))

    assert said(compiled(Mixed(), "fp8", x().double())) == []


def on_hopper(model, *inputs):
    """Our warnings where the default policy chooses kernels for a Hopper GPU; nothing runs."""
    parsed = replace(Options.parse(), target=Target.named("sm_90"))

    def backend(gm, inputs):
        return compile_graph(gm, inputs, parsed, inner_compile=Pretence())
    return said(lambda: torch.compile(model, backend=backend)(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_rates_of_hopper_are_for_bfloat16(dtype):
    (text,) = on_hopper(Block().to(dtype), x().to(dtype))
    assert "none of the 5" in text and "saves no time" in text and "model.bfloat16() or torch.autocast" in text


def test_that_nothing_pays_is_a_line_of_the_log(caplog):
    with caplog.at_level(logging.WARNING, "quartet"):
        assert on_hopper(Block().bfloat16(), x().bfloat16()) == []
    (line,) = [r.getMessage() for r in caplog.records if r.name == "quartet"]
    assert "none of the 5" in line and "would not pay" in line and "'quartet'" in line


def test_a_judge_goes_with_its_model():
    model, other = Broken(), Block()
    compiled(model, "fp8")()
    assert any(owner() is model for owner, _ in _judges.values())
    torch._dynamo.reset()
    del model
    gc.collect()
    compiled(other, "fp8")()
    assert [owner() for owner, _ in _judges.values() if owner() is None or owner() is other] == [other]
