"""The FP8 recipes in a training step: against torchao, what is shared, what is kept, on both lowerings."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from harness import ALL, assert_close, assert_same, compile_eager, cosine, count, step
from models import CASES, MLP, Block, Twice, data
from scaled_mm import rows_run_on_a_cpu
from tensor_cores import with_fp8
from torch import nn
from torchao.float8 import CastConfig, Float8LinearConfig, convert_to_float8_training
from torchao.float8.config import ScalingGranularity

from quartet import Gemm, Operand, Policy, QuantSpec, Recipe, Rotation, recipes

RECIPES = ("fp8", "fp8-rowwise")
TENSOR, TENSOR_E5M2 = map(QuantSpec.parse, ("e4m3/tensor fp32 amax nearest", "e5m2/tensor fp32 amax nearest"))
aten = torch.ops.aten


@pytest.fixture
def tensor_cores(monkeypatch):
    with_fp8(monkeypatch)


@pytest.fixture(params=("inductor", "cublaslt"))
def kernel(request, monkeypatch):
    if request.param == "cublaslt":
        with_fp8(monkeypatch)
    return request.param


def aten_calls(gm, target):
    return gm.graph.find_nodes(op="call_function", target=target)


def torchao_config(recipe):
    row = recipe == "fp8-rowwise"
    cast = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE if row else ScalingGranularity.TENSORWISE,
                      target_dtype=torch.float8_e4m3fn)
    return Float8LinearConfig(cast_config_input=cast, cast_config_weight=cast, cast_config_grad_output=cast,
                              round_scales_to_power_of_2=row, emulate=True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", (40, 33))
def test_a_step_is_that_of_torchao(recipe, rows):
    model, (x,) = MLP(64, 96, 64), data(rows, 64, grad=True)()
    theirs = convert_to_float8_training(deepcopy(model), config=torchao_config(recipe))
    compiled, backend = compile_eager(model, recipe)
    got, want = step(compiled, model, (x,)), step(theirs, theirs, (x,))
    terms = 64 + 96  # of the two products' sums, in any order on either side; the loss is one sum of squares on both
    torch.testing.assert_close(got[0], want[0], rtol=4 * terms * 2.0**-24, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, grad in got[1].items():
        error = (grad - want[1][name]).norm() / grad.norm()
        assert error < 2e-3, (name, float(error))  # a code on the edge of rounding may fall either way
    assert backend.lowered() == {"up": ALL, "down": ALL}
    exact = step(model, model, (x,))
    assert 1e-2 < (got[1]["up.weight"] - exact[1]["up.weight"]).norm() / exact[1]["up.weight"].norm() < 8e-2


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_in_bfloat16_have_the_expected_signal(recipe, kernel):
    if recipe == "fp8-rowwise" and kernel == "cublaslt" and not rows_run_on_a_cpu():
        pytest.skip(f"torch {torch.__version__} has no _scaled_mm with row scales on a CPU")
    model, inputs = Block().bfloat16(), (data(2, 20, 64)()[0].bfloat16().requires_grad_(),)
    compiled, backend = compile_eager(model, recipe)
    got, want = step(compiled, model, inputs), step(model, model, inputs)
    assert_close(got, want, least=0.99)
    assert {r.kernel for r in backend.records if r.lowered} == {kernel}
    assert any(cosine(grad, want[1][name]) < 0.9999 for name, grad in got[1].items())


@pytest.mark.parametrize("name", ("matmul", "weight_first", "conv1d", "column_major_weight", "column_major_input",
                                  "einsum_heads", "chunked", "weight_norm", "twice", "lora", "self_attention"))
def test_every_form_of_a_product_by_both_lowerings(name, kernel):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    compiled, backend = compile_eager(model, "fp8")
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.98)
    assert {r.kernel for r in backend.records if r.lowered} == {kernel}
    assert backend.lowered() == case.lowered


@pytest.mark.parametrize("recipe", ("quartet", *RECIPES))
def test_products_that_follow_each_other_directly(recipe):
    """Without views and biases X of one product and E of another are products themselves."""
    model, inputs = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))), data(48, 64, grad=True)()
    compiled, backend = compile_eager(model, recipe, disable_kernels=["cpp"])
    got = step(compiled, model, inputs)
    assert_close(got, step(model, model, inputs), least=0.98 if recipe != "quartet" else 0.6)
    assert backend.lowered() == {"0": ALL, "1": ALL, "2": ALL}
    assert not [n for gm in backend.capture.graphs for n in aten_calls(gm, aten.mm.default)]
    assert backend.count("scaled_mm") == 9


# what is computed once and what is kept

def test_one_quantise_of_each_tensor_serves_all_its_products():
    model, inputs = Block(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, "fp8")
    step(compiled, model, inputs)
    (forward,), (backward,) = backend.forwards(), backend.backwards()
    assert count(forward, "quantize") == 7 + 4  # weights; inputs of q k v, o, gate up, down
    assert count(backward, "quantize") == 7  # E; its transpose, W and X are codes that exist
    assert count(backward, "scaled_mm") == 14 and count(backward, "dequantize") == 0


def test_rowwise_quantises_each_operand_from_the_original():
    model, inputs = Block(), data(2, 20, 64, grad=True)()
    compiled, backend = compile_eager(model, "fp8-rowwise")
    step(compiled, model, inputs)
    (forward,), (backward,) = backend.forwards(), backend.backwards()
    assert count(forward, "quantize") == 7 + 4
    assert count(backward, "quantize") == 7 * 2 + 7 + 4  # E and Eᵀ; Wᵀ; Xᵀ of the four inputs
    assert backend.count("dequantize") == 0


class Between(nn.Module):
    """A linear whose X nothing else keeps: backward of tanh is in the graph of the layers before."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 96)

    def forward(self, x):
        return self.fc(x * 2)


