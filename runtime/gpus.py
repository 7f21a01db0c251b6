"""What data sheets say of GPUs, by the names that they give themselves; of others an estimate from their properties.

Operations a second are those of dense operands with sums in fp32, bytes a second those of the memory. The clock is the
one at which the multiprocessors reach these operations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

T = 1e12


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Args:
        name: as a target, ``"h100 pcie"``.
        capability: compute capability.
        bf16, fp8, int8, fp4: operations a second of its tensor cores; 0 where it has none of these.
        bandwidth: bytes a second of its memory.
        processors: multiprocessors. clock: cycles a second.
        pattern: what ``torch.cuda.get_device_name`` says of it, without the maker's name.
        estimated: made from the properties of a device that no data sheet is known of.
    """

    name: str
    capability: tuple[int, int]
    bf16: float
    fp8: float
    int8: float
    fp4: float
    bandwidth: float
    processors: int
    clock: float
    pattern: str = ""
    estimated: bool = False

    @property
    def architecture(self) -> str:
        return "sm_{}{}".format(*self.capability)

    def operations(self, dtype: str) -> float:
        """A second, of ``"bf16"``, ``"fp8"``, ``"int8"`` or ``"fp4"`` operands; 0 where it has no such tensor cores."""
        return {"bf16": self.bf16, "fp8": self.fp8, "int8": self.int8, "fp4": self.fp4}[dtype]


def _gpu(name: str, capability: tuple[int, int], tera: tuple[float, float, float, float], bandwidth: float,
         processors: int, gigahertz: float, pattern: str | None = None) -> Gpu:
    bf16, fp8, int8, fp4 = (T * value for value in tera)
    return Gpu(name, capability, bf16, fp8, int8, fp4, T * bandwidth, processors, 1e9 * gigahertz,
               re.escape(name) if pattern is None else pattern)


GPUS: tuple[Gpu, ...] = (
    # name, compute capability, TFLOPS of (bf16, fp8, int8, fp4), TB/s, multiprocessors, GHz
    _gpu("a100", (8, 0), (312, 0, 624, 0), 2.039, 108, 1.41, "a[18]00 sxm4 80gb"),
    _gpu("a100 40gb", (8, 0), (312, 0, 624, 0), 1.555, 108, 1.41, "a100 (sxm4|pcie|pg509 200)( 40gb)?"),
    _gpu("a100 pcie", (8, 0), (312, 0, 624, 0), 1.935, 108, 1.41, "a[18]00 80gb pcie"),
    _gpu("a30", (8, 0), (165, 0, 330, 0), 0.933, 56, 1.44),
    _gpu("a10", (8, 6), (125, 0, 250, 0), 0.600, 72, 1.695),
    _gpu("a10g", (8, 6), (70, 0, 140, 0), 0.600, 80, 1.71),
    _gpu("a40", (8, 6), (149.7, 0, 299.3, 0), 0.696, 84, 1.74),
    _gpu("rtx a6000", (8, 6), (154.8, 0, 309.7, 0), 0.768, 84, 1.80),
    _gpu("rtx 3080", (8, 6), (59.5, 0, 238, 0), 0.760, 68, 1.71, "geforce rtx 3080"),
    _gpu("rtx 3090", (8, 6), (71, 0, 284, 0), 0.936, 82, 1.695, "geforce rtx 3090"),
    _gpu("rtx 3090 ti", (8, 6), (80, 0, 320, 0), 1.008, 84, 1.86, "geforce rtx 3090 ti"),
    _gpu("l4", (8, 9), (121, 242, 242, 0), 0.300, 58, 2.04),
    _gpu("l40", (8, 9), (181, 362, 362, 0), 0.864, 142, 2.49),
    _gpu("l40s", (8, 9), (362, 733, 733, 0), 0.864, 142, 2.49),
    _gpu("rtx 6000 ada", (8, 9), (364.2, 728.5, 728.5, 0), 0.960, 142, 2.505, "rtx 6000 ada generation"),
    _gpu("rtx 4080", (8, 9), (97.5, 194.9, 389.9, 0), 0.717, 76, 2.505, "geforce rtx 4080"),
    _gpu("rtx 4090", (8, 9), (165.2, 330.3, 660.6, 0), 1.008, 128, 2.52, "geforce rtx 4090"),
    _gpu("h20", (9, 0), (148, 296, 296, 0), 4.0, 78, 1.98),
    _gpu("h100", (9, 0), (989, 1979, 1979, 0), 3.35, 132, 1.83, "h[18]00( 80gb hbm3| sxm5)?"),
    _gpu("h100 pcie", (9, 0), (756, 1513, 1513, 0), 2.0, 114, 1.62, "h[18]00 pcie"),
    _gpu("h100 nvl", (9, 0), (835, 1671, 1671, 0), 3.9, 132, 1.545),
    _gpu("h200", (9, 0), (989, 1979, 1979, 0), 4.8, 132, 1.83),
    _gpu("h200 nvl", (9, 0), (835, 1671, 1671, 0), 4.8, 132, 1.545),
    _gpu("gh200", (9, 0), (989, 1979, 1979, 0), 4.0, 132, 1.83, "gh200 (480|120)gb"),
    _gpu("gh200 144gb", (9, 0), (989, 1979, 1979, 0), 4.9, 132, 1.83, "gh200 (144g|144gb|624gb)( hbm3e)?"),
    _gpu("b200", (10, 0), (2250, 4500, 4500, 9000), 7.7, 148, 1.856),
    _gpu("gb200", (10, 0), (2500, 5000, 5000, 10000), 8.0, 148, 2.06),
    _gpu("b300", (10, 3), (2250, 4500, 150, 14000), 8.0, 148, 1.856, "b300( sxm6 ac)?"),
    _gpu("gb300", (10, 3), (2500, 5000, 167, 15000), 8.0, 148, 2.06),
    _gpu("rtx 5080", (12, 0), (112.6, 225.1, 450.2, 900.4), 0.960, 84, 2.617, "geforce rtx 5080"),
    _gpu("rtx 5090", (12, 0), (209.5, 419, 838, 1676), 1.792, 170, 2.407, "geforce rtx 5090"),
    _gpu("rtx pro 6000", (12, 0), (503.8, 1007.6, 1007.6, 2015.2), 1.792, 188, 2.617,
         "rtx pro 6000 blackwell workstation edition"),
    _gpu("rtx pro 6000 server", (12, 0), (503.8, 1007.6, 1007.6, 2015.2), 1.597, 188, 2.617,
         "rtx pro 6000 blackwell server edition"),
    _gpu("gb10", (12, 1), (125, 250, 250, 500), 0.273, 48, 2.54),
)
TYPICAL: Mapping[str, str] = {
    "sm_80": "a100", "sm_86": "rtx 3090", "sm_89": "l40s", "sm_90": "h200", "sm_100": "b200", "sm_103": "b300",
    "sm_120": "rtx pro 6000", "sm_121": "gb10",
}
"""Architecture → the GPU that stands for it where none is named."""
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
AMD = ("gfx90a", "gfx942", "gfx950")
NAMES: tuple[str, ...] = tuple(gpu.name for gpu in GPUS)
_BY_NAME = {gpu.name: gpu for gpu in GPUS}
_PER_CYCLE = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192, (12, 0): 1024,
              (12, 1): 1024}  # bf16 operations of one multiprocessor; GeForce has half, to the same of fp32 sums
