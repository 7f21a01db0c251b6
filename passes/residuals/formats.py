"""In which formats one kept tensor can be, what each takes, and which of them the policy leaves to be chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from quartet.kernels.reference.formats.saved import ROW, saved_bytes_per_element
from quartet.kernels.spec import QuantSpec
from quartet.lowering import ir, registry
from quartet.lowering.ir.graph import Builder, argument, aten, results, shape, source, source_of, val
from quartet.lowering.ir.ops.fp8 import CAST, CAST_BY_ROWS, CODES_KEY
from quartet.lowering.ir.ops.fused import QUANTIZE_BYTES
from quartet.lowering.ir.views import Dequantize
from quartet.lowering.recipe.resolution import SavedChoice
from quartet.lowering.recipe.types import Saved
from quartet.passes.residuals.boundary import Kept, Storage, dense_order, stored_bytes
from quartet.passes.residuals.knapsack import Choice
from quartet.passes.residuals.lossless import Backward, read_by_attention, why_exact
from quartet.passes.residuals.prices import Prices
from quartet.runtime.devices import Target
from quartet.runtime.sizes import hint, same_sizes
from quartet.runtime.view_ops import COPIES, RESHAPES

CHOOSABLE = ((Saved("e4m3", ROW, attention=True), Saved("uint8", 64, "stochastic", attention=True)),
             (Saved("uint6", 64, "stochastic", attention=True),))
"""What may be chosen for a tensor of which no rule says anything: of each group the first that a device's code makes.
Four bits are not among them: over four seeds their loss was further from BF16's than that of eight and six."""
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
SERVED = "from the codes of a product's operand, which are kept anyway"


@dataclass(frozen=True)
class Way:
    """One way to keep a storage: exactly, or in a format; why, and what it takes.

    ``served``: codes of a product's operand that are kept anyway serve instead.
    """

    saved: Saved | None
    reason: str
    cost: Choice
    served: Codes | None = None


