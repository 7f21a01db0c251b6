"""Ops that read and write what lives from step to step, over the functions of ``quartet.runtime``.

    seed(device, moves)                                int64 [1] in 0…2^62−1, from PyTorch's generator
    amax_begin(anchor, table, device)                  fp32 [slots], see ``quartet.runtime.slots.amax``
    amax_read(anchor, table, device)
    amax_seen(largest, slots)                          fp32 [slots], zeros: what forward sees, kept for backward
    amax_note(seen, first, amax)                       seen[first:] = amax, fp32 [1, 1] each
    amax_record(anchor, table, slots, amax)
    average_advance(anchor, w, weight, name, decay)    see ``quartet.runtime.slots.averages``
    average_read(anchor, w, weight, name, decay)       fp32, the shape of w

``largest`` is what one of the first two amax ops returns. No CUDA graph holds those with an anchor: a replay would not
ask what is due."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from quartet.lowering.ir.op import op
from quartet.runtime import streams
from quartet.runtime.slots import amax as histories
from quartet.runtime.slots import averages


def _seed_fake(device, moves=False):
    return torch.empty(1, dtype=torch.int64, device=device)


def _amax_fake(anchor, table, device):
    return anchor.new_empty(len(histories.Entry.parse_all(table)), dtype=torch.float32, device=device)


def _seen_fake(largest, slots):
    return largest.new_empty(slots)


def _average_fake(anchor, w, weight, name, decay):
    return w.new_empty(w.shape, dtype=torch.float32)


def _none_fake(*args):
    return None


seed = op(name="seed", fake=_seed_fake, random=True)(streams.draw)
amax_begin = op(name="amax_begin", fake=_amax_fake, mutates=("anchor",), cudagraph_safe=False)(histories.begin)
amax_read = op(name="amax_read", fake=_amax_fake, cudagraph_safe=False)(histories.read)


@op(fake=_seen_fake)
def amax_seen(largest: Tensor, slots: int) -> Tensor:
    return largest.new_zeros(slots)


@op(fake=_none_fake, mutates=("seen",))
def amax_note(seen: Tensor, first: int, amax: list[Tensor]) -> None:
    seen[first: first + len(amax)].copy_(torch.cat(amax).flatten())


amax_record = op(name="amax_record", fake=_none_fake, mutates=("anchor",), cudagraph_safe=False)(histories.record)
average_advance = op(name="average_advance", fake=_none_fake, mutates=("anchor",), cudagraph_safe=False)(
    averages.advance)
average_read = op(name="average_read", fake=_average_fake, cudagraph_safe=False)(averages.read)

# Drawing is a side effect of the forward. The partitioner would otherwise move it into backward, where the bits
# would depend on what else drew in between and a retained graph would not replay them.
SEED = has_side_effect(seed.overload)
AMAX_BEGIN, AMAX_READ, AMAX_RECORD = amax_begin.overload, amax_read.overload, amax_record.overload
AMAX_SEEN, AMAX_NOTE = amax_seen.overload, amax_note.overload
AVERAGE_ADVANCE, AVERAGE_READ = average_advance.overload, average_read.overload
