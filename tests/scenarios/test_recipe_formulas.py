"""Y, gX and gW of one layer under each recipe, against its formulas written out here in plain torch.

Quantisers below return the values that codes and scales stand for. What is deterministic is equal but for the order of
sums; where a recipe draws random bits, the mean of many backward passes is compared with what they should average to,
and its distance is what their spread predicts.
"""

import pytest
import torch
from harness import compile_eager
from torch import nn
from torch.nn import functional as F

from quartet import Gemm, Operand, Policy, QuantSpec, Recipe, recipes
from quartet.kernels.reference.hadamard import FLAT_SIGNS

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NVIDIAS_SIGNS = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1.0])  # arXiv 2509.25149's release


def fp4(x):
    """Nearest of E2M1, ties to the even code."""
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    size = x.abs()[..., None]
    code = (size > middle).sum(-1) + ((size == middle) & (torch.arange(7) % 2 == 1)).sum(-1)
    return E2M1[code] * x.sign()


def fp8(x, dtype=torch.float8_e4m3fn):
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype).float()


def scaled(x, amax, top, cast):
    """``cast`` of x with the magnitude ``amax`` as its largest value."""
    multiplier = (top / amax.double()).float()
    return cast(x * multiplier) * (1 / multiplier.double()).float()


def tensor8(x, dtype=torch.float8_e4m3fn):
    return scaled(x, x.abs().max(), torch.finfo(dtype).max, lambda y: fp8(y, dtype))


def int8(x, dim=None):
    amax = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    return scaled(x, amax, 127, lambda y: y.round().clamp(-127, 127))


def row8(x, dtype):
    return scaled(x, x.abs().amax(1, keepdim=True), torch.finfo(dtype).max, lambda y: fp8(y, dtype))


def blocks(x, n):
    """``[rows, cols]`` → ``[rows, cols/n, n]``, padded with zeros."""
    return F.pad(x, (0, -x.shape[1] % n)).unflatten(1, (-1, n))


def mx(x, cast, top):
    """Blocks of 32 under the smallest power of two that does not clip."""
    b = blocks(x, 32)
    mantissa, exponent = torch.frexp(b.abs().amax(-1, keepdim=True) / top)
    scale = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa > 0.5, exponent, exponent - 1))
    return (cast(b / scale) * scale).flatten(1)[:, :x.shape[1]]


def power_of_two(multiplier):
    """Rounded down."""
    return torch.ldexp(torch.ones_like(multiplier), torch.frexp(multiplier)[1] - 1)


def block8(x):
    b = blocks(x, 128)
    multiplier = power_of_two(448 / b.abs().amax(-1, keepdim=True))
    return (fp8(b * multiplier) / multiplier).flatten(1)[:, :x.shape[1]]


def squares(x, n):
    """``[⌈rows/n⌉, n, ⌈cols/n⌉, n]``."""
    return F.pad(x, (0, -x.shape[1] % n, 0, -x.shape[0] % n)).unflatten(1, (-1, n)).unflatten(0, (-1, n))


def tile8(x):
    b = squares(x, 128)
    multiplier = power_of_two(448 / b.abs().amax((1, 3), keepdim=True))
    return (fp8(b * multiplier) / multiplier).flatten(2).flatten(0, 1)[:x.shape[0], :x.shape[1]]


def nv(x, dims=(-1,), signs=None, cast=fp4):
    """NVFP4; of squares of 16 with ``dims`` (1, 3); ``signs``: of a Hadamard transform before, which stays in."""
    x = x if signs is None else turned(x, 16, signs)
    b = blocks(x, 16) if dims == (-1,) else squares(x, 16)
    encode = 448 * 6 / x.abs().max()
    scale = fp8(b.abs().amax(dims, keepdim=True) * (encode * (1 / 6)))
    values = cast((b * (1 / (scale / encode))).clamp(-6, 6)) * scale / encode
    flat = values.flatten(1) if dims == (-1,) else values.flatten(2).flatten(0, 1)
    return flat[:x.shape[0], :x.shape[1]]


