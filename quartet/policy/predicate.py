"""Shape predicates of a policy: ``"k >= 4096 and n % 32 == 0"`` over the sizes of a matmul.

    Y[m, n] = X[m, k] · W[n, k]ᵀ        m tokens, n output features, k input features

The language is integers, ``m``, ``n``, ``k``, ``+ - * // %``, comparisons (chains too), ``and``, ``or``, ``not``
and parentheses. Text is parsed by ``ast`` and interpreted here, never evaluated by Python. Logic has three values:
a comparison that a symbolic size leaves open is unknown, and a predicate that comes out unknown does not match.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy
import torch

from quartet.recipes import PolicyError

NAMES = ("m", "n", "k")
MAX_LENGTH = 400

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}
_COMPARISON: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}
_LANGUAGE = "a predicate compares m, n, k and integers with == != < <= > >=, + - * // %, and, or, not"


def normalise(text: str) -> str:
    """The text with single spaces, after checking it. Raises PolicyError with the column (from 1) of a mistake."""
    if not isinstance(text, str):
        raise PolicyError(f"a shape predicate is a string such as 'k >= 4096', not {type(text).__name__} {text!r}",
                          ("shape",))
    text = " ".join(text.split())
    _parse(text)
    return text


def holds(text: str, m: Any, n: Any, k: Any) -> bool:
    """Whether the predicate is certainly true of a matmul.

    Args:
        m, n, k: sizes as int, ``torch.SymInt`` or a sympy expression; anything else (None, text) is an unknown size.
            No guard is installed.
    """
    known = {name: size if isinstance(size, int | torch.SymInt | sympy.Expr) else None
             for name, size in zip(NAMES, (m, n, k), strict=True)}
    return _truth(_parse(text), known) is True


@lru_cache(maxsize=256)
def _parse(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise _error(f"{text[:40]}…", MAX_LENGTH, f"{len(text)} characters are too many, at most {MAX_LENGTH}")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _error(text, error.offset or len(text) + 1, error.msg) from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise _error(text, 1, str(error) or "too deeply nested") from None
    _check_truth(text, tree)
    return tree


def _error(text: str, column: int, problem: str) -> PolicyError:
    return PolicyError(f"shape predicate {text!r}, column {column}: {problem}; {_LANGUAGE}", ("shape",))


def _check_truth(text: str, node: ast.expr) -> None:
    match node:
        case ast.BoolOp(values=values):
            for value in values:
                _check_truth(text, value)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            _check_truth(text, operand)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            _check_number(text, left)
            for op, right in zip(ops, comparators, strict=True):
                if type(op) not in _COMPARISON:
                    raise _error(text, right.col_offset + 1, "before this, a comparison that does not exist here")
                _check_number(text, right)
        case _:
            raise _error(text, node.col_offset + 1, f"{ast.unparse(node)!r} is neither true nor false")


def _check_number(text: str, node: ast.expr) -> None:
    match node:
        case ast.Constant(value=int()) if not isinstance(node.value, bool):
            pass
        case ast.Name(id=name) if name in NAMES:
            pass
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check_number(text, operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            _check_number(text, left)
            _check_number(text, right)
            if isinstance(op, ast.FloorDiv | ast.Mod) and isinstance(right, ast.Constant) and right.value == 0:
                raise _error(text, right.col_offset + 1, "division by zero")
        case _:
            raise _error(text, node.col_offset + 1, f"{ast.unparse(node)!r} is not one of m, n, k or an integer")


def _truth(node: ast.expr, sizes: dict[str, Any]) -> bool | None:
    match node:
        case ast.BoolOp(op=op, values=values):
            decisive = isinstance(op, ast.Or)
            truths = [_truth(value, sizes) for value in values]
            return decisive if decisive in truths else None if None in truths else not decisive
        case ast.UnaryOp(operand=operand):
            truth = _truth(operand, sizes)
            return None if truth is None else not truth
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            numbers = [_number(part, sizes) for part in (left, *comparators)]
            truths = [_decide(_COMPARISON[type(op)], *pair) for op, *pair in
                      zip(ops, numbers[:-1], numbers[1:], strict=True)]
            return False if False in truths else None if None in truths else True
    raise AssertionError(f"unchecked predicate {ast.dump(node)}")


def _number(node: ast.expr, sizes: dict[str, Any]) -> Any:
    """The value of an arithmetic expression, or None where it has none."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(operand=operand):
            value = _number(operand, sizes)
            return None if value is None else -value
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _number(left, sizes), _number(right, sizes)
            if a is None or b is None or (isinstance(op, ast.FloorDiv | ast.Mod) and isinstance(b, int) and b == 0):
                return None
            return _ARITHMETIC[type(op)](a, b)
    raise AssertionError(f"unchecked predicate {ast.dump(node)}")


def _decide(compare: Callable[[Any, Any], Any], a: Any, b: Any) -> bool | None:
    if a is None or b is None:
        return None
    if (isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr)) and compare in (operator.eq, operator.ne):
        outcome = (sympy.Eq if compare is operator.eq else sympy.Ne)(a, b)
    else:
        outcome = compare(a, b)
    if isinstance(outcome, bool | sympy.logic.boolalg.BooleanAtom):
        return bool(outcome)
    if isinstance(outcome, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return True if statically_known_true(outcome) else False if statically_known_true(
            torch.sym_not(outcome)) else None
    return None
