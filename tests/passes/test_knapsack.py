"""The choice of what is kept: the best there is, compared with every other."""

import random
from itertools import product

import pytest

from quartet.passes.residuals.knapsack import Choice, Frontier


def everything(items):
    """(bytes, time) of every combination of choices."""
    return [(sum(c.bytes for c in chosen), sum(c.time for c in chosen)) for chosen in product(*items)]


def instance(seed, sizes=range(1, 40)):
    numbers = random.Random(seed)
    return [[Choice(numbers.choice(sizes), numbers.choice((0, *sizes))) for _ in range(numbers.randint(1, 4))]
            for _ in range(numbers.randint(1, 7))]


@pytest.mark.parametrize("seed", range(60))
def test_no_combination_is_faster_within_any_limit(seed):
    items = instance(seed, range(1, 8) if seed % 2 else range(1, 40))
    every, frontier = everything(items), Frontier(items)
    for limit in (*sorted({size for size, _ in every}), max(size for size, _ in every) + 1, None):
        best = min(time for size, time in every if limit is None or size <= limit)
        found = frontier.within(limit)
        assert found.time == best and (limit is None or found.bytes <= limit) and frontier.slack == 0
        chosen = [choices[pick] for choices, pick in zip(items, found.picks, strict=True)]
        assert (found.bytes, found.time) == (sum(c.bytes for c in chosen), sum(c.time for c in chosen))
    assert frontier.within(min(size for size, _ in every) - 1) is None
    assert frontier.least().bytes == min(size for size, _ in every)
    assert frontier.totals == sorted(set(frontier.totals)) and all(
        a[1] > b[1] for a, b in zip(frontier.totals, frontier.totals[1:], strict=False))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("most", [3, 8])
def test_where_points_are_left_out_the_slack_says_by_how_much(seed, most):
    items = instance(seed)
    every, frontier = everything(items), Frontier(items, most)
    assert len(frontier.totals) <= most
    for limit in sorted({size for size, _ in every}):
        within = [time for size, time in every if size <= limit - frontier.slack]
        found = frontier.within(limit)
        assert not within or (found is not None and found.time <= min(within) and found.bytes <= limit)
    assert frontier.least().bytes == min(size for size, _ in every)


def test_of_equal_choices_the_first_is_taken():
    keep, encoded = Choice(8, 0), Choice(8, 0)
    assert Frontier([[keep, encoded]] * 3).within(24).picks == (0, 0, 0)


def test_by_hand():
    """Three layers of two tensors: 16 bytes or 9 for 2, 32 or 18 for 3 or none for 10. Of 100 bytes allowed, of 144."""
    items = [[Choice(16, 0), Choice(9, 2)], [Choice(32, 0), Choice(18, 3), Choice(0, 10)]] * 3
    found = Frontier(items).within(102)
    assert (found.bytes, found.time) == (102, 9) and found.picks == (0, 1) * 3
    found = Frontier(items).within(100)
    assert (found.bytes, found.time) == (95, 11)  # one of the small ones too
    assert Frontier(items).within(26) is None and Frontier(items).least().time == 36
