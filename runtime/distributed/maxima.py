"""The largest magnitudes of all weights whose scale is the whole tensor's: one reduction and one all-reduce a step.

Ranks hold parts of each weight. Magnitudes are reduced as the integers whose bits they are, an order in which a NaN
comes last, so that one rank's NaN is everybody's, as it would be in the gathered tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from quartet.kernels.reference.formats.scales import APART, scale_of_amax
from quartet.kernels.spec import QuantSpec
from quartet.runtime.distributed.sharded import Sharded


class Scale(NamedTuple):
    """fp32 ``[1, 1]`` each: of the largest magnitude, what elements are multiplied by, and what codes are."""

    amax: Tensor
    multiplier: Tensor
    scale: Tensor


class Maxima:
    """Of any number of sharded parameters; the tensors that it gives out are written anew after each step."""

    def __init__(self) -> None:
        self._members: list[tuple[Sharded, QuantSpec]] = []
        self._tables: list[_Table] = []
        self._scales: list[Scale] = []
        self._seen: list[tuple[int, ...]] = []  # the versions of the shards that they are of

    def add(self, place: Sharded, spec: QuantSpec) -> int:
        """Know one more; its number for :meth:`of`."""
        self._members.append((place, spec))
        return len(self._members) - 1

    def of(self, number: int) -> Scale:
        """What :meth:`refresh` found. Raises RuntimeError where the shard has changed since."""
        place, _ = self._members[number]
        if not self._seen or self._seen[number] != place.version:
            raise RuntimeError(f"weight {place.name!r} of {type(place.owner).__name__} is gathered before the forward "
                               "that finds its scale: with one scale a tensor, gather it in a forward of the model "
                               "that quartet.distributed.pack_all_gather was given, not by unshard() ahead of it")
        return self._scales[number]

    @torch.no_grad()
    def refresh(self, anew: bool) -> None:
        """Find the magnitudes of this step, ``anew`` also where they are known. Collective over the ranks that hold the
        shards."""
        shards = [place.shard for place, _ in self._members]
        seen = [place.version for place, _ in self._members]
        if not shards or not anew and seen == self._seen:
            return
        if not self._tables:
            self._arrange(shards)
        for table in self._tables:
            table.reduce([shards[i] for i in table.members])
        self._seen = seen

    def _arrange(self, shards: list[Tensor]) -> None:
        """A table for each group of ranks and dtype, with a row for each parameter."""
        groups: dict[Any, list[int]] = {}
        for i, ((place, _), shard) in enumerate(zip(self._members, shards, strict=True)):
            groups.setdefault((place.mesh, place.dtype or shard.dtype, shard.device), []).append(i)
        found: dict[int, Scale] = {}
        for (mesh, dtype, device), members in groups.items():
            specs = [self._members[i][1] for i in members]
            table = _Table(mesh, dtype, device, members, specs)
            self._tables.append(table)
            found |= {i: table.row(at) for at, i in enumerate(members)}
        self._scales = [found[i] for i in range(len(shards))]


class _Table:
    """``amax``, and by quantiser multiplier and scale, fp32 ``[parameters, 4]``: each number stands four times."""

    def __init__(self, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device, members: list[int],
                 specs: list[QuantSpec]) -> None:
        self.mesh, self.dtype, self.members, self.specs = mesh, dtype, members, specs
        self.amax = torch.zeros(len(members), APART, dtype=torch.float32, device=device)
        self.by_spec = {spec: (torch.ones_like(self.amax), torch.ones_like(self.amax)) for spec in dict.fromkeys(specs)}

    def row(self, at: int) -> Scale:
        return Scale(*(table[at:at + 1, :1] for table in (self.amax, *self.by_spec[self.specs[at]])))

    def reduce(self, shards: list[Tensor]) -> None:
        """Fill the tables; rounding to the dtype that is gathered in keeps the order of magnitudes."""
        found = torch.stack(torch.ops.aten._foreach_norm.Scalar(shards, float("inf")))
        largest = found.to(self.dtype).to(torch.float32).abs()
        dist.all_reduce(largest.view(torch.int32), dist.ReduceOp.MAX, group=self.mesh.get_group())
        self.amax.copy_(largest.unsqueeze(-1).expand_as(self.amax))
        for spec, tables in self.by_spec.items():
            if spec.scale == "fp32":
                for table, values in zip(tables, scale_of_amax(self.amax, spec), strict=True):
                    table.copy_(values)
