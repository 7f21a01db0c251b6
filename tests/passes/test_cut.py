"""The minimum cut: that of networkx, side for side."""

import random
from math import inf, nan

import networkx
import pytest

from quartet.passes.residuals.cut import minimum_cut


def network(*edges):
    graph = networkx.DiGraph()
    for u, v, capacity in edges:
        graph.add_edge(u, v, capacity=capacity)
    return graph


def anything(seed):
    """A small network of few capacities, so that many cuts are equal."""
    numbers = random.Random(seed)
    nodes = ["s", "t", *range(numbers.randint(2, 12))]
    graph = networkx.DiGraph()
    graph.add_nodes_from(nodes)
    for _ in range(numbers.randint(len(nodes), 4 * len(nodes))):
        graph.add_edge(numbers.choice(nodes), numbers.choice(nodes),
                       **numbers.choice([{}, {"capacity": inf}, *({"capacity": c} for c in (0, 1, 1, 2, 3, 5.0))]))
    return graph


@pytest.mark.parametrize("seed", range(0, 400, 40))
def test_it_is_that_of_networkx(seed):
    found = 0
    for each in range(seed, seed + 40):
        try:
            expected = networkx.minimum_cut(anything(each), "s", "t")
        except networkx.NetworkXUnbounded:
            expected = None
        assert minimum_cut(anything(each), "s", "t") == expected, each
        found += expected is not None and expected[0] > 0
    assert found > 10


def test_of_equal_cuts_it_is_the_one_nearest_to_the_sink():
    value, (before, after) = minimum_cut(network(("s", 1, 2), (1, 2, 2), (2, "t", 2)), "s", "t")
    assert (value, before, after) == (2, {"s", 1, 2}, {"t"})


def test_whole_numbers_are_exact_however_large():
    value, _ = minimum_cut(network(("s", 1, 2**60 + 1), (1, 2, inf), (2, "t", 2**61 + 1)), "s", "t")
    assert value == 2**60 + 1


@pytest.mark.parametrize("capacity", [0.5, nan])
def test_it_leaves_alone_what_is_no_matter_of_whole_numbers(capacity):
    assert minimum_cut(network(("s", 1, 1), (1, "t", capacity)), "s", "t") is None


def test_a_long_chain():
    length = 3000  # of more edges than Python calls functions inside of each other
    chain = network(*((i, i + 1, 5 - (i == 1000)) for i in range(length)))
    value, (before, _) = minimum_cut(chain, 0, length)
    assert value == 4 and before == set(range(1001))
