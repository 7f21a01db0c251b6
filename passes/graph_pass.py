"""What a pass declares: the phase of sites that it takes, the one that it leaves, whether it may be left out.

    @graph_pass(reads=Planned, writes=Rotated, summary="every planned GEMM as A · Bᵀ …")
    def rotate(state: State) -> None: …

The order of the passes, the names that ``disable_passes`` takes and the table in ``docs/architecture.md`` follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quartet.passes.sites import Found
from quartet.passes.state import State


class PassOrderError(ValueError):
    """A list of passes in which one takes what none before it leaves."""


@dataclass(frozen=True)
class GraphPass:
    """A function that rewrites the graph of a state, and what it declares.

    Attributes:
        reads: the phase of the sites that it takes; None where it looks at the graph alone.
        writes: the latest phase that it leaves sites in; None where it leaves all as they are.
        optional: whether ``disable_passes`` may name it.
        unplanned: whether it also runs behind ``plan`` on a graph in which nothing is planned.
        summary: what it does, in a line of ``docs/architecture.md``.
    """

    function: Callable[[State], None]
    reads: type[Found] | None = None
    writes: type[Found] | None = None
    optional: bool = False
    summary: str = ""
    unplanned: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    def __call__(self, state: State) -> None:
        """Rewrite the graph. Raises PassOrderError where a site is not left as declared."""
        before = state.sites
        self.function(state)
        same = set(map(id, before))  # nearly all; to compare a site by what it holds takes long
        for site in state.sites:
            declared = self.writes is not None and issubclass(self.writes, type(site))
            if not declared and id(site) not in same and site not in before:
                raise PassOrderError(f"pass {self.name!r} leaves a site as {type(site).__name__}, which is not "
                                     "what it declares to write")


def graph_pass(*, reads: type[Found] | None = None, writes: type[Found] | None = None, optional: bool = False,
               summary: str = "", unplanned: bool = False) -> Callable[[Callable[[State], None]], GraphPass]:
    """Declare a function to be a pass; the arguments are those of :class:`GraphPass`."""
    return lambda function: GraphPass(function, reads, writes, optional, summary, unplanned)


def in_order(*passes: GraphPass) -> tuple[GraphPass, ...]:
    """The passes, if each finds the phase that it takes, also where the optional ones are left out.

    Raises PassOrderError.
    """
    written: list[type[Found]] = []
    for one in passes:
        if one.reads is not None and not any(issubclass(phase, one.reads) for phase in written):
            raise PassOrderError(f"pass {one.name!r} takes sites that are {one.reads.__name__}, which no pass before "
                                 "it that is always run leaves")
        if one.writes is not None and not one.optional:
            written.append(one.writes)
    return passes


def table(passes: Sequence[GraphPass]) -> str:
    """The passes as a table in Markdown."""
    rows = [f"| `{one.name}` | {_phases(one)} | {'yes' if one.optional else ''} | {one.summary} |" for one in passes]
    return "\n".join(("| pass | sites | optional | what it does |", "|---|---|---|---|", *rows))


def _phases(one: GraphPass) -> str:
    read, written = ("" if phase is None else phase.__name__.lower() for phase in (one.reads, one.writes))
    return f"{read} → {written}".strip() if written else read