def test_a_byte_an_element_of_x_is_kept(kernel):
    model, (x,) = Between(), data(160, 64)()
    compiled, backend = compile_eager(model, "fp8")
    step(compiled, model, (x,))
    (record,) = (r for r in backend.records if r.role == "fprop")
    assert record.saved_bytes == 160 * 64 + 4
    left = [n.meta["val"] for n in backend.forwards()[0].graph.output_node().args[0][1:]]
    codes = [v for v in left if v.dtype is torch.float8_e4m3fn and v.numel() == 160 * 64]
    if kernel == "inductor":
        assert len(codes) == 1
        assert not [v for v in left if v.dtype is torch.float32 and v.numel() == 160 * 64]
    else:  # the partitioner may keep the input of the graph, which costs nothing, and quantise it again
        assert backend.capture.saved_bytes <= 160 * 64 + 160 * 96 * 4 + 16


def test_kept_weights_cost_a_byte_and_quantised_again_give_the_same_bits():
    lean = replace(recipes()["fp8"], name="fp8-lean", keep_weights=False)
    model, inputs = MLP(64, 96, 64), data(2, 20, 64, grad=True)()
    compiled, kept = compile_eager(model, "fp8")
    expected = step(compiled, model, inputs)
    compiled, backend = compile_eager(model, lean)
    assert_same(step(compiled, model, inputs), expected)
    assert kept.capture.saved_bytes - backend.capture.saved_bytes == 2 * (64 * 96 + 4)


def test_saved_and_original_are_the_same_numbers_with_a_tensor_scale():
    again = Gemm(Operand(TENSOR), Operand(TENSOR))
    model, inputs = Twice(), data(40, 64, grad=True)()
    compiled, _ = compile_eager(model, "fp8")
    expected = step(compiled, model, inputs)
    compiled, backend = compile_eager(model, Recipe("fp8-original", fprop=again, dgrad=again, wgrad=again))
    assert_same(step(compiled, model, inputs), expected)


# policies

def test_gradients_in_e5m2(kernel):
    gradient = Gemm(Operand(TENSOR_E5M2), Operand(TENSOR, "saved"))
    recipe = Recipe("fp8-hybrid", fprop=recipes()["fp8"].fprop, dgrad=gradient, wgrad=gradient)
    model, inputs = MLP(), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model, recipe)
    got = step(compiled, model, inputs)
    assert_close(got, step(model, model, inputs), least=0.99)
    assert {r.kernel for r in backend.records} == {kernel}


def test_two_e5m2_operands_leave_the_tensor_cores(tensor_cores):
    both = Gemm(Operand(TENSOR_E5M2), Operand(TENSOR_E5M2))
    model, inputs = MLP(), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model, Recipe("e5m2", fprop=recipes()["fp8"].fprop, dgrad=both, wgrad=both))
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.98)
    assert {(r.role, r.kernel) for r in backend.records} == {
        ("fprop", "cublaslt"), ("dgrad", "inductor"), ("wgrad", "inductor")}


@pytest.mark.parametrize("rotations", ((Rotation(32), None), (None, Rotation(32, "random")),
                                       (Rotation(16), Rotation(64))))
def test_rotations_and_fp8_combine(rotations, kernel):
    forward = Gemm(Operand(TENSOR), Operand(TENSOR), rotations[0])
    backward = Gemm(Operand(TENSOR), Operand(TENSOR, "saved"), rotations[1])
    model, inputs = MLP(64, 96, 64), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model, Recipe("rotated", fprop=forward, dgrad=backward, wgrad=backward))
    assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.99)
    assert {r.kernel for r in backend.records} == {kernel}


