"""Where dynamo stops: the ends of graphs, and the functions that it leaves to Python."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import CodeType
from typing import Any
from weakref import ref

from quartet.runtime import compat

LIMIT = 1 << 12  # functions that dynamo compiles meanwhile
PASSING = "functorch"  # in dynamo's reasons that say nothing of the function, but of what it was called in


@dataclass(frozen=True)
class Break:
    """Where dynamo ends a graph, or leaves a whole function to Python.

    Attributes:
        why: the first line of its reason. places: (file, line), the innermost call first.
        function: (file, first line) of the function that is left to Python; None where the graph only ends.
        began: when dynamo began with that function, by :func:`now`.
    """

    why: str
    places: tuple[tuple[str, int], ...]
    function: tuple[str, int] | None = None
    began: int = field(default=0, compare=False)


_read: tuple[Any, list[Break]] = None, []  # what dynamo noted last when its notes were read, and what it had left
_compiled: dict[int, tuple[ref[CodeType], int]] = {}  # functions of which there are graphs, and when the last was made


def graph_break() -> Break | None:
    """What ends the graph that a backend has been given; None where it ends with its function."""
    try:
        reason = compat.dynamo_output().compile_subgraph_reason
        if not reason.graph_break:
            return None
        return Break(_first_line(reason.reason), tuple((f.filename, f.lineno) for f in reversed(reason.user_stack)))
    except (ImportError, AttributeError):
        return None


@contextmanager
def functions_left(to: list[Break]) -> Iterator[None]:
    """Append to a list, at the end, the functions that dynamo has meanwhile left to Python as a whole."""
    begin = now()
    compat.compilation_metrics(LIMIT)
    try:
        yield
    finally:
        to += left_since(begin)


def now() -> int:
    """The time by dynamo's clock, in microseconds."""
    return time.time_ns() // 1000


def left_since(begin: int) -> list[Break]:
    """The functions that dynamo has left to Python as a whole since a time, as far as it remembers them.

    Steps of optimizers ask: its notes, of up to ``LIMIT`` functions, are read again when there is a new one.
    """
    global _read
    metrics = compat.compilation_metrics(LIMIT)
    last = metrics[-1] if metrics else None
    if last is not _read[0]:
        _read = last, _left(metrics)
    return [left for left in _read[1] if left.began >= begin]


def _left(metrics: list[Any]) -> list[Break]:
    code = {_frame(seen): seen for seen in metrics if seen.co_filename}  # a function at its limit is not named again
    failed = [(seen, code[_frame(seen)]) for seen in metrics if seen.fail_reason and _frame(seen) in code]
    return [Break(_first_line(seen.fail_reason), ((seen.fail_user_frame_filename or of.co_filename,
                  seen.fail_user_frame_lineno or of.co_firstlineno or 0),), (of.co_filename, of.co_firstlineno or 0),
                  seen.start_time_us or 0)
            for seen, of in failed]


def _frame(seen: Any) -> str:
    """The number of the function that was compiled, of an id such as ``0/8``, its ninth compilation."""
    return str(seen.compile_id).partition("/")[0]


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "").strip()


def has_graph() -> None:
    """There is a graph of the function that dynamo is compiling on this thread."""
    with suppress(ImportError, AttributeError):
        code = compat.dynamo_output().root_tx.f_code
        number = id(code)  # codes that say the same are equal
        _compiled[number] = ref(code, lambda gone: _compiled.pop(number, None)), now()


def go_on(others: Iterable[tuple[CodeType, int]] = ()) -> None:
    """Dynamo compiles again, and runs compiled, what it left to Python for a reason that may have passed.

    A function that is called while a ``TorchDispatchMode`` is on (a ``FlopCounterMode``), or by ``torch.func.vmap`` and
    its like, runs in eager from then on, its graphs unused: that is undone for all functions of which there are graphs,
    and for ``others``. What dynamo has since then found that it cannot compile, or no more, stays as it is.
    """
    functions = [*_functions(), *others]
    if functions:
        left = {one.function: one.began for one in left_since(0) if PASSING not in one.why}
        look_again = compat.looks_again()
        for code, since in functions:
            if left.get((code.co_filename, code.co_firstlineno), -1) < since:
                look_again(code)


def _functions() -> list[tuple[CodeType, int]]:
    """Those of which there are graphs, and since when."""
    return [(code, since) for made, since in tuple(_compiled.values()) if (code := made()) is not None]
