"""Where the random bits of a step come from: one seed a graph and device from PyTorch's generator, and a stream a rank.

Turning the backend on should leave the user's own random numbers as they are, so a seed is a digest of the generator's
state where that is enough: where the same forward also draws numbers of the user's, so that no two forwards find one
state. Else a seed is drawn. A count of our own would tell forwards apart as well, but ``torch.manual_seed`` would not
begin it anew, and a restored generator state would not continue it.

A graph does not say which stream it draws from, so ranks share what one of them has compiled. The process that runs it
says so, by its rank or by what :class:`Streamed` was given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch

STRIDE = 0x1E3779B97F4A7C15  # odd, so that streams differ in every bit position
SEEDS = 2**62
_stream: ContextVar[int | None] = ContextVar("quartet_stream", default=None)


def draw(device: str, moves: bool = False) -> torch.Tensor:
    """``quartet::seed``: int64 ``[1]`` in 0…2^62−1, moved on by the stream of the rank.

    ``moves``: whoever asks also moves the device's generator by numbers of the user's, every time. The seed is then a
    function of the generator's state, which stays as it is; otherwise it is drawn as ``torch.randint`` draws. A CUDA
    graph that is being captured draws too: its replays see no state. The device is text, as Inductor's C++ wrapper
    writes an argument of type Device in a way that does not compile (PyTorch 2.13).
    """
    state, shift = _state(torch.device(device)) if moves else None, _shift()
    if state is None:
        drawn = torch.randint(0, SEEDS, [1], dtype=torch.int64, device=device)
        return drawn.add_(shift) if shift else drawn
    digest = hashlib.sha256(b"quartet" + state.numpy().tobytes()).digest()
    return torch.full([1], (int.from_bytes(digest[:8], "little") >> 2) + shift, dtype=torch.int64, device=device)


def _shift() -> int:
    """What the stream of the graph that is running adds to a seed."""
    stream = _stream.get()
    return (rank() if stream is None else stream) * STRIDE % SEEDS


def rank() -> int:
    """This process among all; 0 without a process group."""
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class Streamed:
    """A compiled graph that draws from a stream of its own."""

    def __init__(self, compiled: Callable[..., Any], stream: int) -> None:
        self.compiled, self.stream = compiled, stream

    def __call__(self, *args: Any) -> Any:
        token = _stream.set(self.stream)
        try:
            return self.compiled(*args)
        finally:
            _stream.reset(token)


def _state(device: torch.device) -> torch.Tensor | None:
    """State of the device's generator, bytes; None where it cannot be read."""
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return torch.cuda.get_rng_state(device)
    return None


def ranks_of(group: Any) -> tuple[int, ...]:
    """The global ranks in a ``ProcessGroup``, a ``DeviceMesh`` (those of the mesh that this rank is in) or a sequence.

    Raises:
        ValueError: none of these, or this rank is not in it; the text goes on after "is ".
    """
    dist = torch.distributed
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        ranks = dist.get_process_group_ranks(group)
    elif dist.is_available() and isinstance(group, dist.device_mesh.DeviceMesh):
        ranks = group.mesh.flatten().tolist()
    elif isinstance(group, Sequence) and not isinstance(group, str) and all(type(each) is int for each in group):
        ranks = list(group)
    else:
        raise ValueError(f"a ProcessGroup, a DeviceMesh or a list of ranks, not {type(group).__name__} {group!r}")
    if rank() not in ranks:
        raise ValueError(f"a group that this rank is in; rank {rank()} is not among {sorted(ranks)}")
    return tuple(sorted(ranks))


def sharing(inputs: Sequence[Any], same_bits: Sequence[int] | None = None) -> Sequence[int] | None:
    """The ranks that share the layers of a graph with these inputs and draw the same bits, from the stream of the first
    of them; None where this rank draws its own.

    They are ``same_bits``, or those of the mesh that inputs are DTensors on: ranks that hold shards of one tensor must
    round what they replicate alike.
    """
    if same_bits is not None:
        return same_bits
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    meshes = [t.device_mesh.mesh.flatten().tolist() for t in inputs if isinstance(t, DTensor)]
    return min(meshes, key=min, default=None)