def four_six(x):
    b, tried = blocks(x, 16), []
    encode = 256 * 6 / x.abs().max()
    for top in (6, 4):
        scale = fp8(b.abs().amax(-1, keepdim=True) * (encode * (1 / top)))
        values = fp4((b * (1 / (scale / encode))).clamp(-6, 6)) * scale / encode
        tried.append((values, (values - b).square().sum(-1, keepdim=True)))
    (six, six_error), (four, four_error) = tried
    return torch.where(four_error < six_error, four, six).flatten(1)[:, :x.shape[1]]


def sylvester(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / n**0.5


def turned(x, n, signs=None):
    b = blocks(x, n)
    return ((b if signs is None else b * signs) @ sylvester(n)).flatten(1)


def ternary(x):
    mean = x.double().abs().mean().float().clamp(min=1e-5)
    return (x / mean).round().clamp(-1, 1) * mean


def run(recipe, m=96, k=64, n=48, draws=1, prepare=lambda x: x):
    """X, W, E; and Y, gX, gW of every draw, stacked."""
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias=False)
    x, e = (prepare(torch.randn(m, width) * torch.randn(m, 1).exp()) for width in (k, n))
    layer.weight.data = prepare(layer.weight.data)
    x.requires_grad_()
    compiled, backend = compile_eager(lambda x: layer(x), Policy(None).on("linear", recipe))
    results = []
    for draw in range(draws):
        torch.manual_seed(100 + draw)
        y = compiled(x)
        results.append((y.detach(), *torch.autograd.grad(y, (x, layer.weight), e)))
    assert any(r.lowered for r in backend.records)
    return (x.detach(), layer.weight.detach(), e), [torch.stack(r) for r in zip(*results, strict=True)]


def assert_equal(results, expected):
    for name, got, want in zip(("Y", "gX", "gW"), results, expected, strict=False):
        error = float((got[0] - want).norm() / want.norm())
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


def assert_mean(results, expected):
    """Y is equal; the mean of the gradients is as far from what is expected as the spread of the draws says."""
    assert_equal(results[:1], expected[:1])
    for name, got, want in zip(("gX", "gW"), results[1:], expected[1:], strict=True):
        error = (got.double().mean(0) - want).square().sum()
        predicted = got.double().var(0).sum() / len(got)
        assert predicted > 0 and 0.7 < error / predicted < 1.4, f"{name}: {float(error / predicted):.2f} times"


def products(q, x, w, e):
    """Y, gX, gW where one quantiser makes every operand along what its product contracts."""
    return q(x) @ q(w).t(), q(e) @ q(w.t()).t(), q(e.t()) @ q(x.t()).t()


def from_codes(xq, wq, e_of_dgrad, e_of_wgrad):
    """Y, gX, gW where backward multiplies what forward quantised."""
    return xq @ wq.t(), e_of_dgrad @ wq, e_of_wgrad.t() @ xq


def test_mxfp8():
    tensors, results = run("mxfp8")
    assert_equal(results, products(lambda t: mx(t, fp8, 448), *tensors))


def test_fp8_block():
    (x, w, e), results = run("fp8-block", 160, 200, 136)
    assert_equal(results, (block8(x) @ tile8(w).t(), block8(e) @ tile8(w), block8(e.t()) @ block8(x.t()).t()))


