"""The Quartet linear layer against a float64 derivation written from the formulas, and its gradient's statistics."""

import inspect
import math

import numpy as np
import pytest
import torch

from quartet.kernels.reference import QuartetLinear, linear_backward, linear_forward, unpack_bits
from quartet.kernels.reference.hadamard import FLAT_SIGNS
from quartet.kernels.reference.products import linear as linear_module
from quartet.kernels.spec import QuantSpec

FORWARD = QuantSpec.parse("e2m1/32 e8m0 even nearest")
QUEST = QuantSpec.parse("e2m1/32 e8m0 quest(rms,nearest) nearest mask")
BACKWARD = QuantSpec.parse("e2m1/32 e8m0 headroom stochastic")
NEAREST = QuantSpec.parse("e2m1/32 e8m0 headroom nearest")
EVEN = (FORWARD, 32, FLAT_SIGNS)
CLIPPED = (QUEST, 32, None)  # masks, and no signs


# --- the formulas, in NumPy float64, sharing nothing with the reference ------------------------------------------

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniforms(seed, draw, shape):
    """(r + ½)/512 of each element, r of nine bits, 16 elements a call."""
    calls = [philox((g, 0, draw, 0), (seed, 0)) for g in range(math.prod(shape) // 16)]
    bits = np.array(calls)[..., None] >> np.array([0, 7, 16, 23]) & 511
    return (bits.reshape(shape) + 0.5) / 512


def sign_vector(seed, draw, n):
    words = philox((0, 0, draw, 1), (seed, 0))
    return np.array([-1.0 if words[i // 32] >> (i % 32) & 1 else 1.0 for i in range(n)])


def rotation(n, s=None):
    h = np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / math.sqrt(n)
    return h if s is None else np.diag(s) @ h


def blockwise(x, matrix):
    """Zero-pad the columns to whole blocks of the matrix and of 32 and multiply each block from the right."""
    n = len(matrix)
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % max(n, 32))))
    return (x.reshape(x.shape[0], -1, n) @ matrix).reshape(x.shape)


def quest(x):
    """Values and mask: scale 2^round(log2(2.92247856/6·σ + 1e-8)), nearest, σ² = mean(x²)."""
    b = x.reshape(x.shape[0], -1, 32)
    sigma = np.sqrt((b * b).mean(-1, keepdims=True))
    scale = 2.0 ** np.round(np.log2(2.92247856 / 6 * sigma + 1e-8))
    return nearest(b, scale).reshape(x.shape), (np.abs(b / scale) < 6).reshape(x.shape)


def even(x):
    """Values and a mask that keeps all: scale 2^(floor(log2(amax · 8/7)) − 2), nearest."""
    b = x.reshape(x.shape[0], -1, 32)
    amax = np.abs(b).max(-1, keepdims=True)
    scale = 2.0 ** (np.floor(np.log2(np.where(amax == 0, 1, amax) * 8 / 7)) - 2)
    return nearest(b, scale).reshape(x.shape), np.ones(x.shape)


def nearest(b, scale):
    distance = np.abs(np.abs(b / scale)[..., None] - LEVELS)
    return np.sign(b) * LEVELS[distance.argmin(-1)] * scale


def headroom(x, u):
    """2^(floor(log2 amax) − 2)·4/3 and rounding up when the fraction plus u reaches 1 (to nearest when u is ½)."""
    b = x.reshape(x.shape[0], -1, 32)
    amax = np.abs(b).max(-1, keepdims=True)
    scale = np.where(amax == 0, 1.0, 2.0 ** (np.floor(np.log2(np.where(amax == 0, 1, amax))) - 2)) * 4 / 3
    a = np.abs(b) / scale
    lo = np.searchsorted(LEVELS, a, side="right").clip(1, 7) - 1
    fraction = (a - LEVELS[lo]) / (LEVELS[lo + 1] - LEVELS[lo])
    up = fraction + np.reshape(u, b.shape) >= 1
    return (np.sign(b) * LEVELS[lo + up] * scale).reshape(x.shape)


def derivation(x, w, e, seed, site, n=32, m=32, forward=even, signs=FLAT_SIGNS):
    """Y, gX and gW: Hadamard blocks of n forward and m backward; seed below 2^32, 16 draws a site."""
    x, w, e = x.double().numpy(), w.double().numpy(), e.double().numpy()
    there = rotation(n, signs)
    xq, x_mask = forward(blockwise(x, there))
    wq, w_mask = forward(blockwise(w, there))

    def product(a, b, first):
        s = sign_vector(seed, site * 16 + first, m)
        a, b = blockwise(a, rotation(m, s)), blockwise(b, rotation(m, s))
        a = headroom(a, uniforms(seed, site * 16 + first + 1, a.shape))
        b = headroom(b, uniforms(seed, site * 16 + first + 2, b.shape))
        return a @ b.T

    gx = blockwise(product(e, wq.T, 0) * x_mask, there.T)[:, : x.shape[1]]
    gw = blockwise(product(e.T, xq.T, 3) * w_mask, there.T)[:, : x.shape[1]]
    return xq @ wq.T, gx, gw


# --- helpers ----------------------------------------------------------------------------------------------------


def problem(gen, tokens=40, width=70, out=50, dtype=torch.float32):
    x = torch.randn(tokens, width, generator=gen) * 3
    w = torch.randn(out, width, generator=gen) * 0.05
    e = torch.randn(tokens, out, generator=gen) * 1e-3
    return x.to(dtype), w.to(dtype), e.to(dtype)


def run(x, w, e, seed=0, site=0, *recipe):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = QuartetLinear.apply(x, w, torch.tensor(seed), site, *recipe)
    y.backward(e)
    return y.detach(), x.grad, w.grad


def straight_through(x, w, e):
    """The unquantised backward of the quantised forward, float64: ((E·Wq)·H) ⊙ s and ((Eᵀ·Xq)·H) ⊙ s."""
    e, there = e.double().numpy(), rotation(32, FLAT_SIGNS)
    xq, wq = (even(blockwise(t.double().numpy(), there))[0] for t in (x, w))
    gx = blockwise(e @ wq, there.T)[:, : x.shape[1]]
    gw = blockwise(e.T @ xq, there.T)[:, : x.shape[1]]
    return torch.from_numpy(gx), torch.from_numpy(gw)


def relative(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm()).item() if b.any() else a.norm().item()


# --- tests ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_recipe():
    assert str(linear_module.FORWARD) == str(FORWARD) and str(linear_module.BACKWARD) == str(BACKWARD)
    defaults = {k: p.default for k, p in inspect.signature(linear_backward).parameters.items()}
    assert defaults["forward_n"] == defaults["backward_n"] == 32 and defaults["forward_signs"] == FLAT_SIGNS
    assert defaults["forward_spec"] == FORWARD and defaults["backward_spec"] == BACKWARD


@pytest.mark.parametrize("tokens,width,out", ((40, 70, 50), (64, 96, 32), (1, 32, 5), (33, 1, 1)))
@pytest.mark.parametrize("seed,site", ((1, 0), (123456789, 3)))
@pytest.mark.parametrize("recipe,forward", ((EVEN, even), (CLIPPED, quest)))
def test_against_the_derivation(tokens, width, out, seed, site, recipe, forward, gen):
    x, w, e = problem(gen, tokens, width, out)
    wanted = derivation(x, w, e, seed, site, forward=forward, signs=recipe[2])
    for ours, formula in zip(run(x, w, e, seed, site, *recipe), wanted, strict=True):
        assert ours.shape == formula.shape
        assert relative(ours, formula) < 1e-6


@pytest.mark.parametrize("n,m", ((64, 128), (128, 16), (16, 64)))
def test_other_rotations_against_the_derivation(n, m, gen):
    x, w, e = problem(gen)
    signs = [(1, -1)[i % 3 == 0] for i in range(n)]
    results = run(x, w, e, 7, 1, FORWARD, n, signs, BACKWARD, m)
    for ours, formula in zip(results, derivation(x, w, e, 7, 1, n, m, signs=signs), strict=True):
        assert relative(ours, formula) < 1e-6


def test_nearest_backward(gen):
    """The signs still depend on the seed, the rounding does not; closer to the exact gradient than stochastic."""
    x, w, e = problem(gen, 64, 96, 64)
    exact = straight_through(x, w, e)
    nearest = run(x, w, e, 1, 0, *EVEN, NEAREST)[1:]
    other = run(x, w, e, 2, 0, *EVEN, NEAREST)[1:]
    stochastic = run(x, w, e, 1, 0)[1:]
    for a, b, c, g in zip(nearest, stochastic, other, exact, strict=True):
        assert relative(a, g) < 0.8 * relative(b, g)
        assert not torch.equal(a, c)


def test_without_mask_the_gradient_is_not_masked(gen):
    x, w, e = problem(gen, 64, 64, 64)
    ceil = QuantSpec(rule="ceil")
    y, gx, gw = run(x, w, e, 0, 0, ceil)
    assert relative(y, x.double() @ w.double().t()) < 0.2
    assert relative(gx, e.double() @ w.double()) < 0.35 and relative(gw, e.double().t() @ x.double()) < 0.35


@pytest.mark.slow
def test_gradient_is_unbiased_for_the_quantised_forward(gen):
    """The error of the mean of K passes halves when K grows by 4: one bit, until the bias of 9 bits would show."""
    x, w, e = problem(gen, 32, 64, 32)
    exact = straight_through(x, w, e)
    _, xq, wq = linear_forward(x, w)
    k = 768
    passes = [linear_backward(e, xq, wq, torch.tensor(seed), 0, 64) for seed in range(k)]
    for i in range(2):
        grads = torch.stack([p[i] for p in passes]).double()
        errors = [
            (grads.reshape(-1, size, *grads.shape[1:]).mean(1) - exact[i]).square().mean().sqrt().item()
            for size in (1, 4, 16, 64, 256)
        ]
        for coarse, fine in zip(errors, errors[1:], strict=False):
            assert 0.46 < fine / coarse < 0.54
        z = (grads.mean(0) - exact[i]) / (grads.std(0) / math.sqrt(k))
        assert z.abs().max() < 5 and z.mean().abs() < 5 / math.sqrt(z.numel()) and 0.9 < z.std() < 1.1
        assert errors[0] / exact[i].square().mean().sqrt() < 0.35


def test_gradient_is_of_the_quantised_not_of_the_original_operands(gen):
    """The mean gradient is nearer to that of the quantised forward than to the high-precision one."""
    x, w, e = problem(gen, 32, 64, 32)
    mean = sum(run(x, w, e, seed)[1].double() for seed in range(256)) / 256
    assert relative(mean, straight_through(x, w, e)[0]) < 0.03
    assert relative(mean, e.double() @ w.double()) > 0.1


def test_masked_elements_get_no_gradient_in_the_rotated_basis(gen):
    """An outlier is clipped in the forward; rotating gX forward again gives zero where the mask says so."""
    x, w, e = problem(gen, 64, 64, 64)
    x[:, 3] *= 30
    _, gx, gw = run(x, w, e, 0, 0, *CLIPPED)
    _, xq, wq = linear_forward(x, w, *CLIPPED)
    for g, mask in ((gx, unpack_bits(xq.mask)), (gw, unpack_bits(wq.mask))):
        rotated = torch.from_numpy(blockwise(g.double().numpy(), rotation(32)))
        assert (~mask).any() and rotated[~mask].abs().max() < 1e-6 * rotated.abs().max()
        assert (rotated[mask] != 0).all()


def test_padding_changes_nothing_within(gen):
    """Zeros that a caller appends to `in` and `out` are what the padding inside appends."""
    x, w, e = problem(gen, 40, 70, 50)
    y, gx, gw = run(x, w, e, 5)
    pad = torch.nn.functional.pad
    yp, gxp, gwp = run(pad(x, (0, 26)), pad(w, (0, 26, 0, 14)), pad(e, (0, 14)), 5)
    assert torch.equal(yp[:, :50], y) and not yp[:, 50:].any()
    assert torch.equal(gxp[:, :70], gx) and torch.equal(gwp[:50, :70], gw)


def test_deterministic_for_a_seed_and_different_across_seeds_and_sites(gen):
    x, w, e = problem(gen)
    y, gx, gw = run(x, w, e, 9, 4)
    assert all(torch.equal(a, b) for a, b in zip((y, gx, gw), run(x, w, e, 9, 4), strict=True))
    for seed, site in ((10, 4), (9, 5), (9 + (1 << 40), 4)):
        y2, gx2, gw2 = run(x, w, e, seed, site)
        assert torch.equal(y, y2)
        assert (gx2 != gx).float().mean() > 0.9 and (gw2 != gw).float().mean() > 0.9


def test_both_gemms_draw_their_own_bits(gen):
    """With tokens = out and symmetric roles, dgrad and wgrad of one layer would be equal if they shared bits."""
    x, _, _ = problem(gen, 32, 32, 32)
    e = torch.randn(32, 32, generator=gen)
    e = e + e.t()
    _, gx, gw = run(x, x, e)
    assert not torch.equal(gx, gw) and relative(gx, gw) < 0.6


@pytest.mark.parametrize("dtype,tolerance", ((torch.bfloat16, 0.01), (torch.float16, 0.002)))
def test_half_precision(dtype, tolerance, gen):
    """Same codes as fp32 inputs of the same values: what differs is the rounding of the products and of the result."""
    x, w, e = problem(gen, 40, 70, 50, dtype)
    results = run(x, w, e, 2)
    for ours, formula in zip(results, derivation(x, w, e, 2, 0), strict=True):
        assert ours.dtype == dtype
        assert relative(ours, formula) < tolerance


def test_half_gradient_below_its_range_stays_exact_inside(gen):
    """Codes times scales of a small fp16 gradient are below 2^-24; the product is made in fp32."""
    x, w, _ = problem(gen, 32, 64, 32, torch.float16)
    e = (torch.randint(-3, 4, (32, 32), generator=gen) * 2.0**-24).half()
    gw = run(x * 64, w, e, 2)[2]
    assert relative(gw, derivation(x * 64, w, e, 2, 0)[2]) < 0.01


def test_nan_is_visible(gen):
    x, w, e = problem(gen, 8, 64, 32)
    x[2, 10] = math.nan
    y, _, gw = run(x, w, e)
    assert bool(y[2].isnan().all()) and bool(y[[0, 1, 3]].isfinite().all())
    assert bool(gw[:, :32].isnan().all()) and bool(gw[:, 32:].isfinite().all())
    x, w, e = problem(gen, 8, 64, 32)
    e[3, 4] = math.inf
    _, gx, gw = run(x, w, e)
    assert bool(gx[3].isnan().all()) and bool(gx[[0, 1, 2, 4]].isfinite().all())
    assert bool(gw[4].isnan().all()) and bool(gw[:4].isfinite().all())


def test_no_tokens(gen):
    x, w, e = problem(gen, 0, 64, 32)
    y, gx, gw = run(x, w, e)
    assert y.shape == (0, 32) and gx.shape == (0, 64)
    assert gw.shape == (32, 64) and not gw.any()


def test_zero_gradient_gives_zero(gen):
    x, w, e = problem(gen)
    _, gx, gw = run(x, w, torch.zeros_like(e))
    assert not gx.any() and not gw.any()


@pytest.mark.parametrize("recipe,bits", ((EVEN, 4.25), (CLIPPED, 5.25)))
def test_saved_for_backward_is_packed(recipe, bits, gen):
    """4.25 bits, and a bit of the mask where there is one, an element of x and of w, and the seed."""
    x, w, _ = problem(gen, 64, 128, 96)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        QuartetLinear.apply(x.requires_grad_(), w.requires_grad_(), torch.tensor(0), 0, *recipe)
    assert sum(sizes) * 8 == (64 + 96) * 128 * bits + 64


def test_refusals(gen):
    x, w, _ = problem(gen)
    with pytest.raises(ValueError, match=r"\[40, 70\].*\[50, 69\]"):
        linear_forward(x, w[:, :69])
    with pytest.raises(ValueError, match="bfloat16.*float32.*cast both"):
        linear_forward(x.bfloat16(), w)
    with pytest.raises(ValueError, match="flatten x"):
        linear_forward(x[None], w)
    with pytest.raises(ValueError, match="draws no random bits.*nearest"):
        linear_forward(x, w, BACKWARD)
    with pytest.raises(ValueError, match="H64 needs 64 signs, got 32"):
        linear_forward(x, w, FORWARD, 64)
    with pytest.raises(ValueError, match="site -1"):
        run(x, w, torch.ones(40, 50), 0, -1)
