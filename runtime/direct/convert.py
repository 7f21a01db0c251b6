"""Turning the linear layers of a model low-bit, in place, and what is counted of them."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quartet.kernels.reference.optim import lowbit
from quartet.runtime.direct.linear import ACTIVATIONS
from quartet.runtime.direct.weight import LowBitWeight, components, mismatch
from quartet.runtime.optim.layout import local

Skip = Callable[[str, nn.Linear], bool] | str | Iterable[str]
HEADS = ("*lm_head", "*output_head", "*embed_out", "head", "*.head", "output", "*classifier")
ROUTERS = ("*router", "*router.*", "*gate", "*gating*")
SKIPPED = (*HEADS, *ROUTERS)


def convert(model: nn.Module, bits: str | int = "ternary", *, paper: bool = False, skip: Skip = SKIPPED,
            activations: str | None = "int8") -> nn.Module:
    """Make the weights of ``nn.Linear`` layers low-bit for good, in place; the model is returned.

    Args:
        model: holds floating-point weights; each is freed as soon as it is converted.
        bits: ``"ternary"``, 2, 3, 4 or 8.
        paper: one scale a tensor, frozen, by the released rule of arXiv 2412.04787.
        skip: layers to leave alone: names with wildcards, or a function of (name, layer); a name that no linear layer
            has is warned of. The default leaves output heads and routers by their usual names. Always left are weights
            that an embedding or another layer shares, and the output projection of ``nn.MultiheadAttention``, which is
            no layer that is called: its weight goes straight into a product of torch's own.
        activations: ``"int8"`` a token, or None: as they are.

    Raises:
        ValueError: bits or activations that do not exist, nothing to convert, weights that are not finite or sharded.
        TypeError: no model.
    """
    check_model("convert", model)
    grid = lowbit.grid_of(bits)
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations {activations!r} do not exist; use 'int8' or None")
    chosen = list(_chosen(model, skip))
    if not chosen:
        linear = [name for name, module in model.named_modules()
                  if isinstance(module, nn.Linear) and not isinstance(module.weight, LowBitWeight)]
        if not linear and (low := list(weights(model))):
            raise ValueError(f"no layer to convert: {low} are low-bit already; direct.ternarize changes their bits")
        raise ValueError(f"no layer to convert: the model's linear layers are {linear or 'none'}, and skip= leaves "
                         "them alone; give skip=() to take all")
    for name, layer in chosen:
        if not layer.weight.is_floating_point() or layer.weight.is_meta or type(layer.weight.data) is not Tensor:
            raise ValueError(f"the weight of {name!r} is {_kind(layer.weight)}; convert takes plain floating-point "
                             "weights: convert before fully_shard, to_empty before convert")
        if not bool(torch.isfinite(layer.weight).all()):
            raise ValueError(f"the weight of {name!r} has NaNs or infinities; no grid holds them")
    for _, layer in chosen:
        weight = LowBitWeight.of(layer.weight, grid.name, paper, activations)
        hold(layer, "weight", weight, layer.weight.requires_grad)
    return model


def check_model(function: str, model: object) -> None:
    """TypeError for what is no model, which names the function of ``quartet.direct`` that was given it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"direct.{function} takes an nn.Module, not {type(model).__name__}")


def hold(layer: nn.Module, name: str, weight: LowBitWeight, requires_grad: bool) -> None:
    """Make ``weight`` the layer's parameter; ``load_state_dict(assign=True)`` will not replace it by another kind."""
    if not isinstance(getattr(layer, name), LowBitWeight):
        layer.register_load_state_dict_pre_hook(_refuse_other_kinds)
    setattr(layer, name, nn.Parameter(weight, requires_grad=requires_grad))


def _refuse_other_kinds(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool,
                        missing: list[str], unexpected: list[str], errors: list[str]) -> None:
    """What ``copy_`` refuses, for assignments, which ask the tensor nothing."""
    if not metadata.get("assign_to_params_buffers"):
        return
    for name, param in layer.named_parameters(recurse=False):
        own, value = local(param), state.get(prefix + name)
        if not isinstance(own, LowBitWeight) or not isinstance(value, Tensor):
            continue
        if problem := mismatch(own, local(value)):
            errors.append(f"{prefix}{name}: {problem}.")
            state[prefix + name] = param


def _kind(weight: Tensor) -> str:
    return f"a {type(weight.data).__name__} of {weight.dtype} on {weight.device}"


def _chosen(model: nn.Module, skip: Skip) -> Iterator[tuple[str, nn.Linear]]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    if not (callable(skip) or isinstance(skip, Iterable)):
        raise TypeError(f"skip is names, or a function of a layer's name and the layer, not {type(skip).__name__}; "
                        "skip=() converts every layer")
    patterns = () if callable(skip) else ((skip,) if isinstance(skip, str) else tuple(skip))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in patterns:
        if pattern not in SKIPPED and not fnmatch.filter(linear, pattern):
            warnings.warn(f"skip={pattern!r} leaves nothing alone: none of the {len(linear)} linear layers is called "
                          f"so; they are {', '.join(linear[:8])}{', …' if len(linear) > 8 else ''}", stacklevel=3)
    for name, module in model.named_modules():
        if (not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear)
                or isinstance(module.weight, LowBitWeight)):
            continue
        left = skip(name, module) if callable(skip) else any(fnmatch.fnmatch(name, p) for p in patterns)
        if not left and owners[id(module.weight)] == 1:
            yield name, module


def weights(model: nn.Module) -> dict[str, LowBitWeight]:
    """The low-bit weights of a model by name."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, LowBitWeight)}


def weight_bytes(model: nn.Module) -> dict[str, Any]:
    """Measured: parameters and stored bytes of the low-bit weights and of the others, and bytes of a low-bit one."""
    check_model("weight_bytes", model)
    low = weights(model)
    count = sum(w.numel() for w in low.values())
    stored = sum(part.untyped_storage().nbytes() for part in components(list(low.values())))
    other = [p for p in model.parameters() if not isinstance(p, LowBitWeight)]
    return {"low_bit_parameters": count, "low_bit_bytes": stored, "bytes_per_parameter": stored / max(1, count),
            "other_parameters": sum(p.numel() for p in other), "other_bytes": sum(p.nbytes for p in other)}


@torch.no_grad()
def broadcast(model: nn.Module, source: int = 0, group: Any = None) -> nn.Module:
    """Give all ranks the parameters and buffers of rank ``source``, codes and scales included, as
    ``DistributedDataParallel`` does by itself; the model is returned."""
    parts = [*components(list(model.parameters())),
             *(p.data for p in model.parameters() if not isinstance(p, LowBitWeight)), *model.buffers()]
    for part in parts:
        dist.broadcast(part, source, group=group)
    return model
