"""What ``fully_shard`` has sharded, and how: the one place that reads fields of FSDP2's objects, of torch 2.11 to 2.15.

The contract with FSDP2 is its extension (``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` on a local tensor); what
is read here beside it says which parameters can have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from quartet.runtime.distributed.steps import STEPS


@dataclass(frozen=True)
class Sharded:
    """A parameter that ``fully_shard`` has sharded.

    Attributes:
        owner, name: the module that has it, and its name there. tied: other modules have it too.
        mesh: of the ranks that it is gathered from.
        dtype: what it is gathered and computed with in, None for its own.
        offloaded: its shard lies on the CPU. regrouped: after forward it is sharded over fewer ranks.
        started: its first all-gather has been prepared. handle, group: FSDP2's objects of it.
    """

    owner: torch.nn.Module
    name: str
    tied: bool
    mesh: Any
    dtype: torch.dtype | None
    offloaded: bool
    regrouped: bool
    started: bool
    handle: Any
    group: Any

    @property
    def parameter(self) -> DTensor:
        """The shard, whatever the module has just now; what it has before the first forward, FSDP2 will take."""
        held = getattr(self.owner, self.name)
        return held if isinstance(held, DTensor) else self.handle.sharded_param

    @property
    def shard(self) -> torch.Tensor:
        """This rank's part of it, the object that FSDP2 asks for its extensions; ``to_local`` gives another."""
        return self.parameter._local_tensor

    @property
    def version(self) -> tuple[int, ...]:
        """The shard, the writes that PyTorch has counted (those to the parameter are not in the shard's counter), and
        the steps of optimizers."""
        parameter = self.parameter
        shard = parameter._local_tensor
        return id(shard), shard._version, parameter._version, *STEPS.of(parameter)

    def follow(self) -> None:
        """Let the stream on which FSDP2 copies into its gathers wait for what the current stream does. There is none
        before the first forward, which lets it wait itself."""
        stream = getattr(self.group.comm_ctx, "all_gather_copy_in_stream", None)
        if isinstance(stream, torch.cuda.Stream):
            stream.wait_stream(torch.cuda.current_stream(stream.device))


def sharded(model: torch.nn.Module) -> list[Sharded]:
    """All that ``fully_shard`` manages in a model, in the order of its modules."""
    found: dict[int, Sharded] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:  # torch 2.11 has one
            for each in group.fsdp_params if group is not None else ():
                found[id(each)] = _sharded(each, group, state)
    return list(found.values())


def _sharded(each: Any, group: Any, state: Any) -> Sharded:
    info, own, after = each._module_info, each.mesh_info, each.post_forward_mesh_info
    mesh = own.mesh if own.mesh.ndim == 1 else own.mesh[own.mesh.mesh_dim_names[-1]]
    return Sharded(info.module, info.param_name, bool(info.shared_modules), mesh, group.mp_policy.param_dtype,
                   each.offload_to_cpu, after is not None and after is not own, state._is_root is not None, each, group)
