"""The option ``memory``: what is kept is within the budget, by choices that cost the least, and numbers stay close."""

import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import Backend, assert_close, assert_same, compile_eager, count, step
from models import Llama, Residual, data, tokens
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import quartet
from quartet import Policy
from quartet.backend import compile_graph, make_partitioner, make_pipeline
from quartet.lowering import registry
from quartet.lowering.ir.graph import argument
from quartet.lowering.ir.ops import fp8, fused
from quartet.options import OptionError, Options
from quartet.passes import pipeline
from quartet.passes.residuals.budget import Budget, BudgetError, default
from quartet.passes.residuals.formats import SERVED
from quartet.report.memory import memory_lines
from quartet.report.text import human_bytes
from quartet.runtime import compat
from quartet.runtime.capture import Capture, Pretence
from quartet.runtime.devices import Target


class Net(nn.Module):
    """Two gated layers, wide enough for everything to be worth a choice."""

    def __init__(self, d=64, f=192, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm": nn.RMSNorm(d), "gate": nn.Linear(d, f, bias=False), "up": nn.Linear(d, f, bias=False),
            "down": nn.Linear(f, d, bias=False)}) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            y = layer["norm"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return x


X = data(256, 64, grad=True)


def run(model, inputs, policy="quartet", *, fullgraph=True, dynamic=None, **options):
    """(result of a step, records of what is kept, of memory, the backend)"""
    saved, memory = [], []
    parsed = Options.parse(None, {"policy": policy, "disable_kernels": ["cpp"], **options}, passes=pipeline.OPTIONAL,
                           kernels=registry.NAMES)

    def compile(backend, gm, example):
        return compile_graph(gm, example, parsed, inner_compile=backend.capture, collect=backend.records.extend,
                             collect_saved=saved.extend, collect_memory=memory.extend)

    backend = Backend(compile, Capture())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    return step(compiled, model, inputs), saved, memory, backend


def kept_by(compiled, model, inputs):
    """Bytes of the storages that autograd really keeps in a step, beside inputs and parameters."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs)}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in held:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = compiled(*inputs)
    out.float().square().mean().backward()
    return sum(found.values())


# --- the budget ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.85, 0.7, 0.55, 0.45])
def test_what_is_kept_is_within_the_budget_and_gradients_are_close(share):
    model = Net()
    expected, *_ = run(model, X(), recompute="none")
    got, saved, (memory,), _ = run(model, X(), memory=share)
    assert torch.equal(got[0], expected[0])
    assert_close(got, expected, least=0.9)
    assert memory.least <= memory.saved_bytes <= memory.limit == int(share * memory.unquantised_bytes) and memory.fits
    assert memory.saved_bytes == sum(r.saved_bytes for r in saved)


@pytest.mark.parametrize("memory", [0.8, 0.5, "least", "fastest", "80KiB"])
@pytest.mark.parametrize("policy", ["quartet", "fp8", None])
def test_bytes_predicted_are_bytes_kept(policy, memory):
    model, inputs = Net().bfloat16(), (X()[0].detach().bfloat16().requires_grad_(),)
    found, options = [], Options.parse(None, {"policy": Policy(policy), "memory": memory})

    def backend(gm, example):
        return compile_graph(gm, example, options, inner_compile=Capture(), collect_memory=found.extend)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend=backend)
        measured = kept_by(compiled, model, inputs)
    (record,) = found
    assert measured == record.saved_bytes
    plain = torch.compile(model, backend=lambda gm, example: compat.compile_fx(gm, example, inner_compile=Capture()))
    torch._dynamo.reset()
    assert kept_by(plain, model, inputs) == record.unquantised_bytes


def test_less_memory_costs_more_time_and_the_ends_are_the_words():
    model = Net()
    _, _, (least,), _ = run(model, X(), memory="least")
    _, _, (fastest,), backend = run(model, X(), memory="fastest")
    assert fastest.again == fastest.encoded == 0 == fastest.seconds
    assert least.saved_bytes < 0.5 * fastest.saved_bytes and least.seconds > 0
    some = [run(model, X(), memory=share)[2][0] for share in (0.8, 0.6, 0.4)]
    ordered = [fastest, *some, least]
    assert [r.seconds for r in ordered] == sorted(r.seconds for r in ordered)
    for record in (least, *some):
        sizes, times = [p.bytes for p in record.frontier], [p.seconds for p in record.frontier]
        assert sizes == sorted(sizes) and times == sorted(times, reverse=True) and times[-1] == 0
        assert any(p.bytes == record.saved_bytes for p in record.frontier) or len(sizes) == 64


def test_fastest_keeps_what_recompute_none_keeps():
    model = Net()
    expected, _, _, without = run(model, X(), recompute="none")
    got, _, _, backend = run(model, X(), memory="fastest")
    assert_same(got, expected)
    assert backend.capture.saved_bytes == without.capture.saved_bytes
    assert count(backend.backwards()[0], "scaled_mm") == count(without.backwards()[0], "scaled_mm")


@pytest.mark.parametrize("recompute", ["none", "gemm", None])
def test_recipe_is_what_there_is_without_the_option(recompute):
    model, given = Net(), {} if recompute is None else {"recompute": recompute}
    expected, _, none, without = run(model, X(), **given)
    got, _, memory, backend = run(model, X(), memory="recipe", **given)
    assert_same(got, expected)
    assert memory == none == [] and backend.capture.saved_bytes == without.capture.saved_bytes


def test_a_product_runs_again_where_its_codes_are_kept_bit_for_bit():
    """With rules that leave activations exact, all choices are lossless."""
    model, policy = Net(), Policy("quartet").on(op="saved", recipe=None)
    expected, _, _, without = run(model, X(), policy, recompute="none")
    for share in (0.6, 0.4, 0.2):
        got, saved, (memory,), backend = run(model, X(), policy, memory=share)
        assert_same(got, expected)
        again = [r for r in saved if r.saved and "again" in r.saved]
        assert len(again) == memory.again > 0 and memory.encoded == 0
        assert without.capture.saved_bytes - backend.capture.saved_bytes == sum(r.bytes for r in again)
        assert count(backend.backwards()[0], "scaled_mm") > count(without.backwards()[0], "scaled_mm")


def test_a_recompute_option_is_not_chosen_about():
    model = Net()
    _, _, (none,), _ = run(model, X(), recompute="none", memory="least")
    _, _, (gemm,), _ = run(model, X(), recompute="gemm", memory="least")
    _, _, (free,), _ = run(model, X(), memory="least")
    assert none.again == gemm.again == 0 and free.again > 0
    assert free.saved_bytes == gemm.saved_bytes < none.saved_bytes


def test_a_rule_decides_and_the_budget_chooses_the_rest():
    model, policy = Net(), Policy("quartet").on("layers.0.*", "mesa8", op="saved").on("layers.1.*", None, op="saved")
    _, saved, _, _ = run(model, X(), policy, recompute="none", memory=0.99)
    formats = {r.fqn.split(".")[1]: set() for r in saved if r.fqn.startswith("layers")}
    for r in saved:
        if r.fqn.startswith("layers") and r.dtype == "float32" and r.bytes > 1 << 14 and r.op != "rsqrt":
            formats[r.fqn.split(".")[1]].add(r.saved)
    assert "uint8/64 stochastic" in formats["0"] and formats["1"] == {None}


def test_without_the_option_nothing_changes_where_no_rates_are_known():
    model = Net()
    parsed = Options.parse(None, {"policy": "quartet"})
    step_ = make_pipeline(torch.fx.symbolic_trace(nn.Identity()), [torch.randn(4, 4)], parsed)
    assert step_.config.memory is None and make_partitioner(step_, parsed) is None
    _, saved, memory, _ = run(model, X())
    assert saved == memory == []


# --- the default -----------------------------------------------------------------------------------------------------

def explained(model, *inputs, target="sm_90", **options):
    torch._dynamo.reset()
    return quartet.explain(model.bfloat16(), *(x.detach().bfloat16() for x in inputs), target=target,
                           options={"policy": "quartet", **options})


def test_by_default_products_are_kept_within_four_fifths_of_the_peak_where_rates_are_known():
    model, x = Net(), X()[0].repeat(8, *[1] * (X()[0].dim() - 1))
    report, today = explained(model, x), explained(model, x, memory="recipe")
    (memory,) = report.memory
    held = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    assert memory.budget.startswith("0.8 of the unquantised peak with ") and memory.encoded == 0 and not memory.nominal
    assert memory.limit == int(0.8 * (memory.unquantised_bytes + held)) - held > 0
    assert today.saved_bytes_total < report.saved_bytes_total and memory.saved_bytes <= memory.limit
    assert {r.saved for r in report.saved} <= {None, "product again"}
    none = explained(model, x, recompute="none")
    assert not none.memory and none.saved_bytes_total >= report.saved_bytes_total


def test_the_default_asks_for_less_where_parameters_are_most_of_a_step():
    assert [default(size, size).limit(1000) for size in (0, 1000, 10000)] == [800, 200, 0]


def test_by_default_frozen_parameters_are_held_without_moments():
    model, x = Net(), X()[0].repeat(8, 1)
    for layer in model.layers:
        layer["gate"].weight.requires_grad_(False)
    (memory,) = explained(model, x).memory
    frozen, trained = (sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad == wanted)
                       for wanted in (False, True))
    held = frozen + 3 * trained
    assert memory.limit == int(0.8 * (memory.unquantised_bytes + held)) - held > 0


@pytest.mark.parametrize("memory", ["least", 0.7, 0.6])
def test_codes_that_a_product_multiplies_again_are_kept_beside_their_transposes(memory):
    (record,) = explained(Net(), X()[0].repeat(8, 1), target="h200", policy="fp8", memory=memory).memory
    assert record.saved_bytes == record.least if memory == "least" else record.fits
    (none,) = explained(Net(), X()[0].repeat(8, 1), target="h200", policy="fp8", memory="least",
                          recompute="none").memory
    assert record.least < none.saved_bytes  # both products of an input run again, and its codes are kept once


class Tied(nn.Module):
    """Layers that share a weight between two others."""

    def __init__(self, d=64):
        super().__init__()
        self.first, self.shared, self.last = (nn.Linear(d, d, bias=False) for _ in range(3))

    def forward(self, x):
        return self.last(F.silu(self.shared(F.silu(self.shared(F.silu(self.first(x)))))))


class BothWays(nn.Module):
    """A layer whose weight another product has transposed."""

    def __init__(self, d=64):
        super().__init__()
        self.first, self.up = nn.Linear(d, d, bias=False), nn.Linear(d, 2 * d, bias=False)

    def forward(self, x):
        return F.linear(F.silu(self.up(self.first(x).relu())), self.up.weight.t())


def on_hopper(model, **options):
    """A model compiled as on an H200, whose ops run here; the record of what it keeps, once it has run."""
    parsed, found = Options.parse(None, options, passes=pipeline.OPTIONAL), []
    torch._dynamo.reset()
    return torch.compile(model, backend=lambda gm, example: compile_graph(
        gm, example, replace(parsed, target=Target.named("h200")), inner_compile=Capture(),
        collect_memory=found.extend)), found


def frozen():
    """A model of whose first layer nothing is trained."""
    model = Net()
    model.layers[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("model, weights", [(Net, 6), (Tied, 3), (frozen, 6), (BothWays, 1)])
def test_weights_that_backward_quantises_again_give_the_same_gradients(model, weights):
    model, inputs = model().bfloat16(), (X()[0].detach().bfloat16().requires_grad_(),)
    expected = step(on_hopper(model, policy="fp8", memory="fastest")[0], model, inputs)
    compiled, found = on_hopper(model, policy=Policy("fp8").on(op="saved", recipe=None), memory="least")
    assert_same(step(compiled, model, inputs), expected)
    assert found[0].weights == weights


def test_weights_that_backward_quantises_again_must_not_change_before():
    model = Net().bfloat16()
    compiled, found = on_hopper(model, policy="fp8", memory="least")
    loss = compiled(X()[0].detach().bfloat16().requires_grad_()).sum()
    with torch.no_grad():
        model.layers[0]["up"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert found[0].weights == 6


@pytest.mark.parametrize("memory", [0.8, 0.6, 0.5, "least"])
def test_on_hopper_bytes_predicted_are_bytes_kept(memory):
    model, inputs = Net().bfloat16(), (X()[0].detach().bfloat16().requires_grad_(),)
    compiled, found = on_hopper(model, policy="fp8", memory=memory)
    more = kept_by(compiled, model, inputs) - found[0].saved_bytes
    assert 0 <= more < 256 and found[0].fits  # scales are views of tables, four for each


def test_what_attention_results_in_is_kept_as_the_codes_that_its_projection_multiplies():
    model, inputs = Llama().bfloat16(), tokens(8, 64)
    expected, *_ = run(model, inputs, "fp8", memory="fastest")
    got, saved, (memory,), _ = run(model, inputs, "fp8", memory="least")
    assert_close(got, expected, least=0.97)
    (mixed,) = (record for record in saved if "attention" in record.op and len(record.shape) == 4)
    assert (mixed.saved, mixed.saved_bytes, mixed.reason) == ("e4m3/tensor fp32 amax nearest", 0, SERVED)
    assert memory.saved_bytes < 0.45 * memory.unquantised_bytes


def test_what_codes_of_a_transpose_stand_for_has_its_strides():
    """Attention's backward on a CPU takes its result for one whose innermost axis is dense."""
    model, inputs = Llama().bfloat16(), tokens(4, 61)
    expected = step(on_hopper(model, policy="fp8", memory="fastest")[0], model, inputs)
    assert_close(step(on_hopper(model, policy="fp8", memory="least")[0], model, inputs), expected, least=0.97)


def test_codes_that_a_kernel_of_their_own_writes_serve_as_those_of_the_quantiser_did_when_it_was_chosen():
    model, inputs = Llama().bfloat16(), tokens(8, 64)
    expected = step(on_hopper(model, policy="bitnet", memory="fastest")[0], model, inputs)
    compiled, found = on_hopper(model, policy="bitnet", memory="least")
    assert_close(step(compiled, model, inputs), expected, least=0.97)
    assert found[0].saved_bytes == found[0].least


def halves(policy):
    """Forward and backward as an H200 would get them, with the least kept."""
    options = replace(Options.parse(None, {"policy": policy, "memory": "least"}, passes=pipeline.OPTIONAL),
                      target=Target.named("h200"))
    capture, model = Pretence(), Net().bfloat16()
    torch._dynamo.reset()
    torch.compile(model, backend=lambda gm, given: compile_graph(gm, given, options, inner_compile=capture))(
        X()[0].detach().bfloat16()).sum().backward()
    return capture.graphs


def test_a_weight_is_cast_in_backward_to_the_transpose_alone():
    graphs = halves("fp8")
    forward, backward = ([n for target in (fp8.CAST, fp8.CASTS) for n in graph.graph.find_nodes(
        op="call_function", target=target) if "primals" in str(n.args[0])] for graph in graphs)
    assert backward and all(argument(n, "transposed") and not argument(n, "plain") for n in backward)
    assert any(not argument(n, "transposed") for n in forward)
    assert not any("amax_of" in str(node.target) for node in graphs[1].graph.nodes)  # scales are forward's


def test_codes_that_backward_folds_again_are_folded_in_forward_by_their_quantiser():
    forward, backward = ({target: graph.graph.find_nodes(op="call_function", target=target)
                          for target in (fused.QUANTIZE, fused.FOLD)} for graph in halves("quartet"))
    assert not forward[fused.FOLD] and len(backward[fused.FOLD]) > 4  # products' own operands, and gradients' columns
    assert len(forward[fused.QUANTIZE]) == 10 and all(argument(n, "folded") for n in forward[fused.QUANTIZE])


def test_by_default_the_report_says_that_nothing_is_lost_and_nothing_where_nothing_can_be_chosen():
    def lines(model, dtype=torch.bfloat16, **options):
        torch._dynamo.reset()
        report = quartet.explain(model.to(dtype), X()[0][:64].detach().to(dtype), target="rtx 3090", options=options)
        return [line for line in report.summary() if line.startswith("memory")]

    chain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    assert lines(chain) == lines(chain, torch.float32) == []
    assert "where nothing can be chosen" in lines(chain, memory="1KiB", policy=Policy(None))[0]
    assert "which is the least that can be" in lines(Net(), memory=0.01, policy="quartet")[0]
    (line,) = lines(Net(), policy="quartet")  # its parameters are most of a step
    assert "which is the least without loss" in line


def test_by_default_no_recipe_becomes_slower_than_it_says_and_a_users_partitioner_is_left_alone():
    for options in ({"policy": "fp8"}, {"recompute": "gemm"}, {"custom_partitioner_fn": Own()}, {"memory": "recipe"}):
        assert not explained(Net(), X()[0], **options).memory


class Own(compat.CustomPartitionerFn):
    """A user's partitioner, which keeps whatever is a product's."""

    def __init__(self):
        self.calls = 0

    def __call__(self, gm, joint_inputs, **kwargs):
        self.calls += 1
        return compat.partitioner({})[1](gm, joint_inputs, **kwargs)

    def uuid(self):
        return "own"


# --- what cannot be --------------------------------------------------------------------------------------------------

def test_too_small_a_budget_names_the_least():
    model = Net()
    _, _, (least,), _ = run(model, X(), memory="least")
    with pytest.warns(UserWarning, match=rf"memory=0.01 of the unq.* is {least.saved_bytes}, 0\.\d+ of the unq"):
        _, _, (record,), _ = run(model, X(), memory=0.01)
    assert not record.fits and record.saved_bytes == least.saved_bytes == record.least
    with pytest.raises(Exception, match=f"is {least.saved_bytes}, ") as caught:
        run(model, X(), memory="1KiB", strict=True)
    assert isinstance(caught.value, BudgetError) or "BudgetError" in str(caught.value)


@pytest.mark.parametrize("value, message", [
    (12, "'12GiB'"), ("12", "'12GiB'"), (0, "no share from 0 to 1"), (True, "not bool True"), ("small", "not 'small'"),
    ([1], "not list"), (-0.5, "not -0.5"), ("120%", "no share from 0 to 1$"), ("12 XB", "not '12 XB'"),
    (5 * 2**30, "'5GiB'"), (3 * 2**19, "'1.5MiB'"), (0, "'least'$"), ("0GiB", "'0GiB' is less than a byte.*'least'"),
    ("0.5 B", "less than a byte")])
def test_what_is_no_budget_is_refused(value, message):
    with pytest.raises(OptionError, match=f"option 'memory' is a share.*{message}"):
        Options.parse(None, {"memory": value})


@pytest.mark.parametrize("value, budget", [
    (0.7, Budget("share", 0.7)), ("0.7", Budget("share", 0.7)), ("70%", Budget("share", 0.7)), (1, Budget("share", 1)),
    ("12GiB", Budget("bytes", 12 * 2**30)), ("1.5 GiB", Budget("bytes", 1.5 * 2**30)), ("2GB", Budget("bytes", 2e9)),
    ("512 B", Budget("bytes", 512)), ("1KB", Budget("bytes", 1000)), ("12gib", Budget("bytes", 12 * 2**30)),
    ("3mb", Budget("bytes", 3e6)), ("least", Budget("least")), (" fastest", Budget("fastest"))])
def test_what_a_budget_can_be(value, budget):
    assert Options.parse(None, {"memory": value}).memory == budget == Budget.parse(value)


@pytest.mark.parametrize("value, text", [
    ("100B", "100 B"), ("80KiB", "80 KiB"), ("1.5GiB", "1.5 GiB"), ("2048 gib", "2 TiB"), ("least", "'least'"),
    (0.7, "0.7 of the unquantised bytes")])
def test_a_budget_is_printed_in_the_unit_that_it_fills(value, text):
    assert str(Budget.parse(value)) == text


def test_the_budget_is_in_both_keys():
    def keys(**options):
        parsed = Options.parse(None, {"policy": "quartet", **options})
        made = make_pipeline(torch.fx.symbolic_trace(nn.Identity()), [torch.randn(4, 4)], parsed)
        partitioner = make_partitioner(made, parsed)
        return made.uuid(), None if partitioner is None else partitioner.uuid()

    every = [keys(**({} if m is None else {"memory": m})) for m in (None, 0.7, 0.6, "0.7GiB", "least", "fastest")]
    assert len({a for a, _ in every}) == len({b for _, b in every}) == len(every) and every[0][1] is None
    assert keys(memory=0.7) == keys(memory="70%") == every[1]


# --- how models are compiled -----------------------------------------------------------------------------------------

def test_the_choice_is_the_same_each_time():
    model = Llama(layers=2)
    found = [run(model, tokens(4, 40), memory=0.5) for _ in range(2)]
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and found[0][2] == found[1][2]


@pytest.mark.parametrize("share", [0.7, 0.45])
def test_a_language_model_trains_alike(share):
    model, inputs = Llama(layers=2).bfloat16(), tokens(8, 64)
    expected, *_ = run(model, inputs, recompute="none")
    got, _, (memory,), _ = run(model, inputs, memory=share)
    assert torch.equal(got[0], expected[0]) and memory.fits
    assert_close(got, expected, least=0.85)


def test_dynamic_shapes():
    model = Net()
    compiled, backend = compile_eager(model, "quartet", dynamic=True, memory=0.2, disable_kernels=["cpp"])
    for rows in (256, 320):
        inputs = data(rows, 64, grad=True)()
        assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.8)
    assert backend.calls == 1 and count(backend.backwards()[0], "scaled_mm") > 2 * 6


