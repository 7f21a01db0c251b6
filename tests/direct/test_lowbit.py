"""The specification of low-bit weights: packing, rounding, scales."""

import pytest
import torch

from quartet.kernels.reference.optim import lowbit
from quartet.kernels.reference.optim.lowbit import GRIDS
from quartet.kernels.reference.philox import philox4x32

GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda g: g.name)


def some_codes(grid, rows=5, cols=13):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(grid.low, grid.high + 1, (rows, cols), generator=generator, dtype=torch.int8)


@GRID
@pytest.mark.parametrize("cols", [1, 2, 3, 4, 13, 64])
def test_packing_is_undone_and_takes_the_bits_it_says(grid, cols):
    codes = some_codes(grid, 5, cols)
    packed = lowbit.pack(codes, grid)
    assert torch.equal(lowbit.unpack(packed, grid, cols), codes)
    assert packed.nbytes == 5 * -(-cols * grid.width // 8)


def test_packing_has_the_first_code_in_the_low_bits():
    codes = torch.tensor([[1, 0, -1, -1]], dtype=torch.int8)
    assert lowbit.pack(codes, GRIDS["ternary"]).item() == 0b00_00_01_10
    assert lowbit.pack(torch.tensor([[7, -8]], dtype=torch.int8), GRIDS["4"]).item() == 0x0F


@pytest.mark.parametrize("fraction", [0.0, 2.0**-24, 0.3, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("whole", [-2.0, 0.0])
def test_rounding_is_unbiased_over_all_random_values(fraction, whole):
    z = torch.tensor(whole, dtype=torch.float64) + fraction
    z = z.to(torch.float32)
    exact = (z.double() - whole).item()
    random = torch.arange(1 << 24, dtype=torch.int32)
    ups = (lowbit.round_stochastic(z, random) - whole).sum(dtype=torch.float64).item()
    assert 0 <= ups - exact * 2**24 < 1


@GRID
@pytest.mark.parametrize("paper", [False, True])
def test_the_mean_of_updates_is_the_update(grid, paper):
    draws, codes = 4000, torch.zeros(1, 8, dtype=torch.int8).repeat(4000, 1)
    scale = torch.full((1,) if paper else (draws,), 50.0 if paper else 0.02)
    delta = torch.tensor([1e-3, -1e-3, 5e-3, -5e-3, 0.0, 0.013, -0.013, 1e-5]).repeat(draws, 1)
    random = lowbit.random_words(7, 3, 1, 0, draws, 8, torch.device("cpu"))
    after = lowbit.values(lowbit.updated(codes, scale, delta, grid, paper, random), scale, paper)
    share = (delta[0].abs() / 0.02).double()
    sigma = 0.02 * (share * (1 - share) / draws).sqrt()
    assert ((after.double().mean(0) - delta[0]).abs() <= 4 * sigma + 1e-9).all()


def test_random_words_are_the_top_bits_of_philox():
    words = lowbit.random_words(0x123456789ABCDEF, 5, 9, 2, 1, 6, torch.device("cpu"))
    key = (0x89ABCDEF, 0x1234567)
    second = philox4x32((2 * 2 + 1, 0, 5, 9), key)
    assert words[0, 4].item() == second[0] >> 8 and words[0, 5].item() == second[1] >> 8


def test_rows_have_the_same_bits_however_they_are_cut():
    whole = lowbit.random_words(1, 2, 3, 0, 10, 7, torch.device("cpu"))
    assert torch.equal(whole[4:], lowbit.random_words(1, 2, 3, 4, 6, 7, torch.device("cpu")))


def test_the_papers_rule():
    weight = torch.tensor([[0.5, -0.25, 0.0, 0.05], [0.1, -0.1, 0.4, -0.6]])
    grid, mean = GRIDS["4"], weight.abs().mean()
    scale = lowbit.first_scale(weight, grid, True)
    assert torch.equal(scale, (7 / mean).reshape(1))
    codes = lowbit.nearest(weight, scale, grid, True)
    assert torch.equal(codes.float(), (weight * scale).round().clamp(-8, 7))
    delta, random = torch.full((2, 4), 0.01), lowbit.random_words(1, 0, 1, 0, 2, 4, torch.device("cpu"))
    z = (codes.float() / scale + delta) * scale
    expected = (z.floor() + (random / 2**24 < z - z.floor())).clamp(-8, 7)
    assert torch.equal(lowbit.updated(codes, scale, delta, grid, True, random).float(), expected)


@pytest.mark.parametrize("paper", [False, True])
def test_zeros_have_scale_one(paper):
    weight = torch.zeros(2, 4)
    scale = lowbit.first_scale(weight, GRIDS["ternary"], paper)
    assert (scale == 1).all() and not lowbit.nearest(weight, scale, GRIDS["ternary"], paper).any()


@GRID
def test_a_nan_changes_no_code(grid):
    codes = some_codes(grid)
    delta = torch.full(codes.shape, float("nan"))
    random = lowbit.random_words(1, 0, 1, 0, *codes.shape, torch.device("cpu"))
    assert torch.equal(lowbit.updated(codes, torch.ones(5), delta, grid, False, random), codes)


def test_small_updates_beside_large_codes_are_not_lost():
    codes = torch.full((1, 1 << 16), 100, dtype=torch.int8)
    delta = torch.full(codes.shape, 1e-3)
    random = lowbit.random_words(3, 0, 1, 0, *codes.shape, torch.device("cpu"))
    moved = lowbit.updated(codes, torch.ones(1), delta, GRIDS["8"], False, random).double().mean() - 100
    assert abs(moved - 1e-3) < 4 * (1e-3 / (1 << 16)) ** 0.5


@pytest.mark.parametrize("name", ["3", "4", "8"])
def test_first_scales_give_the_mean_that_rescaling_restores(name):
    grid = GRIDS[name]
    weight = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    codes = lowbit.nearest(weight, lowbit.first_scale(weight, grid, False), grid, False)
    assert abs(codes.float().abs().mean() / grid.mean - 1) < 0.03


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_rescaling_keeps_the_expected_weights(factor):
    grid = GRIDS["8"]
    codes = torch.randint(-30, 31, (1, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes = (codes.float() * factor).round().to(torch.int8).repeat(500, 1)
    scale = torch.full((500,), 0.01)
    random = lowbit.random_words(1, 0, 1, 0, 500, 64, torch.device("cpu"))
    new, scales = lowbit.rescaled(codes, scale, grid, random)
    assert (scales != scale).all()
    error = lowbit.values(new, scales, False).mean(0) - lowbit.values(codes, scale, False)[0]
    assert error.abs().max() <= 4 * scales[0] * 0.5 / 500**0.5 + 1e-6


def test_rows_near_their_mean_are_not_rescaled():
    codes = torch.full((2, 16), 26, dtype=torch.int8)
    codes[1] = 0
    random = lowbit.random_words(1, 0, 1, 0, 2, 16, torch.device("cpu"))
    new, scales = lowbit.rescaled(codes, torch.ones(2), GRIDS["8"], random)
    assert torch.equal(new, codes) and torch.equal(scales, torch.ones(2))


def test_the_radial_part_goes_into_the_scale():
    codes = torch.tensor([[1, -1, 0, 1], [0, 0, 0, 0]], dtype=torch.int8)
    scale = torch.tensor([0.5, 0.5])
    decay = -0.1 * lowbit.values(codes, scale, False)
    across = torch.tensor([[0.01, 0.01, 0.3, 0.0], [0.1, 0.0, 0.0, 0.0]])
    new, rest = lowbit.radial(codes, scale, decay + across)
    assert torch.allclose(new, torch.tensor([0.45, 0.5]))
    assert torch.allclose(rest, across, atol=1e-7)


def in_order(row):
    """The order of row_sum, in Python: groups of four, 512 lanes in turn, halves."""
    groups = [(row[i] + row[i + 1]) + (row[i + 2] + row[i + 3]) for i in range(0, len(row), 4)]
    lanes = groups[:512]
    for turn in range(512, len(groups), 512):
        lanes = [a + b for a, b in zip(lanes, groups[turn:turn + 512], strict=True)]
    while len(lanes) > 1:
        lanes = [a + b for a, b in zip(lanes[:len(lanes) // 2], lanes[len(lanes) // 2:], strict=True)]
    return lanes[0]


@pytest.mark.parametrize("cols", [1, 3, 8, 29, 2048, 2049, 5000])
def test_rows_are_summed_in_one_order(cols):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, cols, generator=generator) * 10.0 ** torch.randint(-3, 4, (2, cols), generator=generator)
    padded = torch.nn.functional.pad(x, (0, -cols % 2048))
    assert torch.equal(lowbit.row_sum(x), torch.stack([in_order(list(row)) for row in padded]))
    assert torch.allclose(lowbit.row_sum(x).double(), x.double().sum(1), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("feedback", [False, True])
@GRID
def test_a_shard_takes_up_what_the_whole_does(grid, feedback):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(grid.low, grid.high + 1, (6, 13), generator=generator, dtype=torch.int8)
    scale = torch.rand(6, generator=generator) + 0.1
    new = lowbit.values(codes, scale, False) + 0.1 * torch.randn(6, 13, generator=generator)
    options = {"paper": False, "radial_split": True, "rescale": True}

    def absorbed(rows):
        left = torch.zeros(len(codes[rows]), 13, dtype=torch.int8) if feedback else None
        parts = lowbit.pack(codes[rows].clone(), grid), scale[rows].clone()
        flips = lowbit.absorb(*parts, new[rows], left, grid, lowbit.Draw(3, 1, 2, rows.start), **options)
        return [*parts, flips.reshape(1), *([left] if feedback else [])]

    whole, parts = absorbed(slice(0, 6)), [absorbed(slice(0, 4)), absorbed(slice(4, 6))]
    for i, expected in enumerate(whole):
        together = torch.cat([p[i] for p in parts])
        assert torch.equal(together.sum(0, keepdim=True) if i == 2 else together, expected)
    assert 0 < whole[2].item() <= 6 * 13 and not torch.equal(whole[1], scale)


def test_nothing_is_taken_up_by_no_rows():
    grid = GRIDS["4"]
    parts = torch.zeros(0, 4, dtype=torch.uint8), torch.zeros(0), torch.zeros(0, 8)
    flips = lowbit.absorb(*parts, None, grid, lowbit.Draw(1, 1, 1), paper=False, radial_split=True, rescale=True)
    assert flips.item() == 0


@pytest.mark.parametrize("paper", [False, True])
def test_feedback_keeps_what_rounding_left(paper):
    grid, codes = GRIDS["8"], torch.zeros(4, 256, dtype=torch.int8)
    scale = torch.full((1,) if paper else (4,), 2.0 if paper else 0.5)
    residual = torch.zeros_like(codes)
    for step in range(40):
        random = lowbit.random_words(1, 0, step, 0, 4, 256, torch.device("cpu"))
        codes, residual = lowbit.updated_with_feedback(codes, scale, torch.full((4, 256), 0.0213), residual, grid,
                                                       paper, random)
    total = (codes.double() + residual.double() / 256) * 0.5
    assert (total - 40 * 0.0213).abs().max() < 0.03 and residual.int().abs().max() <= 128


@pytest.mark.parametrize("bits, nearest", [(5, "4"), (1, "2"), (16, "8")])
def test_other_bits_name_the_nearest(bits, nearest):
    with pytest.raises(ValueError, match=f"nearest: {nearest}"):
        lowbit.grid_of(bits)
