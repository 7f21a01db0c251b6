"""Every op of the IR is one object: what it declares is true, and a provider more is one declaration more."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest
import torch
from torch import Tensor
from traced import linear, targets, trace

from quartet.cli.selftest.ops import examples
from quartet.kernels.reference import chains
from quartet.kernels.spec import QuantSpec
from quartet.lowering import registry
from quartet.lowering.ir import providers
from quartet.lowering.ir.op import REFERENCE, DeclarationError, Size, op_of, ops, schema_of
from quartet.lowering.ir.ops import fused
from quartet.lowering.targets.cpu import ops as cpu_ops
from quartet.options import OptionError, Options
from quartet.passes import pipeline
from quartet.recipes import recipes
from quartet.runtime.devices import Target

SM_80, SM_90, CPU = Target.named("sm_80"), Target.named("sm_90"), Target.named("cpu")
SPEC, SEED = "e2m1/32 e8m0 headroom stochastic", torch.tensor(7)
ELSEWHERE = {"triton": "runs on cuda, not on cpu"}
EXAMPLES = tuple(examples(torch.device("cpu")))
every_op = pytest.mark.parametrize("op", ops(), ids=str)


@every_op
def test_an_op_is_what_its_reference_says(op):
    schema = op.overload._schema
    assert str(schema) == f"quartet::{op.name}{op.schema}"
    names = [argument.name for argument in schema.arguments]
    assert names == list(inspect.signature(op.reference).parameters)
    assert len(inspect.signature(op.fake).parameters) in (len(names), 1)  # one: *args
    assert op.name in {"fixed_signs", "seed"} or any("Tensor" in str(argument.type) for argument in schema.arguments)


@every_op
def test_pytorch_infers_the_same_schema_but_for_which_ints_are_symbolic(op):
    mutated = [argument.name for argument in op.overload._schema.arguments
               if argument.alias_info is not None and argument.alias_info.is_write]
    plain = {name: int if hint == Size else hint
             for name, hint in get_type_hints(op.reference, include_extras=True).items()}

    def stand_in():
        raise AssertionError

    parameters = inspect.signature(op.reference).parameters.values()
    stand_in.__signature__ = inspect.Signature(
        [parameter.replace(annotation=plain[parameter.name]) for parameter in parameters],
        return_annotation=None if plain["return"] is type(None) else plain["return"])
    inferred = torch.library.infer_schema(stand_in, mutates_args=mutated).replace("SymInt", "int").replace("a0!", "a!")
    assert inferred == op.schema.replace("SymInt", "int")


@every_op
def test_the_reference_is_the_last_provider(op):
    *others, last = op.providers
    assert last.name == REFERENCE and last.run is op.reference and last.device is None
    assert all(provider.device in ("cpu", "cuda") for provider in others)
    for provider in op.providers if others else ():
        named = op.overload_of(provider)
        assert str(named._schema) == f"quartet::{op.name}.{provider.name}{op.schema}"
        assert op_of(named) is op and named.tags == op.overload.tags


@pytest.mark.parametrize("op", dict.fromkeys(op for op, _ in EXAMPLES), ids=str)
def test_the_fake_of_what_kernels_compute_has_the_shapes_of_its_reference(op):
    for arguments in (arguments for of, arguments in EXAMPLES if of is op):
        torch.library.opcheck(op.overload, arguments, test_utils="test_faketensor")
        torch.library.opcheck(op.overload_of(op.providers[-1]), arguments, test_utils="test_faketensor")


def test_all_ops_are_declared_here():
    known = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("quartet::") and not name.startswith("quartet::test_")}  # those of other tests live on
    assert {op.name for op in ops()} == known
    assert op_of(torch.ops.aten.mm.default) is None


@pytest.mark.parametrize("given", [
    lambda x: x,
    lambda x, n: x,
])
def test_what_is_not_annotated_is_refused(given):
    with pytest.raises(DeclarationError, match="no annotation of 'x'"):
        schema_of(given)


def test_what_no_schema_has_is_refused():
    def takes_a_set(x: Tensor, names: set) -> Tensor: ...

    with pytest.raises(DeclarationError, match="takes_a_set: no schema has <class 'set'>"):
        schema_of(takes_a_set)
    with pytest.raises(DeclarationError, match="no argument 'y'"):
        schema_of(ops()[0].reference, mutates=("y",))


CHAIN = (32, None, SPEC, SEED, 3)


@pytest.mark.parametrize(("op", "arguments"), [
    (cpu_ops.cpu_quantize, (*CHAIN, True, torch.bfloat16)),
    (cpu_ops.cpu_quantize, (*CHAIN, False, torch.float32)),
    (cpu_ops.cpu_quantize, (32, None, "e2m1/32 e8m0 quest(rms,nearest) nearest mask", None, 3, True, None)),
], ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("shape", [(33, 71), (64, 128)], ids=str)
def test_providers_of_a_fused_op_agree_to_the_bit(op, arguments, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    same(op, x, *arguments)


def test_providers_of_what_reads_codes_agree_to_the_bit():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    spec = "e2m1/32 e8m0 quest(rms,nearest) nearest mask"
    codes, scales, mask, _ = cpu_ops.cpu_quantize(x, 0, None, spec, None, 0, True, None)
    same(fused.dequantize_operand, codes, scales, spec, torch.float32)
    same(cpu_ops.cpu_requantize, codes, scales, spec, *CHAIN, True, torch.bfloat16)
    same(fused.unrotate, x, mask, 32, None, 0.75, 90, torch.bfloat16)


def test_operands_that_only_gpus_multiply_are_read_on_a_cpu_too():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec.parse("e2m1/16 e4m3 amax nearest")
    codes, scales, _ = chains.rotate_quantize(x, 0, None, spec, None, 0, torch.tensor([[100.0]]))
    same(fused.dequantize_operand, codes, scales, str(spec), torch.bfloat16)


def same(op, *arguments):
    """All providers for a CPU give the same, and the fake its shapes and dtypes."""
    wanted = results(op.reference(*arguments))
    shapes = [(t.shape, t.dtype) for t in results(op.fake(*arguments))]
    for provider in (one for one in op.providers if one.device in (None, "cpu")):
        found = results(op.overload_of(provider)(*arguments))
        assert [(t.shape, t.dtype) for t in found] == shapes, provider.name
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)), provider.name


def results(value):
    return value if isinstance(value, tuple) else (value,)


def test_what_launches_kernels_is_repeated_without_python():
    """One provider that is not holds up the others of its op."""
    others = {"block_scaled_mm.cutlass", "library_scaled_mm.cublaslt",  # launch by libraries
              "amax_of_weights.triton", "expert_amax.triton", "expert_mm.triton"}  # keep what they make of weights
    found = {f"{op.name}.{one.name}" for op in ops() for one in op.providers
             if one.device == "cuda" and not one.replayed}
    assert found <= others, "declare them replayed=True, if they launch by kernels/launcher.py or triton/launch.py"


@pytest.fixture
def second():
    """A second provider for a CPU, of which the tests say what it supports."""
    state = {"reason": None, "asked": 0, "ran": 0}

    def supports(target):
        state["asked"] += 1
        return state["reason"]

    @fused.dequantize_operand.provider("mine", "cpu", supports, before="cpp")
    def mine(codes, scales, spec, dtype):
        state["ran"] += 1
        return fused.dequantize_operand.reference(codes, scales, spec, dtype)

    yield state
    fused.dequantize_operand.withdraw("mine")


def dequantized():
    codes = torch.full((4, 16), 0x21, dtype=torch.uint8)
    return torch.ops.quartet.dequantize_operand.default(codes, torch.full((4, 1), 127, dtype=torch.uint8),
                                                        "e2m1/32 e8m0 ceil nearest", torch.float32)


def test_a_second_provider_is_chosen_once(second):
    wanted = dequantized()
    assert (second["ran"], second["asked"]) == (1, 1)
    assert torch.equal(dequantized(), wanted) and (second["ran"], second["asked"]) == (2, 1)
    assert fused.dequantize_operand.choose(CPU)[0].name == "mine"


def test_a_provider_that_declines_is_passed_over(second):
    second["reason"] = "needs a processor with a beak"
    dequantized()
    assert second["ran"] == 0
    provider, reasons = fused.dequantize_operand.choose(CPU)
    assert provider.name == "cpp" and reasons == {**ELSEWHERE, "mine": "needs a processor with a beak"}
    assert ("dequantize_operand", "mine", "needs a processor with a beak") in providers.listing(CPU)
    assert "dequantize_operand.mine=0" in registry.answers([CPU], quantized_gemms())


def test_a_second_provider_is_disabled_by_its_name(second):
    assert "dequantize_operand.mine" in options("dequantize_operand.mine").disable_kernels
    _, reasons = fused.dequantize_operand.choose(CPU, ("dequantize_operand.mine",))
    assert reasons == {**ELSEWHERE, "mine": "disabled: disable_kernels names 'dequantize_operand.mine'"}
    graph = torch.fx.Graph()
    codes, scales = graph.placeholder("codes"), graph.placeholder("scales")
    given = torch.full((4, 16), 0x21, dtype=torch.uint8), torch.full((4, 1), 127, dtype=torch.uint8)
    node = graph.call_function(fused.DEQUANTIZE, (codes, scales, "e2m1/32 e8m0 ceil nearest", torch.float32))
    node.meta["val"] = dequantized()
    providers.settle(graph, lambda device: CPU)
    assert node.target is fused.DEQUANTIZE and second["ran"] == 1
    providers.settle(graph, lambda device: CPU, ("dequantize_operand.mine",))
    assert node.target is torch.ops.quartet.dequantize_operand.cpp
    graph.output(node)
    made = torch.fx.GraphModule(torch.nn.Module(), graph)(*given)
    assert torch.equal(made, node.meta["val"]) and second["ran"] == 1


def test_a_provider_is_withdrawn_without_a_trace():
    op = fused.dequantize_operand
    before = op.providers
    op.provider("mine", "cpu")(lambda codes, scales, spec, dtype: codes.new_ones(1))
    assert dequantized().numel() == 128  # those that stand before it are preferred
    op.withdraw("mine")
    assert op.providers == before and dequantized().numel() == 128
    with pytest.raises(DeclarationError, match="no provider 'mine' to withdraw"):
        op.withdraw("mine")


@pytest.mark.parametrize(("name", "before", "said"), [
    ("cpp", "reference", "'cpp' is taken"), ("default", "reference", "no name"), ("c++", "reference", "no name"),
    ("mine", "cuda", "no provider 'cuda'; possible: triton, cpp, reference")])
def test_a_provider_that_cannot_be_is_refused(name, before, said):
    with pytest.raises(DeclarationError, match=said):
        fused.dequantize_operand.provider(name, "cpu", before=before)


def quantized_gemms():
    return [recipes()["quartet"].fprop]


def options(*disabled):
    return Options.parse(None, {"disable_kernels": list(disabled)}, passes=pipeline.OPTIONAL,
                         kernels=registry.disableable())


def test_a_provider_is_disabled_by_its_name():
    assert options("cuda_quantize.triton", "cpp").disable_kernels == ("cpp", "cuda_quantize.triton")
    with pytest.raises(OptionError, match=r"did you mean 'cuda_quantize\.triton'"):
        options("cuda_quantize.tritn")
    with pytest.raises(OptionError, match="unknown kernel"):
        options("cuda_quantize.reference")


def test_a_graph_calls_the_provider_that_is_left():
    model, x = linear()
    usual = trace("sm_90", model, x)
    graphs = trace("sm_90", model, x, disable_kernels=["unrotate.triton"])
    reference = torch.ops.quartet.unrotate.reference
    for before, after in zip(usual, graphs, strict=True):
        wanted = targets(before)
        assert wanted[reference] == 0
        wanted[reference] = wanted.pop(fused.UNROTATE, 0)
        assert +targets(after) == +wanted
    assert targets(graphs[1])[reference] == 2


def test_bits_of_the_reference_on_demand():
    """Kernels that add up in another order are preferred where they run, and not where the reference's bits matter."""
    model, x = linear()
    inexact = {op.overload: getattr(torch.ops.quartet, op.name).triton
               for op in (fused.cuda_quantize_both, fused.cuda_requantize)}
    for target, changes in (("sm_90", True), ("sm_89", False)):
        usual, portable = trace(target, model, x), trace(target, model, x, portable_rounding=True)
        for before, after in zip(usual, portable, strict=True):
            wanted = targets(before)
            assert not any(wanted[triton] for triton in inexact.values())
            for op, triton in inexact.items() if changes else ():
                wanted[triton] = wanted.pop(op, 0)
            assert +targets(after) == +wanted
        assert sum(targets(usual[1])[op] for op in inexact) == 3


def test_an_op_that_nothing_computes_is_an_error():
    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    a.meta["val"] = torch.empty(1, 2, device="meta")
    product = graph.call_function(torch.ops.quartet.fp8_mm.default, (a, a, a, a, torch.bfloat16, True))
    product.meta["val"] = a.meta["val"]
    providers.settle(graph, lambda device: SM_90)
    assert product.target is torch.ops.quartet.fp8_mm.default
    with pytest.raises(providers.NoProvider, match=r"fp8_mm.*nothing computes op 'fp8_mm' on sm_80: reference: "
                                                   r"FP8 tensor cores need compute capability 8\.9"):
        providers.settle(graph, lambda device: SM_80)


def test_inductors_cpp_wrapper_can_call_what_draws():
    """It writes an argument of type Device as two, and its code does not compile (PyTorch 2.13)."""
    schema = torch.ops.quartet.seed.default._schema
    assert [str(argument.type) for argument in schema.arguments] == ["str", "bool"]
