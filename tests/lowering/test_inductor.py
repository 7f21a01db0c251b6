"""Semantic ops inside Inductor: bit-equal to the reference, inlined, fused with what is around them."""

import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quartet.backend import compile_graph
from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.ops import decompositions
from quartet.options import Options

pytestmark = pytest.mark.usefixtures("inductor")
ops = torch.ops.quartet
GIVEN = [1 - 2 * (i * i // 3 % 2) for i in range(64)]
QUEST = QuantSpec(rule="quest", mask=True)
HEADROOM = QuantSpec(rule="headroom", rounding="stochastic")


def awkward(rows, cols, dtype=torch.float32):
    """Gaussian blocks of many magnitudes, and among them zeros, ties, huge and tiny values, NaN and infinities."""
    g = torch.Generator().manual_seed(rows * 1009 + cols)
    x = torch.randn(rows, cols, generator=g) * torch.exp2(torch.randint(-30, 30, (rows, 1), generator=g).float())
    x[0] = 0
    x[1] = torch.tensor([0.25, -0.75, 1.25, 2.5, -5.0, 6.0, 7.0, -0.0]).repeat(cols // 8 + 1)[:cols]
    x[2] *= 2.0**60
    x[3] *= 2.0**-110
    x[4, 3], x[4, -1] = float("nan"), float("inf")
    return x.to(dtype)


def same(got, expected):
    """Equal bit for bit, any NaN being as good as another."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    got, expected = got.contiguous(), expected.contiguous()
    if got.is_floating_point():
        nan = got.float().isnan()
        assert torch.equal(nan, expected.float().isnan())
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
        got, expected = (t.view(integer).masked_fill(nan, 0) for t in (got, expected))
    assert torch.equal(got, expected), f"{int((got != expected).sum())} of {got.numel()} differ"


def compiled(function, *args):
    """Results and generated code; none of the ops with a decomposition may be called from it."""
    results, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    code = "\n".join(codes)
    called = set(re.findall(r"torch\.ops\.quartet\.(\w+)", code_lines(code)))
    assert called <= {"random_bits"}, called
    return results, code


def code_lines(code):
    return "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))


def kernel_calls(code):
    return re.findall(r"^\s+(cpp_fused\w*)\(", code, re.MULTILINE)


def agree(function, *args):
    results, code = compiled(function, *args)
    expected = function(*args)
    for got, want in zip(results, expected, strict=True):
        same(got, want)
    return code


def test_hadamard():
    def rotate(x, xt, low, signs):
        return (ops.hadamard(x, 16, None, False, torch.float32),
                ops.hadamard(xt.t(), 32, signs[:32], False, torch.bfloat16),
                ops.hadamard(x, 64, signs[:64], True, torch.float32),
                ops.hadamard(low, 128, signs, False, torch.float32),
                ops.hadamard(x, 64, ops.fixed_signs(GIVEN, x.device), False, torch.float32))

    signs = torch.randint(0, 2, (128,), generator=torch.Generator().manual_seed(1)).float() * 2 - 1
    agree(rotate, awkward(6, 200), awkward(100, 8), awkward(6, 200, torch.bfloat16), signs)


@pytest.mark.parametrize("spec", (QUEST, QuantSpec(rule="quest", sigma="centred", power="nearest", block=64),
                                  QuantSpec(rule="floor", mask=True, block=16), QuantSpec(rule="even", mask=True)),
                         ids=str)
def test_quantize(spec):
    agree(lambda x: ops.quantize(x, str(spec), None, 0), awkward(9, 136))


def test_quantize_float8_from_bfloat16():
    specs = [str(QuantSpec("e4m3")), str(QuantSpec("e5m2", rule="floor", mask=True))]
    agree(lambda x: [r for s in specs for r in ops.quantize(x, s, None, 0)], awkward(9, 136, torch.bfloat16))


def test_stochastic_quantize_draws_the_bits_of_the_reference():
    seed = torch.tensor(987654321)
    code = agree(lambda x, seed: ops.quantize(x, str(HEADROOM), seed, 5), awkward(9, 100), seed)
    assert "quartet.random_bits" in code


FORMATS = ("e2m1/16x16 e4m3 amax nearest", "e2m1/16 e4m3 amax stochastic", "e2m1/16 e4m3 four_six nearest",
           "e2m1/16 e4m3 eden stochastic", "e4m3/128x128 fp32 amax_pow2 nearest", "int8/row fp32 amax nearest",
           "ternary/tensor fp32 absmean nearest", "e4m3/tensor fp32 delayed nearest")


@pytest.mark.parametrize("spec", FORMATS)
def test_every_other_format_and_its_product(spec):
    q = QuantSpec.parse(spec)

    def layer(x, w, seed):
        made = []
        for site, t in enumerate((x, w)):
            amax = ops.amax(t) if q.takes_amax else None
            codes, scales, _ = ops.quantize(t, spec, seed if q.stochastic else None, site, amax)
            made.append((codes, scales, amax, ops.dequantize(codes, scales, spec, torch.float32, amax)))
        return made[0], made[1]

    def run(x, w, seed):
        (a, a_scales, _, values), (b, b_scales, _, _) = layer(x, w, seed)
        return a, a_scales, b, b_scales, values

    x, w, seed = awkward(34, 200)[5:], torch.randn(20, 200) * 3, torch.tensor(12345)
    agree(run, x, w, seed)
    (a, a_scales, a_amax, _), (b, b_scales, b_amax, _) = layer(x, w, seed)
    outer = (a_amax, b_amax) if q.scale == "e4m3" else (None, None)

    def products(a, a_scales, b, b_scales, a_amax, b_amax):
        return (ops.scaled_mm(a, a_scales, b, b_scales, spec, spec, torch.float32, *outer_of(a_amax, b_amax)),
                ops.scaled_bmm(b, b_scales, b, b_scales, spec, spec, torch.float32, 1, *outer_of(b_amax, b_amax)))

    def outer_of(*amax):
        return amax if q.scale == "e4m3" else (None, None)

    got, _ = compiled(products, a, a_scales, b, b_scales, *(t if t is not None else x.new_ones(1, 1) for t in outer))
    for ours, want in zip(got, products(a, a_scales, b, b_scales, *outer), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)  # the order of its sums is the library's


def test_dequantize_mask_and_product():
    x, w = torch.randn(9, 96), torch.randn(7, 96)
    (a, a_scales, mask), (b, b_scales, _) = (reference.quantize(t, QUEST) for t in (x, w))
    c, c_scales, _ = reference.quantize(w, QuantSpec("e4m3"))
    e4m3 = str(QuantSpec("e4m3"))
    a_scales[1, 1] = 255

    def read(a, a_scales, b, b_scales, c, c_scales, x, mask):
        return (ops.dequantize(a, a_scales, str(QUEST), torch.float32),
                ops.dequantize(b, b_scales, str(HEADROOM), torch.bfloat16),
                ops.dequantize(c, c_scales, e4m3, torch.float32),
                ops.apply_mask(x, mask), ops.apply_mask(x[:, :70].contiguous(), mask),
                ops.scaled_mm(a, a_scales, b, b_scales, str(QUEST), str(HEADROOM), torch.float32),
                ops.scaled_mm(a, a_scales, c, c_scales, str(QUEST), e4m3, torch.bfloat16))

    agree(read, a, a_scales, b, b_scales, c, c_scales, x, mask)


def test_rotation_and_quantiser_take_any_number_of_tokens():
    def operand(x):
        return ops.quantize(ops.hadamard(x, 32, None, False, torch.float32), str(QUEST), None, 0)

    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(operand, backend=counter, dynamic=True)
    for rows in (10, 33):
        x = awkward(rows, 100)
        for got, want in zip(run(x), operand(x), strict=True):
            same(got, want)
    assert counter.frame_count == 1


def loops(function, x):
    """Loop nests of the one kernel that ``function`` becomes."""
    code = agree(function, x)
    assert len(kernel_calls(code)) == 1
    return code.count("for(int64_t x0=")


def test_neighbours_fuse():
    """relu before the quantiser adds no loop, and rotated blocks are not laid out anew for it."""
    spec, x = str(QuantSpec(rule="floor")), awkward(16, 64)

    def quantize(x):
        return ops.quantize(x, spec, None, 0)

    def rotate(x):
        return (ops.hadamard(x, 32, None, False, torch.float32),)

    alone = loops(quantize, x)
    assert loops(lambda x: quantize(x.relu()), x) == alone
    assert loops(lambda x: quantize(*rotate(x)), x) < loops(rotate, x) + alone


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(96, 40, bias=False)

    def forward(self, x):
        return self.layer(x).relu()


def interpreted(gm, example_inputs, **kwargs):
    """An ``inner_compile`` that runs the graph op by op: semantic ops are the reference there."""

    def run(args):
        flat = list(args)
        args.clear()
        return torch.fx.Interpreter(gm).run(*flat)

    run._boxed_call = True
    return run


def test_one_training_step_equals_the_interpreted_graph():
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(24, 96)
    options = Options(disable_kernels=("cpp",), inductor={"fallback_random": True})
    steps = []
    for inner in (interpreted, None):
        torch._dynamo.reset()
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        step = torch.compile(model, backend=lambda g, e, inner=inner: compile_graph(g, e, options, inner_compile=inner))
        torch.manual_seed(1)
        y = step(leaf)
        (y * y).sum().backward()
        steps.append((y.detach(), leaf.grad, model.layer.weight.grad.clone()))
    for got, want in zip(steps[1], steps[0], strict=True):
        same(got, want)
    exact = model(x)
    error = (steps[1][0] - exact).norm() / exact.norm()
    assert 0.01 < error < 0.5, "the layer was not quantised"


@pytest.mark.parametrize("spec", ["e4m3/32 e8m0 ceil nearest", "e4m3/128 fp32 amax_pow2 nearest"])
def test_on_a_gpu_unpacked_blocks_are_not_kept_in_memory(spec):
    with FakeTensorMode():
        x = torch.empty(256, 256, dtype=torch.bfloat16, device="cuda")
        gm = make_fx(lambda t: decompositions.quantize(t, spec, None, 0)[:2])(x)
    stores = gm.graph.find_nodes(op="call_function", target=decompositions.STORE)
    assert {node.args[0].meta["val"].dim() for node in stores} == {2}