@pytest.mark.parametrize("exact", [True, False])
def test_fp8_block_is_torchaos(exact):
    """Torchao's scales are no powers of two: the same rule is put through our passes, or data where they are."""
    kernels = pytest.importorskip("torchao.prototype.blockwise_fp8_training.kernels")

    def block(x):
        codes, scales = kernels.torch_blockwise_scale_act_quant_lhs(x.contiguous())
        return (codes.float().unflatten(1, (-1, 128)) * scales[..., None]).flatten(1)

    def tile(x):
        codes, scales = kernels.torch_blockwise_scale_weight_quant(x.contiguous())
        return codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)

    def largest_on_the_grid(x):
        """Every 1×128, 128×1 and 128×128 block with 448 · 2⁻⁹ as its largest magnitude."""
        x = (x / x.abs().max()).clamp(-0.5, 0.5)
        rows, cols = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
        return torch.where((rows - cols) % 128 == 0, 448 * 2.0**-9, x)

    recipe = recipes()["fp8-block"]
    if not exact:
        act, weight = (Operand(QuantSpec.parse(f"e4m3/{b} fp32 amax nearest")) for b in ("128", "128x128"))
        recipe = Recipe("fp8-block-amax", fprop=Gemm(act, weight), dgrad=Gemm(act, weight), wgrad=Gemm(act, act))
    (x, w, e), results = run(recipe, 256, 256, 128, prepare=largest_on_the_grid if exact else lambda x: x)
    assert_equal(results, (block(x) @ tile(w).t(), block(e) @ tile(w), block(e.t()) @ block(x.t()).t()))


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("name, q", [("fp8", tensor8), ("int8", int8)])
def test_halo(name, q, level):
    """The outer rotation goes along the tokens of dgrad's E, and is undone on the product."""
    (x, w, e), results = run(f"halo-{name}-{level}")
    there = (lambda t: turned(t, 32)) if level else (lambda t: t)
    xq, wq = q(there(x)), q(there(w))
    gradient = q(e)
    if level == 2:
        gradient = turned(q(turned(e.t(), 32).t()).t(), 32).t()
    assert_equal(results, (xq @ wq.t(), there(gradient @ wq), there(q(e).t() @ xq)))


def test_int8_keeps_wgrad_in_high_precision():
    (x, w, e), results = run("int8")
    assert_equal(results, (int8(x, 1) @ int8(w).t(), int8(e, 1) @ int8(w), e.t() @ x))


def test_int8_all():
    (x, w, e), results = run("int8-all")
    assert_equal(results, (int8(x, 1) @ int8(w).t(), int8(e, 1) @ int8(w), int8(e.t(), 1) @ int8(x.t(), 1).t()))


@pytest.mark.parametrize("name", ["fp8-delayed", "fp8-trillion"])
def test_fp8_delayed_has_gradients_in_e5m2(name):
    """In its first step, when there is no history."""
    (x, w, e), results = run(name)
    eq = tensor8(e, torch.float8_e5m2)
    assert_equal(results, from_codes(tensor8(x), tensor8(w), eq, eq))


def test_fp8_and_its_rows():
    (x, w, e), results = run("fp8")
    assert_equal(results, from_codes(tensor8(x), tensor8(w), tensor8(e), tensor8(e)))

    def row(t):
        multiplier = power_of_two(448 / t.abs().amax(1, keepdim=True))
        return fp8(t * multiplier) / multiplier

    tensors, results = run("fp8-rowwise")
    assert_equal(results, products(row, *tensors))


def test_bitnet_is_straight_through():
    (x, w, e), results = run("bitnet")
    assert_equal(results, from_codes(int8(x, 1), ternary(w), e, e))


def test_fp4_dge():
    (x, w, e), results = run("fp4-dge")
    order, tail = x.flatten().sort().values, int(0.01 * x.numel())
    clipped = x.clamp(order[tail], order[-1 - tail])
    rest = x - clipped

    def rows(t):
        return scaled(t, t.abs().amax(1, keepdim=True), 6, fp4)

    xq, wq = rows(clipped), rows(w)
    e5 = row8(e, torch.float8_e5m2), row8(e.t(), torch.float8_e5m2)
    multiplier = 6 / w.abs().amax(1, keepdim=True)
    size = (w * multiplier).abs()
    cell = (torch.bucketize(size, E2M1, right=True) - 1).clamp(0, 6)
    start, step = E2M1[cell], (E2M1[1:] - E2M1[:-1])[cell]
    slope = (0.2 * (2 * (size - start) / step - 1).abs() ** -0.8).clamp(max=3)
    gx = e5[0] @ row8(wq.t(), torch.float8_e4m3fn).t()
    gw = e5[1] @ row8(xq.t(), torch.float8_e4m3fn).t()
    assert_equal(results, (xq @ wq.t() + rest @ w.t(), gx, slope * gw + e.t() @ rest))


