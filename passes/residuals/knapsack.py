"""The cheapest way to keep a number of things within so many bytes: a multiple-choice knapsack, solved exactly.

    minimise  Σ time(i, c_i)   where   Σ bytes(i, c_i) ≤ limit,   one choice c_i for each item i

All points that no other beats in both bytes and time are found item by item (Nemhauser and Ullmann, 1969): a point of
the first i items is one of the first i − 1 and a choice. Numbers are integers, so the result does not depend on the
order of sums. Layers are alike, so that few sums are different. Where there are more than ``MOST`` points after all,
one is kept in each of ``MOST`` equal ranges of bytes, its fastest; ``Frontier.slack`` is the sum of these ranges: what
is found within a limit is as fast as anything within ``limit − slack``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST = 4096


@dataclass(frozen=True)
class Choice:
    """What one way to keep an item takes: bytes, and time in femtoseconds."""

    bytes: int
    time: int


@dataclass(frozen=True)
class Point:
    """One choice for every item: which, and what they take together."""

    bytes: int
    time: int
    picks: tuple[int, ...]


class Frontier:
    """The points that no other beats, from the least bytes to the least time.

    Args:
        items: for each item its choices; of equal ones the first is taken.
    """

    def __init__(self, items: Sequence[Sequence[Choice]], most: int = MOST) -> None:
        self.slack = 0
        self._steps: list[list[tuple[int, int]]] = []  # item by item: of each point (the one before it, choice)
        self.totals = [(0, 0)]
        for choices in items:
            merged = sorted((size + c.bytes, time + c.time, pick, before)
                            for pick, c in enumerate(choices) for before, (size, time) in enumerate(self.totals))
            points = merged[:1]
            for point in merged[1:]:
                if point[1] < points[-1][1]:
                    points.append(point)
            if len(points) > most:
                points = self._thinned(points, most)
            self._steps.append([(before, pick) for _, _, pick, before in points])
            self.totals = [(size, time) for size, time, _, _ in points]

    def _thinned(self, points: list[tuple[int, int, int, int]], most: int) -> list[tuple[int, int, int, int]]:
        least, width = points[0][0], -(-(points[-1][0] - points[0][0] + 1) // (most - 1))
        self.slack += width
        fastest = {(point[0] - least) // width: point for point in points}
        return [points[0], *(point for point in fastest.values() if point is not points[0])]

    def point(self, index: int) -> Point:
        """One of the points, with its choices."""
        picks, at = [], index
        for step in reversed(self._steps):
            at, pick = step[at]
            picks.append(pick)
        return Point(*self.totals[index], tuple(reversed(picks)))

    def least(self) -> Point:
        """The point of the fewest bytes."""
        return self.point(0)

    def within(self, limit: int | None) -> Point | None:
        """The fastest point of at most so many bytes, None where there is none; no limit: the fastest of all."""
        fitting = [i for i, (size, _) in enumerate(self.totals) if limit is None or size <= limit]
        return self.point(fitting[-1]) if fitting else None