@dataclass(frozen=True)
class Codes:
    """Kept codes ``[rows, padded]`` of a tensor with so many columns, or of its transpose; nodes of backward.

    ``links``: the operators that lead to that tensor from the one that the codes serve for.
    """

    spec: str
    codes: Node
    scales: Node
    columns: Any
    transposed: bool
    links: tuple[Node, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether they are the tensor to eight bits, rounded to nearest under a scale of its own."""
        spec = QuantSpec.parse(self.spec)
        return not spec.stochastic and not spec.takes_amax and spec.bits == 8 and spec.element != "ternary"

    def values(self, build: Builder) -> Node:
        """The tensor that they serve for, with its strides."""
        x = source_of(self.links[-1])
        values = Dequantize(self.codes, self.scales, QuantSpec.parse(self.spec), val(x).dtype).emit(build)
        values = build.transpose(values) if self.transposed else build.columns(values, self.columns)
        for link in reversed(self.links[:-1]):
            if link.target is aten.permute.default:
                values = build.permuted_back(values, argument(link, "dims"))
            else:
                sizes = shape(source_of(link))
                values = build(aten.reshape.default, values, [build.size(size) for size in sizes])
        return _laid_out_like(source_of(self.links[0]), values, build)


def _laid_out_like(tensor: Node, values: Node, build: Builder) -> Node:
    """``values`` with the strides of a dense tensor of their shape: attention's backward on a CPU reads its result by
    them, whatever the innermost one is."""
    order = dense_order(tensor)
    if order is None or same_sizes(val(values).stride(), val(tensor).stride()):
        return values
    return build.permuted_back(build.contiguous(build(aten.permute.default, values, order)), order)


class Served:
    """Which tensors the eight-bit codes stand for that are ``kept`` for products; with ``orders`` also those that are
    an operand in another order, as heads laid beside each other."""

    def __init__(self, kept: Sequence[Kept], orders: bool) -> None:
        self._links = RESHAPES | COPIES | {aten.permute.default} if orders else _VIEWS
        self._read = {one.made: one.read for one in kept}
        self._scales = {one.made.meta[CODES_KEY]: one.read for one in kept if CODES_KEY in one.made.meta}

    def of(self, storage: Storage) -> Codes | None:
        """Codes of this very tensor, if there are any."""
        todo: list[tuple[Node, tuple[Node, ...]]] = [(storage.root, ())]
        while todo:
            node, passed = todo.pop()
            for user in (user for user in node.users if source(user) is node):
                if user.target in self._links:
                    todo.append((user, (*passed, user)))
                elif (found := self._codes_of(user)) is not None and found.usable:
                    return replace(found, links=(*passed, user))
        return None

    def _codes_of(self, user: Node) -> Codes | None:
        """What is kept of the results of a quantiser or of a cast to FP8, None where codes or scales are not."""
        items = {index: self._read[n] for index, n in results(user).items() if n in self._read}
        if user.target in (ir.QUANTIZE, QUANTIZE_BYTES):
            spec, codes, scales, flipped = argument(user, "spec"), items.get(0), items.get(1), False
        elif user.target in (CAST, CAST_BY_ROWS) and CODES_KEY in user.meta:
            spec, scales = user.meta[CODES_KEY][0], self._scales.get(user.meta[CODES_KEY])
            flipped = 0 not in items
            codes = items.get(int(flipped))
        else:
            return None
        if codes is None or scales is None:
            return None
        return Codes(spec, codes, scales, shape(source_of(user))[1], flipped)


def not_generated(saved: Saved, target: Target) -> str | None:
    """Why code that Inductor generates for a device cannot make a format's codes; None where it can."""
    if saved.element != "e4m3" or registry.not_generated(target, QuantSpec.parse("e4m3/16 fp32 amax nearest")) is None:
        return None
    return (f"generated code has no {saved.element} on {target}: Triton converts to it from compute capability 8.9 on; "
            "take a format of bytes, such as mesa8")


@dataclass(frozen=True)
class Formats:
    """What can be done with the storages of one divided graph.

    Args:
        resolve: module → what the policy says of what it leaves for backward.
        shown: the roots of the user's own results. seen: backward, as it was divided.
        chooses: tensors of which the policy says nothing may be encoded.
        target, prices: of a storage's device.
        served: codes that are kept anyway and can serve instead of a storage.
    """

    resolve: Callable[[str | None], SavedChoice]
    shown: Collection[Node]
    seen: Backward
    chooses: bool
    target: Callable[[Storage], Target]
    prices: Callable[[Storage], Prices]
    served: Served

    def ways(self, storage: Storage, fqn: str | None) -> list[Way]:
        """What can be done with a storage; the first is to leave it as it is, unless a rule names a format for it."""
        choice, exact = self.resolve(fqn), Choice(stored_bytes(storage), 0)
        if choice.saved is not None:
            return [self._in(storage, choice.saved, choice.reason) or self._exactly(storage, choice.saved, exact)]
        if choice.rule is not None or not self.chooses:
            return [Way(None, choice.reason, exact)]
        groups = ([self._in(storage, saved, "chosen for the budget") for saved in group] for group in CHOOSABLE)
        found = [way for group in groups if (way := next(filter(None, group), None)) is not None]
        if not found:
            return [self._exactly(storage, CHOOSABLE[-1][-1], exact)]
        return [Way(None, "kept as it is: the budget has room for it", exact), *found]

    def _in(self, storage: Storage, saved: Saved, reason: str) -> Way | None:
        """In a format; None where that cannot be."""
        if why_exact(storage, self.shown, self.seen, saved) is not None:
            return None
        if (codes := self.served.of(storage)) is not None:
            elements = hint(val(storage.source).numel())
            return Way(saved, SERVED, Choice(0, self.prices(storage).passes(elements)), codes)
        if not_generated(saved, self.target(storage)) is not None:
            return None
        return Way(saved, reason, self._encoded(storage, saved))

    def _exactly(self, storage: Storage, saved: Saved, exact: Choice) -> Way:
        """As it is, because it cannot be in a format."""
        why = why_exact(storage, self.shown, self.seen, saved) or not_generated(saved, self.target(storage))
        return Way(None, why or "", exact)

    def _encoded(self, storage: Storage, saved: Saved) -> Choice:
        value, order = val(storage.source), dense_order(storage.source)
        assert order is not None
        elements, last = hint(value.numel()), hint(shape(storage.source)[order[-1]])
        size = round(elements * saved_bytes_per_element(saved.element, saved.group, last))
        passes = 1 + read_by_attention(storage, self.seen) + (saved.rounding == "stochastic")
        return Choice(size, self.prices(storage).passes(elements, passes))
