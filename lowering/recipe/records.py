"""What happened to one matmul: the row that ``explain``, the log and the dumps share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from quartet.lowering.recipe.types import ROLES

Size = int | str


@dataclass(frozen=True)
class MatmulRecord:
    """One matrix product ``[m, k] · [k, n]`` of a compiled graph and the kernel that computes it.

    Args:
        site: number of the forward matmul that this one belongs to; its dgrad and wgrad share it.
        fqn: fully qualified name of the module, ``"layers.0.q_proj"``; empty when there is none.
        op_class: one of ``quartet.lowering.recipe.op_classes.op_classes()``.
        role: ``"fprop"``, ``"dgrad"`` or ``"wgrad"``.
        m, n, k: sizes; a symbolic size is its expression as text, ``"s0*s1"``. Of an embedding: tokens, width and
            rows of the table.
        batch: how many such products there are.
        called: its layer's part of what graphs take the host to be called, by which it was priced.
        dtype: dtype of the product, ``"bfloat16"``.
        recipe: name of the recipe planned for it, or None.
        kernel: name of the kernel that runs it, or None when it was left alone.
        reason: why it was left alone, else ``""``.
        saved_bytes: bytes kept for backward on behalf of this matmul; None when unknown.
        notes: remarks for the reader, ``("padded k 80 → 96",)``.
    """

    site: int
    fqn: str
    op_class: str
    role: str
    m: Size
    n: Size
    k: Size
    dtype: str
    recipe: str | None = None
    kernel: str | None = None
    reason: str = ""
    saved_bytes: int | None = None
    notes: tuple[str, ...] = ()
    batch: Size = 1
    called: float = 0.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"matmul {self.fqn or self.site}: role {self.role!r} does not exist; "
                             f"possible: {', '.join(ROLES)}")

    @property
    def flops(self) -> int | None:
        """``2·batch·m·n·k``, or None when a size is symbolic; 0 of an embedding, which gathers."""
        if self.op_class == "embedding":
            return 0
        m, n, k, batch = self.m, self.n, self.k, self.batch
        if isinstance(m, int) and isinstance(n, int) and isinstance(k, int) and isinstance(batch, int):
            return 2 * batch * m * n * k
        return None

    @property
    def lowered(self) -> bool:
        """True when a kernel of ours runs this matmul."""
        return self.kernel is not None

    def as_dict(self) -> dict[str, object]:
        """The fields, ``flops`` and ``lowered``, as JSON-serialisable values."""
        return {**asdict(self), "notes": list(self.notes), "flops": self.flops, "lowered": self.lowered}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MatmulRecord:
        """A record from what :meth:`as_dict` made of it."""
        return cls(**_fields(cls, data) | {"notes": tuple(data["notes"])})


@dataclass(frozen=True)
class SavedRecord:
    """One tensor that a compiled graph keeps between forward and backward.

    Args:
        name: its node in the graph. fqn: the module that makes it; empty when there is none.
        op: what computes it, ``"aten.mm"``.
        shape: sizes; a symbolic size is its expression as text.
        dtype: before, ``"bfloat16"``. bytes: of it, symbolic sizes at their hint.
        saved: format that is kept instead, ``"e4m3/16 nearest"``; None when it is left exact.
        saved_bytes: bytes that are kept; equal to ``bytes`` when left exact, 0 when something else that is kept serves.
        reason: why it is left exact, or what serves instead; else the part of the policy that decided.
        seconds: what that is predicted to take; None where it is not known.
    """

    name: str
    fqn: str
    op: str
    shape: tuple[Size, ...]
    dtype: str
    bytes: int
    saved: str | None
    saved_bytes: int
    reason: str
    seconds: float | None = None

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON-serialisable values."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SavedRecord:
        """A record from what :meth:`as_dict` made of it."""
        return cls(**_fields(cls, data) | {"shape": tuple(data["shape"])})


@dataclass(frozen=True)
class Tradeoff:
    """One point of a frontier: bytes kept, their share of the unquantised, and seconds beyond keeping everything."""

    bytes: int
    share: float
    seconds: float


@dataclass(frozen=True)
class MemoryRecord:
    """What was chosen to be kept of one compiled graph.

    Args:
        budget: what was asked for. limit: in bytes; None for no limit, as for the fewest bytes.
        lossless: only among choices that change no number, as by default.
        unquantised_bytes: what the same graph keeps between forward and backward without us, in its own dtypes.
        saved_bytes: what it keeps now. least: the fewest bytes that could have been chosen.
        seconds: predicted, of a step, beyond keeping everything exactly.
        nominal: no rates are known for the device: seconds are good for an order only.
        again: groups of products that backward runs again. weights: parameters that it quantises again.
        encoded: tensors that are kept in fewer bits.
        slack: by how many bytes the budget may be undershot for the number of choices; 0: the choice is the best.
        frontier: what could have been chosen instead, from the least bytes to the least time.
    """

    budget: str
    limit: int | None
    lossless: bool
    unquantised_bytes: int
    saved_bytes: int
    least: int
    seconds: float
    nominal: bool
    again: int
    weights: int
    encoded: int
    slack: int
    frontier: tuple[Tradeoff, ...]

    @property
    def fits(self) -> bool:
        """Whether what is kept is within the budget."""
        return self.limit is None or self.saved_bytes <= self.limit

    @property
    def open(self) -> bool:
        """Whether anything could be chosen: a tensor to be kept in fewer bits, or a product to run again."""
        return len(self.frontier) > 1

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON-serialisable values."""
        return {**asdict(self), "frontier": [asdict(point) for point in self.frontier]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryRecord:
        """A record from what :meth:`as_dict` made of it."""
        return cls(**_fields(cls, data) | {"frontier": tuple(Tradeoff(**point) for point in data["frontier"])})


def _fields(record: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: data[f.name] for f in fields(record) if f.name in data}
