"""Shape predicates: what holds, what is refused and where, and symbolic sizes."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from quartet.policy.predicate import MAX_LENGTH, holds, normalise
from quartet.recipes import PolicyError


@pytest.mark.parametrize("text, expected", [
    ("k >= 4096", True), ("k > 4096", False), ("n % 32 == 0", False), ("n % 32 == 16", True),
    ("k >= 4096 and n % 32 == 0", False), ("k >= 4096 or n % 32 == 0", True), ("not n % 32 == 0", True),
    ("not (k > 1 and m > 1)", False), ("1 < m <= 100 < k", True), ("1 < m <= 10 < k", False),
    ("m * n // 4 - 1 < k", True),
    ("-m < 0", True), ("m + 1 == 101", True), ("m // 3 == 33", True), ("m != 100", False),
    ("m == 1 or n == 1 or k == 4096", True), ("m % (n - 80) == 0", False),
])
def test_of_integers(text, expected):
    assert holds(normalise(text), m=100, n=80, k=4096) is expected


@pytest.mark.parametrize("text, column, problem", [
    ("k >", 4, ""), ("k >> 4", 1, "neither true nor false"), ("k + 1", 1, "neither true nor"), ("k", 1, "neither"),
    ("k > 1 and m", 11, "neither"), ("k > x", 5, "'x' is not one of m, n, k"), ("k > 2.5", 5, "'2.5'"),
    ("k > True", 5, "'True'"), ("k == 'a'", 6, "is not one"), ("k > 2 ** 9", 5, "is not one"),
    ("k > m / 2", 5, "is not one"),
    ("k in (1, 2)", 6, "comparison that does not exist"), ("k is 5", 6, "comparison that does not exist"),
    ("k > (m > 1)", 6, "is not one"), ("f(k) > 1", 1, "is not one"), ("k.real > 1", 1, "is not one"),
    ("[k] == 1", 1, "is not one"), ("k > 1 if m else n", 1, "neither"), ("lambda: k > 1", 1, "neither"),
    ("(m := 3) > 1", 2, "is not one"), ("k % 0 == 0", 5, "division by zero"), ("k // 0 > 0", 6, "division by zero"),
    ("~k > 0", 1, "is not one"), ("+k > 0", 1, "is not one"), ("__import__('os') == 1", 1, "is not one"), ("", 1, ""),
    ("k > 1; m", 6, ""), ("k = 5", 3, ""),
])
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_mistakes_show_their_column(text, column, problem):
    with pytest.raises(PolicyError) as error:
        normalise(text)
    assert f"column {column}:" in str(error.value) and problem in str(error.value)
    assert error.value.path == ("shape",)


@pytest.mark.parametrize("text", ["k > " + "1+" * MAX_LENGTH + "1", "-" * (MAX_LENGTH - 10) + "k > 1 and (", "k > \0"])
def test_hostile_text_is_an_ordinary_error(text):
    with pytest.raises(PolicyError, match="shape predicate"):
        normalise(text)


def test_deepest_legal_text_is_evaluated():
    text = "-" * (MAX_LENGTH - 5) + "k > 1"
    assert holds(normalise(text), 1, 1, 8) is (MAX_LENGTH % 2 == 1)


def test_not_a_string():
    with pytest.raises(PolicyError, match="not int 4096"):
        normalise(4096)


def test_spaces_are_canonical():
    assert normalise("  k>1   and\n m > 2 ") == "k>1 and m > 2"


def test_division_by_a_size_of_zero_does_not_match():
    assert not holds("m // n > 1", 4, 0, 4) and not holds("not m % n == 1", 4, 0, 4)


INTS = st.integers(-3, 40)
NUMBERS = st.recursive(st.sampled_from(["m", "n", "k", "0", "3", "7"]), lambda inner: st.builds(
    "({} {} {})".format, inner, st.sampled_from(["+", "-", "*"]), inner), max_leaves=4)
TRUTHS = st.recursive(
    st.builds("{} {} {}".format, NUMBERS, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS),
    lambda inner: st.one_of(st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner),
                            st.builds("not {}".format, inner)), max_leaves=4)


@settings(max_examples=80, deadline=None)
@given(TRUTHS.filter(lambda text: len(text) < MAX_LENGTH), INTS, INTS, INTS)
def test_agrees_with_python(text, m, n, k):
    assert holds(normalise(text), m, n, k) == eval(text, {"m": m, "n": n, "k": k})


def symbols():
    env = ShapeEnv()
    backed = env.create_symintnode(env.create_symbol(64, ConstantSource("tokens")), hint=64)
    return env, [backed, env.create_unbacked_symint(), sympy.Symbol("s", positive=True, integer=True), None, "s0*8"]


@pytest.mark.parametrize("text", ["m >= 4096", "not m >= 4096", "m % 32 == 0", "m != 7", "m == 64", "not m == 64",
                                  "m // n > 2", "m > 32 or k > 9999", "not (m > 32 and k > 1)", "1 < m < 9999"])
def test_an_undecidable_comparison_does_not_match(text):
    env, sizes = symbols()
    for m in sizes:
        assert holds(normalise(text), m, 16, 4096) is False, m
    assert not env.guards and not env.deferred_runtime_asserts


@pytest.mark.parametrize("text", ["k >= 4096", "m > 9999 or k >= 4096", "not (m > 9999 and k < 32)"])
def test_what_the_known_sizes_decide_matches(text):
    env, sizes = symbols()
    for m in sizes:
        assert holds(normalise(text), m, 16, 4096) is True, m
    assert not env.guards


def test_what_is_true_of_every_value_matches():
    env, (backed, unbacked, symbol, *_) = symbols()
    for m in (backed, unbacked, symbol):
        assert holds("m * 32 % 32 == 0", m, 16, 64) and not holds("m * 32 % 32 == 1", m, 16, 64)
    assert holds("m >= 2", backed, 16, 64), "a dynamic dimension is at least 2"
    assert not env.guards


def test_a_symbolic_size_in_a_traced_function_adds_no_guard():
    seen = []

    def backend(gm, inputs):
        sizes = [size for size in inputs if isinstance(size, torch.SymInt)]
        before = len(sizes[0].node.shape_env.guards)
        seen.append((holds("m > 8", sizes[0], 4, 4), holds("k == 4", sizes[0], 4, 4)))
        assert len(sizes[0].node.shape_env.guards) == before
        return gm

    compiled = torch.compile(lambda x: x * 2, backend=backend, dynamic=True)
    for rows in (16, 32, 48):
        compiled(torch.ones(rows, 4))
    assert seen == [(False, True)]