def test_graph_breaks_have_a_budget_each():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Net(layers=1), Net(layers=1)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model = Broken()
    got, _, memory, _ = run(model, X(), fullgraph=False, memory=0.5)
    assert len(memory) == 2 and all(r.fits for r in memory)
    assert_close(got, step(model, model, X()), least=0.7)


def test_a_share_is_not_asked_of_a_graph_in_which_nothing_can_be_chosen():
    class Broken(Net):
        def forward(self, x):
            y = super().forward(x)
            torch._dynamo.graph_break()
            return y[:4].sin()

    model = Broken()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "quartet: memory")
        _, _, memory, _ = run(model, X(), fullgraph=False, memory=0.5, strict=True)
    first, second = memory
    assert first.fits and first.open and not second.open and not second.fits
    assert "where nothing can be chosen" in list(memory_lines(memory))[1]
    with pytest.raises(Exception, match="Budget.* is 200 bytes of what one graph keeps"):
        run(model, X(), fullgraph=False, memory="200 B", strict=True)


def test_checkpointing_stays_what_the_user_asked_for():
    def recomputed(block, x):
        return checkpoint(block, x, use_reentrant=False)

    model = Residual(recomputed)
    expected, _, _, without = run(model, data(160, 64, grad=True)(), recompute="gemm")
    got, _, (memory,), backend = run(model, data(160, 64, grad=True)(), memory="fastest")
    assert_same(got, expected)
    assert backend.capture.saved_bytes == without.capture.saved_bytes and memory.again == 0