_TIMES = {"fp8": ((8, 9), 2.0), "int8": ((7, 5), 2.0), "fp4": ((10, 0), 4.0)}  # from which capability, of bf16's


def plain(name: str) -> str:
    """A name as the table has them: words in lower case, without the maker's."""
    return " ".join(re.sub(r"[^a-z0-9]+", " ", name.lower()).removeprefix("nvidia ").split())


@cache
def named(name: str) -> Gpu | None:
    """The GPU of a target's name or of a device's, ``"NVIDIA H100 80GB HBM3"``; None where it is not known."""
    words = plain(name)
    return _BY_NAME.get(words) or next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, words)), None)


def target(name: str) -> tuple[str | None, Gpu | None]:
    """The architecture and the GPU that a target's name stands for: ``"h100"``, ``"sm_100a"``, ``"gfx950"``, of an
    architecture the usual GPU; Nones of ``"cpu"``. Raises ValueError for another name, with all that are possible."""
    if name == "cpu":
        return None, None
    if (gpu := named(name)) is not None:
        return gpu.architecture, gpu
    match = re.fullmatch(r"(sm_\d+)[af]?|(gfx\w+)", name)
    architecture = match and (match[1] or match[2])
    if architecture not in ARCHITECTURES + AMD:
        raise ValueError(f"there is no target {name!r}; possible: cpu, {', '.join(ARCHITECTURES + AMD)}, or a "
                         f"GPU: {', '.join(NAMES)}")
    return architecture, typical(architecture)


def typical(architecture: str | None) -> Gpu | None:
    """The GPU that stands for an architecture."""
    return _BY_NAME.get(TYPICAL.get(architecture or "", ""))


def of(properties: Any) -> Gpu | None:
    """The GPU that ``torch.cuda.get_device_properties`` describes: from the table, or an estimate from the number and
    clock of its multiprocessors and the width and clock of its memory. None where these are not told, or are those of a
    larger GPU of which it is a part."""
    name, capability = str(properties.name), (properties.major, properties.minor)
    found = named(name)
    if found is not None and found.capability == capability:
        return found
    clock, memory, width = (getattr(properties, key, 0) for key in ("clock_rate", "memory_clock_rate",
                                                                    "memory_bus_width"))
    each = _PER_CYCLE.get(capability)
    if each is None or not (clock and memory and width) or re.search(r"\bmig\b", plain(name)):
        return None
    consumer = "geforce" in plain(name)
    bf16 = properties.multi_processor_count * clock * 1e3 * each / (2 if consumer else 1)
    made = {kind: bf16 * times * (2 if consumer and kind != "fp8" else 1) if capability >= since else 0.0
            for kind, (since, times) in _TIMES.items()}
    if capability == (10, 3):
        made["int8"] = bf16 / 15
    return Gpu(plain(name), capability, bf16, made["fp8"], made["int8"], made["fp4"], 2e3 * memory * width / 8,
               properties.multi_processor_count, clock * 1e3, estimated=True)
