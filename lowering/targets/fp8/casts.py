"""A quantise node with one scale a tensor on its way to a cast: what is read of it, what its X is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from quartet.kernels import reference
from quartet.kernels.spec import QuantSpec
from quartet.lowering.ir.graph import Builder, Traced, aten, results, shape, source_of, val
from quartet.lowering.ir.ops.fp8 import CAST_BY_ROWS, CASTS, CASTS_BY_KNOWN, CASTS_BY_ROWS, CODES_KEY, SCALES
from quartet.lowering.ir.ops.grouped import PAD_GROUPS
from quartet.lowering.ir.views import Quantize
from quartet.lowering.targets.fp8.delayed import History, Tables
from quartet.lowering.targets.fp8.weights import one_of
from quartet.runtime.view_ops import RESHAPES

MOST_ROWS = 1 << 17  # whose magnitudes one program looks through
FEW_ROWS = 1 << 13  # whose magnitudes every program of a cast looks through
_WORD = 4  # rows: codes of so many are written at once to the transpose


@dataclass(frozen=True)
class Cast:
    """Which results of a quantiser are read.

    Args:
        history: by what earlier steps knew it is scaled, if it is.
        items: codes and scales, by their number. flipped: transposes of the codes.
        plain: whether something else reads the codes.
    """

    x: Node
    spec: QuantSpec
    amax: Node | None
    history: History | None
    items: dict[int, Node]
    flipped: list[Node]
    plain: bool

    @staticmethod
    def of(quantizer: Node) -> Cast:
        made, items = Quantize.of(quantizer), results(quantizer)
        users = list(items[0].users) if 0 in items else []
        flipped = [user for user in users if user.target is aten.permute.default]
        return Cast(made.x, made.spec, made.amax, History.of(made.amax, quantizer), items, flipped,
                    len(flipped) < len(users))

    @property
    def turned(self) -> bool:
        return bool(self.flipped)

    @property
    def by_words(self) -> bool:
        """Whether the kernels that cast several in a launch take it: a matrix as it lies in memory."""
        x = val(self.x)
        return (self.spec.block == "tensor" and self.x.target is not PAD_GROUPS and x.element_size() == 2
                and all(isinstance(size, int) for size in x.shape) and x.stride(1) == 1
                and 0 < x.shape[0] <= MOST_ROWS and x.shape[0] % _WORD == 0 and x.numel() > 0
                and (self.plain or self.turned))

    def hand_over(self, codes: Node | None, transposed: Node | None, scale: Node) -> None:
        """What reads the quantiser's results reads these instead; None for codes that nothing reads."""
        for user in self.flipped:
            assert transposed is not None
            user.replace_all_uses_with(transposed)
        for index, value in enumerate((codes, scale)):
            if index in self.items and value is not None:
                self.items[index].replace_all_uses_with(value)


class Delayed:
    """Casts of a graph by what was known, and the magnitudes that they find: of a node of amax(x) that of its cast."""

    def __init__(self) -> None:
        self.seen: dict[Node, Node] = {}
        self._tables = Tables()

    def cast(self, build: Builder, casts: list[Cast]) -> None:
        """All in one launch, under one margin."""
        histories = [cast.history for cast in casts if cast.history is not None]
        known = [self._tables.known(build, history) for history in histories]
        made = build(CASTS_BY_KNOWN, [cast.x for cast in casts], known, str(casts[0].spec), histories[0].margin,
                     casts[0].plain, casts[0].turned)
        count = len(casts) * (casts[0].plain + casts[0].turned)
        table, seen = build.item(made, count), build.item(made, count + 1)
        hand_over_all(build, casts, made, [one_of(build, table, i) for i in range(len(casts))])
        for i, history in enumerate(histories):
            self.seen.setdefault(history.current, build(aten.select.int, seen, 0, i))


def hand_over_all(build: Builder, casts: list[Cast], made: Node, scales: list[Node]) -> None:
    """The codes of all, then the transposes of all, as far as they are wanted, are those that ``made`` lists."""
    plain, turned = casts[0].plain, casts[0].turned
    for i, (cast, scale) in enumerate(zip(casts, scales, strict=True)):
        cast.hand_over(build.item(made, i) if plain else None,
                       build.item(made, i + len(casts) * plain) if turned else None, scale)


def magnitudes_of_rows(build: Builder, traced: Traced, x: Node) -> Node | None:
    """The largest of each row, which Inductor finds in the kernel that makes the rows; None of sizes that are not
    known, or where there is none.

    They are found of what x shows, where the shapes are those of the loops: of x itself Inductor 2.11 leaves them out
    of the kernels in which it reduces along rows and columns at once, as in the backward of a norm. What is copied into
    the order of x, as heads are, has those of x.
    """
    if not all(isinstance(size, int) for size in shape(x)) or val(x).numel() == 0:
        return None
    shown = x
    while shown.target in RESHAPES and shape(source_of(shown))[-1:] == shape(x)[-1:]:
        shown = source_of(shown)
    copied = shown.target in RESHAPES and source_of(shown).target is aten.clone.default
    (found,) = traced(build, _largest_of_rows, [x if copied else shown], "rows")
    return found


def _largest_of_rows(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x.abs().amax(-1),)


def largest_magnitude(build: Builder, traced: Traced, x: Node) -> Node:
    """fp32 ``[1, 1]``, in ops that Inductor inlines."""
    (found,) = traced(build, lambda t: (reference.largest_magnitude(t),), [x], "amax")
    return found


def scales_by(build: Builder, magnitudes: list[Node], spec: QuantSpec) -> tuple[Node, list[tuple[Node, Node]]]:
    """The multipliers of several tensors as a table, and of each its multiplier and scale."""
    tables = build(SCALES, magnitudes, str(spec))
    multipliers, scales = build.item(tables, 0), build.item(tables, 1)
    return multipliers, [(one_of(build, multipliers, i), one_of(build, scales, i)) for i in range(len(magnitudes))]


def cast_by_rows(build: Builder, casts: list[Cast], magnitudes: list[Node]) -> None:
    """All in one launch, which finds their scales too where the magnitudes are few."""
    first, several = casts[0], [cast.x for cast in casts]
    if all(few(rows) for rows in magnitudes):
        made = build(CASTS_BY_ROWS, several, magnitudes, str(first.spec), first.plain, first.turned)
        table = build.item(made, len(casts) * (first.plain + first.turned))
        scales = [one_of(build, table, i) for i in range(len(casts))]
    else:
        table, pairs = scales_by(build, magnitudes, first.spec)
        made = build(CASTS, several, table, first.spec.element, first.plain, first.turned)
        scales = [scale for _, scale in pairs]
    hand_over_all(build, casts, made, scales)


def cast_one_by_rows(build: Builder, cast: Cast, magnitudes: Node) -> None:
    """The same of one tensor."""
    made = build(CAST_BY_ROWS, cast.x, magnitudes, str(cast.spec), cast.plain, cast.turned)
    scale = build.item(made, 2)
    share_codes(made, scale, cast.spec)
    cast.hand_over(build.item(made, 0), build.item(made, 1), scale)


def few(magnitudes: Node) -> bool:
    """Whether every program of a cast can look through them."""
    return val(magnitudes).numel() <= FEW_ROWS


def share_codes(cast: Node, scale: Node, spec: QuantSpec) -> None:
    """Note of what a cast gives how it is read."""
    cast.meta[CODES_KEY] = scale.meta[CODES_KEY] = (str(spec), cast.name)