@pytest.mark.parametrize("memory", [0.9, "least"])
def test_selective_checkpointing(memory):
    def decide(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def wrap(block, x):
        return checkpoint(block, x, use_reentrant=False,
                          context_fn=partial(create_selective_checkpoint_contexts, decide))

    model = nn.Sequential(Residual(wrap), nn.Linear(64, 64))  # a gradient that does not cancel in the last norm
    expected, *_ = run(model, data(160, 64, grad=True)())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, _, (record,), _ = run(model, data(160, 64, grad=True)(), memory=memory)
    assert torch.equal(got[0], expected[0])
    assert_close(got, expected, least=0.9)


def test_a_users_partitioner_divides_and_is_asked_for_copies():
    model, own = Net(), Own()
    expected, *_ = run(model, X(), memory=0.5)
    got, _, (memory,), _ = run(model, X(), memory=0.5, custom_partitioner_fn=own)
    assert_same(got, expected)
    assert own.calls == 4 and memory.fits  # without us, with products kept, with them again, and at last


def test_graphs_without_backward():
    model = Net()
    compiled, backend = compile_eager(model, "quartet", memory=0.5)
    with torch.no_grad():
        first = compiled(X()[0])
    got = step(compiled, model, X())
    assert_close(got, step(model, model, X()), least=0.7)
    assert first.shape == (256, 64)


def test_a_model_without_products_is_chosen_about_too():
    class Elementwise(nn.Module):
        def forward(self, x):
            return x.sin().tanh().clone().exp()

    _, saved, (memory,), _ = run(Elementwise(), data(256, 64, grad=True)(), None, memory="least")
    assert memory.saved_bytes <= memory.unquantised_bytes and memory.again == 0


def test_regions_are_left_to_their_recipes():
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(Net(layers=1) for _ in range(2))
            self.call = torch.compiler.nested_compile_region(lambda net, x: net(x))

        def forward(self, x):
            for net in self.nets:
                x = self.call(net, x)
            return x.sin()

    model = Regions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, _, memory, _ = run(model, X(), memory=0.5)
    assert_close(got, step(model, model, X()), least=0.7)
    assert len(memory) == 1


# --- what the reader sees --------------------------------------------------------------------------------------------

def test_explain_shows_the_choice_its_bytes_and_the_frontier(tmp_path):
    report = explained(Net(), X()[0], memory=0.4)
    (memory,), text = report.memory, str(report)
    assert f"({memory.saved_bytes / memory.unquantised_bytes:.3f}) under memory=0.4 of the unquantised bytes" in text
    assert f" of {human_bytes(memory.unquantised_bytes)} unquantised (" in text
    assert "products again" in text and "predicted" in text and "time" in text and max(
        map(len, text.splitlines())) <= 180
    shown = json.loads(json.dumps(report.to_dict()))
    assert shown["memory"][0]["frontier"][0].keys() == {"bytes", "share", "seconds"}
    assert sum(r["saved_bytes"] for r in shown["saved"]) == memory.saved_bytes
    assert "under memory=0.4" in report.to_html()
    assert all(r.seconds is not None for r in report.saved)
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    report.plot_frontier(tmp_path / "frontier.svg")
    assert "<svg" in (tmp_path / "frontier.svg").read_text()
    assert matplotlib.get_backend() == "svg" and matplotlib.rcParams["svg.hashsalt"] is None  # the user's own


def test_no_frontier_where_nothing_was_chosen(tmp_path):
    report = explained(Net(), X()[0], memory="recipe")
    assert "memory" not in report.to_dict()
    with pytest.raises(ValueError, match="options={'memory': …}"):
        report.plot_frontier(tmp_path / "frontier.svg")


@pytest.mark.parametrize("memory", [0.5])
def test_inductors_code_gives_the_eager_gradients(memory):
    torch.manual_seed(0)
    model = Net()
    eager, _ = compile_eager(model, "quartet", memory=memory)
    expected = step(eager, model, X())
    torch._dynamo.reset()
    got = step(torch.compile(model, backend="quartet", options={"policy": "quartet", "memory": memory}), model, X())
    assert_close(got, expected, least=0.98)


def test_a_recipe_of_ones_own_is_chosen_about():
    recipe = replace(quartet.recipes()["quartet"], name="keeps", recompute="none")
    _, _, (memory,), _ = run(Net(), X(), recipe, memory=0.5)
    assert memory.fits and memory.again > 0
