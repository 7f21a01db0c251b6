"""Which CUTLASS kernels exist, and which of them computes a product.

A :class:`Configuration` is one kernel: everything that is fixed when it is compiled. ``TABLE`` lists the tiles of each
architecture and kind in order of preference, larger before smaller; :func:`choose` is the rule that picks for a shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

KINDS = ("mxf4", "nvf4", "mxf8")
ARCHS = ("sm_100a", "sm_103a", "sm_120a", "sm_121a")
OUTPUTS = ("bf16", "fp16", "fp32")
SCHEDULES = ("1sm", "2sm", "1sm-ultra", "2sm-ultra", "cooperative", "pingpong")

BLOCK = {"mxf4": 32, "nvf4": 16, "mxf8": 32}  # elements along K that share a scale factor
ELEMENT_BITS = {"mxf4": 4, "nvf4": 4, "mxf8": 8}
K_MULTIPLE = {"mxf4": 32, "nvf4": 32, "mxf8": 32}  # whole 16-byte units a row of A and B, and whole scale blocks
N_MULTIPLE = {"bf16": 8, "fp16": 8, "fp32": 4}  # whole 16-byte units a row of C and D
ARCH_OF_CAPABILITY = {(10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a", (12, 1): "sm_121a"}
MULTIPROCESSORS = {"sm_100a": 148, "sm_103a": 148, "sm_120a": 188, "sm_121a": 48}  # B200, B300, RTX PRO 6000, GB10
LARGEST_EXTENT = 2**31 - 1

_PAIR = r"\.2CTA"
_UMMA = {"mxf4": "UTCOMMA{}", "nvf4": r"UTCOMMA{}\.4X", "mxf8": "UTCQMMA{}"}
_WARP = {"mxf4": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.E8", "nvf4": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X",
         "mxf8": r"QMMA\.SF\.16832\.F32\.E4M3\.E4M3\.E8"}
INSTRUCTION = {"sm_100a": _UMMA, "sm_103a": _UMMA | {"nvf4": r"UTCOMMA{}\.BLOCK16"}, "sm_120a": _WARP, "sm_121a": _WARP}


class ConfigurationError(ValueError):
    """A kernel that does not exist, or that does not compute what was asked; the message says what is possible."""


@dataclass(frozen=True)
class Configuration:
    """One block-scaled GEMM kernel, ``D = alpha · A · Bᵀ (+ bias) (+ C)``.

    Args:
        kind: ``mxf4`` (E2M1, E8M0 scale a block of 32), ``nvf4`` (E2M1, E4M3 scale a block of 16) or ``mxf8`` (E4M3,
            E8M0 scale a block of 32); both operands are of one kind.
        arch: what it is compiled for, one of ``ARCHS``; the code runs on no other.
        tile: (M, N, K) of the output tile that a group of cooperating multiprocessors computes, and its step along K.
        cluster: (M, N) thread blocks in a cluster.
        schedule: how the tile is computed. ``1sm`` and ``2sm``: by the fifth-generation tensor cores of one
            multiprocessor or of two together; ``-ultra``: with sm_103a's instruction that takes 96 elements of K;
            ``cooperative`` and ``pingpong``: by the warp-level tensor cores of sm_120a and sm_121a.
        output: dtype of C, D and the bias, one of ``OUTPUTS``. Accumulation is in fp32.
        bias: add a vector ``[N]``.
        accumulate: add a matrix ``C [M, N]``.

    alpha is an fp32 scalar on the device in every kernel.
    """

    kind: str
    arch: str
    tile: tuple[int, int, int]
    cluster: tuple[int, int] = (1, 1)
    schedule: str = "1sm"
    output: str = "bf16"
    bias: bool = False
    accumulate: bool = False

    def __post_init__(self) -> None:
        for field, legal in (("kind", KINDS), ("arch", ARCHS), ("schedule", SCHEDULES), ("output", OUTPUTS)):
            value = getattr(self, field)
            if value not in legal:
                raise ConfigurationError(f"kernel {field} {value!r} does not exist; possible: {', '.join(legal)}")
        entries = _entries(self.arch, self.kind, self.output, self.bias, self.accumulate)
        if (self.tile, self.cluster, self.schedule) not in entries:
            known = ", ".join(_tile_name(*entry) for entry in entries)
            raise ConfigurationError(f"tile {self.tile_name} does not exist for "
                                     f"{self.kind} on {self.arch} with {self.output} output"
                                     f"{', a bias' if self.bias else ''}{', C' if self.accumulate else ''}; "
                                     f"possible: {known}")

    @property
    def name(self) -> str:
        """``quartet_mxf4_sm_100a_256x256x256_2x1_2sm_bf16`` and so on: unique, fit for a file name."""
        extras = ("_bias" if self.bias else "") + ("_accumulate" if self.accumulate else "")
        return f"quartet_{self.kind}_{self.arch}_{self.tile_name}_{self.output}{extras}"

    @property
    def tile_name(self) -> str:
        """``256x256x256_2x1_2sm``: tile, cluster and schedule, which are one of the table's entries."""
        return _tile_name(self.tile, self.cluster, self.schedule)

    @property
    def instruction(self) -> str:
        """The tensor-core instruction in the kernel's SASS, as a regular expression that its whole mnemonic matches."""
        return INSTRUCTION[self.arch][self.kind].format(_PAIR if self.schedule.startswith("2sm") else "")

    def supports(self, m: int, n: int, k: int) -> str | None:
        """:func:`supports` of this kernel."""
        return supports(self.kind, m, n, k, self.output)

    def blocks(self, m: int, n: int) -> int:
        """Multiprocessors that the tiles of an ``[m, n]`` output occupy, had the device as many."""
        group = 2 if self.schedule.startswith("2sm") else 1
        rows, columns = -(-m // self.tile[0]) * group, -(-n // self.tile[1])
        return _round_up(rows, self.cluster[0]) * _round_up(columns, self.cluster[1])


Entry = tuple[tuple[int, int, int], tuple[int, int], str]

_BLACKWELL_4BIT: tuple[Entry, ...] = (
    ((256, 256, 256), (2, 1), "2sm"), ((256, 128, 256), (2, 1), "2sm"), ((128, 128, 256), (1, 1), "1sm"))
_BLACKWELL_8BIT: tuple[Entry, ...] = (
    ((256, 256, 128), (2, 1), "2sm"), ((256, 128, 128), (2, 1), "2sm"), ((128, 128, 128), (1, 1), "1sm"))
_ULTRA_4BIT: tuple[Entry, ...] = (
    ((256, 256, 768), (2, 1), "2sm-ultra"), ((256, 128, 768), (2, 1), "2sm-ultra"),
    ((128, 128, 768), (1, 1), "1sm-ultra"), ((128, 128, 256), (1, 1), "1sm"))
_WARP_4BIT: tuple[Entry, ...] = (  # 256×128×128 is left out: its accumulators spill registers to memory
    ((128, 128, 128), (1, 1), "cooperative"), ((128, 128, 128), (1, 1), "pingpong"),
    ((128, 128, 256), (1, 1), "cooperative"))
_WARP_8BIT: tuple[Entry, ...] = (
    ((128, 128, 128), (1, 1), "cooperative"), ((128, 128, 128), (1, 1), "pingpong"))


def _cooperative(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """What is compiled for sm_121a where ``pingpong`` spills registers there, which it does not on sm_120a."""
    return tuple(entry for entry in entries if entry[2] == "cooperative")


TABLE: dict[str, dict[str, tuple[Entry, ...]]] = {
    "sm_100a": {"mxf4": _BLACKWELL_4BIT, "nvf4": _BLACKWELL_4BIT, "mxf8": _BLACKWELL_8BIT},
    "sm_103a": {"mxf4": _ULTRA_4BIT, "nvf4": _ULTRA_4BIT, "mxf8": _BLACKWELL_8BIT},
    "sm_120a": {"mxf4": _WARP_4BIT, "nvf4": _WARP_4BIT, "mxf8": _WARP_8BIT},
    "sm_121a": {"mxf4": _cooperative(_WARP_4BIT), "nvf4": _WARP_4BIT, "mxf8": _cooperative(_WARP_8BIT)},
}


def _entries(arch: str, kind: str, output: str, bias: bool, accumulate: bool) -> tuple[Entry, ...]:
    """The table, less the tiles 256 wide where D is fp32, a bias or a C is added.

    Their epilogue takes 128 columns at once: with fp32 or a C these leave no room in shared memory for A and B, and
    with a bias registers spill.
    """
    wide_fits = N_MULTIPLE[output] == 8 and not bias and not accumulate
    return tuple(entry for entry in TABLE[arch][kind] if wide_fits or entry[0][1] <= 128)


def supports(kind: str, m: int, n: int, k: int, output: str = "bf16") -> str | None:
    """None when the kernels of a kind compute ``[m, k] × [n, k] → [m, n]``, else why not, with the nearest larger size.

    The demands are the same on every architecture: M is free, rows of K and of N are whole 16-byte units.
    """
    for letter, extent in (("M", m), ("N", n), ("K", k)):
        if not 1 <= extent <= LARGEST_EXTENT:
            return f"{letter} = {extent} is not an extent of a matrix product; use 1 to {LARGEST_EXTENT}"
    for letter, extent, multiple, what in (("K", k, K_MULTIPLE[kind], f"{kind} operands"),
                                           ("N", n, N_MULTIPLE[output], f"{output} output")):
        if extent % multiple:
            return (f"{what} of a CUTLASS kernel need {letter} a multiple of {multiple}, not {extent}; "
                    f"pad it to {_round_up(extent, multiple)}")
    return None


def arch_of(capability: tuple[int, int]) -> str | None:
    """The architecture whose kernels run on a device of that compute capability; None where there are none."""
    return ARCH_OF_CAPABILITY.get(capability)


def table(archs: Sequence[str] = ARCHS, kinds: Sequence[str] = KINDS, output: str = "bf16", bias: bool = False,
          accumulate: bool = False) -> Iterator[Configuration]:
    """Every configuration of ``TABLE`` for those architectures and kinds."""
    for arch in archs:
        for kind in kinds:
            for tile, cluster, schedule in _entries(arch, kind, output, bias, accumulate):
                yield Configuration(kind, arch, tile, cluster, schedule, output, bias, accumulate)


@cache
def every_tile() -> tuple[str, ...]:
    """``tile_name`` of all kernels."""
    return tuple(dict.fromkeys(configuration.tile_name for configuration in table()))


@lru_cache(maxsize=4096)
def choose(arch: str, kind: str, m: int, n: int, k: int, *, output: str = "bf16", bias: bool = False,
           accumulate: bool = False, multiprocessors: int | None = None) -> Configuration:
    """The configuration for ``[m, k] × [n, k] → [m, n]``, by reasoning and not by measurement:

    1. Along M, then N, then K, a tile of which the product fills no more than half is passed over; where all are, the
       shortest along that axis stay.
    2. Of the others the first, the largest, whose tiles occupy every multiprocessor is taken: a larger tile reads less
       memory for each product.
    3. If none does, the one that occupies the most; the larger of equals.

    So on sm_100a up to 128 rows run in 128×128 tiles of one multiprocessor, up to 256 rows in 256×128 tiles of two, and
    a training step's products in 256×256 tiles of two.

    Args:
        multiprocessors: of the device; by default ``MULTIPROCESSORS[arch]``.
    Raises:
        ConfigurationError: :func:`supports` declines.
    """
    reason = supports(kind, m, n, k, output)
    if reason is not None:
        raise ConfigurationError(reason)
    candidates = list(table([arch], [kind], output, bias, accumulate))
    for axis, extent in enumerate((m, n, k)):
        shortest = min(c.tile[axis] for c in candidates)
        candidates = [c for c in candidates if c.tile[axis] < max(2 * extent, shortest + 1)]
    available = MULTIPROCESSORS[arch] if multiprocessors is None else multiprocessors
    return next((c for c in candidates if c.blocks(m, n) >= available), max(candidates, key=lambda c: c.blocks(m, n)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _tile_name(tile: tuple[int, int, int], cluster: tuple[int, int], schedule: str) -> str:
    return f"{'x'.join(map(str, tile))}_{'x'.join(map(str, cluster))}_{schedule}".replace("-", "_")