def test_nvfp4():
    """W in squares, E alone drawn at random, signed H16 on wgrad's operands alone.

    A block scale that E4M3 rounds down clips the largest of its block: that, not rounding, moves the mean of E.
    """
    (x, w, e), results = run("nvfp4", draws=100)

    def mean(t, signs=None):
        return nv(t, signs=signs, cast=lambda values: values)

    def wgrad(signs):
        return mean(e.t(), signs) @ nv(x.t(), signs=signs).t()

    wq = nv(w, (1, 3))
    assert_mean(results, (nv(x) @ wq.t(), mean(e) @ wq, wgrad(NVIDIAS_SIGNS)))
    assert recipes()["nvfp4"].wgrad.rotation.signs == tuple(NVIDIAS_SIGNS.int().tolist())
    with pytest.raises(AssertionError, match="gW"):
        assert_mean(results, (nv(x) @ wq.t(), mean(e) @ wq, wgrad(torch.ones(16))))


@pytest.mark.parametrize("name", ["tetrajet", "tetrajet-ema"])
def test_tetrajet(name):
    (x, w, e), results = run(name, draws=100)
    xq, wq = (mx(t, fp4, 6) for t in (x, w))
    assert_mean(results, from_codes(xq, wq, e, e))


def test_quartet2():
    (x, w, e), results = run("quartet2", 128, 128, 128, draws=100)
    xq, wq = four_six(x), four_six(w)
    assert_mean(results, from_codes(xq, wq, e, e))


@pytest.mark.parametrize("name", ["quartet", "quartet-paper"])
def test_quartet(name):
    """Fixed signs, scales by 7 and gradients straight through; in the paper, a mask that clears what a Gaussian's clip
    cut, in the rotated basis."""
    (x, w, e), results = run(name, draws=100)
    signs = torch.tensor(FLAT_SIGNS) if name == "quartet" else torch.ones(32)

    def forward(t):
        b = blocks(turned(t, 32, signs), 32)
        if name == "quartet":
            power, unclipped = torch.log2(b.abs().amax(-1, keepdim=True) / 7).ceil(), 7
        else:
            sigma = (b.square().mean(-1, keepdim=True) - b.mean(-1, keepdim=True).square()).sqrt()
            power, unclipped = torch.log2(sigma * 2.92247856 / 6 + 1e-8).floor(), 6
        z = b / 2 ** power
        return (fp4(z.clamp(-6, 6)) * 2 ** power).flatten(1), (z.abs() < unclipped).float().flatten(1)

    (xq, x_mask), (wq, w_mask) = forward(x), forward(w)
    back = signs.repeat(x.shape[1] // 32)
    assert_mean(results, (xq @ wq.t(), turned((e @ wq) * x_mask, 32) * back, turned((e.t() @ xq) * w_mask, 32) * back))
    assert (x_mask.mean() < 1) == (name == "quartet-paper") and x_mask.mean() > 0


def test_every_recipe_is_here():
    here = {"mxfp8", "fp8-block", *(f"halo-{f}-{level}" for f in ("fp8", "int8") for level in range(3)), "int8",
            "int8-all", "fp8-delayed", "fp8-trillion", "fp8", "fp8-rowwise", "bitnet", "fp4-dge", "nvfp4", "tetrajet",
            "tetrajet-ema", "quartet2", "quartet", "quartet-paper"}
    assert here == {name for name, recipe in recipes().items() if recipe.quantizes}