def test_recipes_mix_in_one_model(tensor_cores):
    policy = Policy("fp8").on("down", "quartet").on("up", "fp8-rowwise", role="wgrad")
    model, inputs = MLP(), data(40, 64, grad=True)()
    compiled, backend = compile_eager(model, policy)
    assert_close(step(compiled, model, inputs), step(model, model, inputs))
    kernels = {(r.fqn, r.role): r.kernel for r in backend.records}
    assert kernels["up", "fprop"] == "cublaslt" and kernels["down", "fprop"] != "cublaslt"
    assert kernels["up", "wgrad"] == "inductor"  # fp32 model: row scales make bfloat16 on the tensor cores


class Queries(nn.Module):
    """Two projections of one X."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(64, 48, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return torch.cat((self.q(x), self.k(x)), -1)


def test_an_operand_that_products_of_two_kernels_read_is_quantised_once_for_both(tensor_cores):
    """q and k share X, but the tensor cores do not take k's product with a weight of 32-element blocks."""
    base, model, inputs = recipes()["fp8"], Queries(), data(40, 64, grad=True)()
    assert base.fprop is not None
    mixed = replace(base, name="mixed", fprop=replace(base.fprop, b=Operand(QuantSpec("e4m3"))))
    policy = Policy("fp8").on("*", "fp8").on("k", mixed)
    compiled, backend = compile_eager(model, policy)
    got = step(compiled, model, inputs)
    kernels = {(r.fqn, r.role): r.kernel for r in backend.records}
    assert {name for name, kernel in kernels.items() if kernel != "cublaslt"} == {("k", "fprop")}
    assert len(backend.forwards()) == 1 and backend.count("quantize") == 2  # X and k's weight
    plain, _ = compile_eager(model, policy, disable_kernels=["cublaslt"])
    want = step(plain, model, inputs)
    assert all(cosine(grad, want[1][name]) > 0.99999 for name, grad in got[1].items())


def test_policies_name_the_recipes_and_toml_reads_back():
    policy = Policy("fp8").on("*.down", "fp8-rowwise").on("lm_head", "fp8")
    assert Policy.from_toml(policy.to_toml()) == policy
    own = Policy(replace(recipes()["fp8"], name="mine"))
    assert "e4m3/tensor fp32 amax nearest" in own.to_toml()
    assert Policy.from_toml(own.to_toml()) == own


def test_any_number_of_tokens(kernel):
    model = MLP()
    compiled, backend = compile_eager(model, "fp8", dynamic=True)
    for rows in (40, 33, 64):
        inputs = data(rows, 64, grad=True)()
        assert_close(step(compiled, model, inputs), step(model, model, inputs), least=0.99)
    assert backend.calls == 1
    assert {r.kernel for r in backend.records} == {kernel}


def test_padding_is_noted_as_it_is(kernel):
    model, inputs = MLP(65, 96, 65), data(40, 65, grad=True)()
    compiled, backend = compile_eager(model, "fp8")
    step(compiled, model, inputs)
    notes = {(r.fqn, r.role): r.notes for r in backend.records}
    padded = {"inductor": (), "cublaslt": ("k padded to 80",)}
    assert notes["up", "fprop"] == padded[kernel] and notes["down", "fprop"] == ()
    assert notes["up", "wgrad"] == ({"inductor": (), "cublaslt": ("k padded to 48",)}[kernel])


def test_the_dump_reads_like_the_recipe(tmp_path, tensor_cores):
    model = MLP()
    compiled, _ = compile_eager(model, "fp8", dump=str(tmp_path))
    step(compiled, model, data(40, 64)())
    *_, before, after = sorted(tmp_path.glob("graph_000/[0-9]*.py"))
    assert after.name.endswith("_lower.py")
    assert "torch.ops.quartet.quantize.default(" in before.read_text()
    assert "'e4m3/tensor fp32 amax nearest'" in before.read_text() and "# f8e4m3[40, 64]" in before.read_text()
    text = after.read_text()
    assert text.count("aten._scaled_mm.default(") == 5 and "# f8e4m3[40, 64]" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_code_computes_what_the_graph_says(recipe, kernel):
    """Through Inductor's own code generation, both ways, in sizes without padding: 2.11's C++ cannot pad float8."""
    dtype = torch.bfloat16 if recipe == "fp8-rowwise" else torch.float32
    if recipe == "fp8-rowwise" and kernel == "cublaslt" and not rows_run_on_a_cpu():
        pytest.skip(f"torch {torch.__version__} has no _scaled_mm with row scales on a CPU")
    model, inputs = MLP(64, 96, 64).to(dtype), (data(32, 64)()[0].to(dtype).requires_grad_(),)
    eager, _ = compile_eager(model, recipe)
    expected = step(eager, model, inputs)
    torch._dynamo.reset()
    options = {"policy": recipe, "fx_graph_cache": False}
    got = step(torch.compile(model, backend="quartet", options=options), model, inputs)
    torch.testing.assert_close(got[0], expected[0], rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=0)
    for name, grad in got[1].items():
        assert cosine(grad, expected[1][name]) > (0.999 if dtype is torch.bfloat16 else 0.99999), name
