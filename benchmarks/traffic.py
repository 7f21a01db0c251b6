"""What a step sends: bytes of each collective by dtype, as ``torch.distributed`` is asked for them.

    with Traffic() as traffic:
        step()
    print(traffic.bytes)        # {("all_gather", "uint8"): 123456, …}

Of an all-gather the bytes of the result count, of a reduce-scatter and of an all-reduce those of the argument: what a
ring passes through each link is (ranks − 1)/ranks of it, and of an all-reduce twice that. Counted are calls of Python
(FSDP2, ``quartet.distributed``) and functional collectives in eager code; not those of DDP's reducer, which is C++.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

COUNTED = {  # function → what it is called here, the argument whose bytes count
    "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),
    "all_gather_single": ("all_gather", 0, "output_tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"), "reduce_scatter_single": ("reduce_scatter", 1, "input"),
    "all_reduce": ("all_reduce", 0, "tensor"), "all_to_all_single": ("all_to_all", 1, "input"),
    "broadcast": ("broadcast", 0, "tensor"),
}


class Traffic:
    """Counts while it is entered, on all threads of this process."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self._own: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Traffic:
        for name in COUNTED:
            if hasattr(dist, name):
                self._own[name] = getattr(dist, name)
                setattr(dist, name, self._counting(name))
        return self

    def __exit__(self, *error: Any) -> None:
        for name, own in self._own.items():
            setattr(dist, name, own)

    def total(self, collective: str) -> int:
        """Bytes of a collective in all dtypes."""
        return sum(count for (name, _), count in self.bytes.items() if name == collective)

    def rows(self) -> dict[str, int]:
        """``"all_gather uint8"`` → bytes, the most first."""
        return {f"{name} {dtype}": count for (name, dtype), count in self.bytes.most_common()}

    def _counting(self, name: str) -> Callable[..., Any]:
        own, (called, position, keyword) = self._own[name], COUNTED[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position] if len(args) > position else kwargs[keyword]
            key = called, str(tensor.dtype).removeprefix("torch.")
            self.bytes[key] += tensor.numel() * tensor.element_size()
            self.calls[key] += 1
            return own(*args, **kwargs)

        return counted


def of(step: Callable[[], Any]) -> Traffic:
    """What ``step`` sends."""
    with Traffic() as traffic:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return traffic
