"""In which formats one kept tensor can be, what each takes, and which of them the policy leaves to be chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch.fx import Node

from quartet.kernels.reference.formats.saved import saved_bytes_per_element
from quartet.kernels.spec import QuantSpec
from quartet.lowering import registry
from quartet.lowering.ir.graph import shape, val
from quartet.lowering.recipe.resolution import SavedChoice
from quartet.lowering.recipe.types import Saved
from quartet.passes.residuals.boundary import Storage, dense_order, stored_bytes
from quartet.passes.residuals.knapsack import Choice
from quartet.passes.residuals.lossless import Backward, read_by_attention, why_exact
from quartet.passes.residuals.prices import Prices
from quartet.runtime.devices import Target
from quartet.runtime.sizes import hint

CHOOSABLE = ((Saved("e4m3", 16, attention=True), Saved("uint8", 64, "stochastic", attention=True)),
             (Saved("uint6", 64, "stochastic", attention=True),))
"""What may be chosen for a tensor of which no rule says anything: of each group the first that a device's code makes.
Four bits are not among them: over four seeds their loss was further from BF16's than that of eight and six."""
SERVED = "from the codes of a product's operand, which are kept anyway"


@dataclass(frozen=True)
class Way:
    """One way to keep a storage: exactly, or in a format; why, and what it takes.

    ``served``: codes of a product's operand that are kept anyway serve instead.
    """

    saved: Saved | None
    reason: str
    cost: Choice
    served: bool = False


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
        served: whether codes that are kept anyway can serve instead of a storage.
    """

    resolve: Callable[[str | None], SavedChoice]
    shown: Collection[Node]
    seen: Backward
    chooses: bool
    target: Callable[[Storage], Target]
    prices: Callable[[Storage], Prices]
    served: Callable[[Storage], bool]

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
        if self.served(storage):
            elements = hint(val(storage.source).numel())
            return Way(saved, SERVED, Choice(0, self.prices(storage).passes(elements)), served=True)
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
