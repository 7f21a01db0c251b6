"""State that belongs to a model and is not in its ``state_dict``: what delayed scaling remembers of its operands, and
moving averages of weights."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from quartet.runtime.slots.averages import Average
from quartet.runtime.slots.remembered import WEIGHTS, Weight
from quartet.runtime.slots.rows import SLOTS, Home, Slot


def state_dict(model: nn.Module) -> dict[str, Any]:
    """What a training run needs to continue bit for bit, beside the states of model, optimizer and generators.

    Returns:
        ``{"delayed": {"layers.0.up.weight.x": {"amax": fp32 [1 + length], "due": bool, "counted": bool,
        "of": str}, …}}``:
        for each weight by name and each of its operands (``x``, ``w``, ``e``) the pending magnitude and the history,
        newest first, as copies. ``of`` is what had been done to the operand before it was measured, also in the key:
        ``x:smooth-channel``. ``torch.save`` and ``torch.load(weights_only=True)`` take it. Empty for a model
        without delayed scaling. Where weights have moving averages also ``"averages"``: ``{"layers.0.up.weight.w":
        {"average": fp32 of the weight's shape, "due": bool, "counted": bool}, …}``. Nothing is gathered for it, nor by
        :func:`load_state_dict`.
    """
    found, averages, present = {}, {}, WEIGHTS.of.present()
    for name, parameter in _unwrapped(model).named_parameters():
        weight = WEIGHTS.of.get(parameter) or _gathered(parameter, present) or Weight()
        for operand, slot in sorted(weight.slots.items()):
            found[f"{name}.{operand}"] = {"amax": slot.row.clone(), "due": slot.due, "counted": slot.counted,
                                          "of": _measured(operand)}
        for part, average in sorted(weight.averages.items()):
            averages[f"{name}.{part}"] = {"average": average.value.clone(), "due": average.due,
                                          "counted": average.counted}
    return {"delayed": found, "averages": averages} if averages else {"delayed": found}


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what :func:`state_dict` gave, before the model is compiled or after; other slots become empty.

    Raises:
        ValueError: not such a state, of a parameter that the model does not have, or of a version that did not say
            what each history is of; nothing is changed then.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("delayed"), Mapping):
        raise ValueError("expected what quartet.state_dict(model) returns, a mapping with the key 'delayed', not "
                         f"{sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__}")
    weights, present = dict(_unwrapped(model).named_parameters()), WEIGHTS.of.present()
    slots = [(*_owner(key, weights), _checked(key, entry)) for key, entry in state["delayed"].items()]
    averages = [(*_owner(key, weights), _average(key, entry)) for key, entry in state.get("averages", {}).items()]
    for parameter in weights.values():
        known = WEIGHTS.of.get(parameter) or _gathered(parameter, present)
        if known is not None:
            known.averages.clear()
            for slot in known.slots.values():
                slot.row.zero_()
                slot.due, slot.counted = True, False
    owners = iter(WEIGHTS.of_all([owner for owner, *_ in (*slots, *averages)]))
    for owner, operand, entry in slots:
        with torch.inference_mode(False), torch.no_grad():
            row = entry["amax"].detach().to(owner.device, torch.float32, copy=True).reshape(1, -1)
        SLOTS.put(next(owners), operand, Slot(Home(row), due=bool(entry["due"]), counted=bool(entry["counted"])))
    for _, part, average in averages:
        next(owners).averages[part] = average


def names_of_parameters(model: nn.Module) -> list[str]:
    """Names that the keys of a model's state begin with."""
    return list(dict(_unwrapped(model).named_parameters()))


def _unwrapped(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, not {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _gathered(parameter: Tensor, present: Mapping[int, Weight]) -> Weight | None:
    """What is remembered of the parameter that FSDP2 has gathered of a shard: its forward computes with that one."""
    return present.get(id(parameter)) if hasattr(parameter, "device_mesh") else None


def _owner(key: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    name, _, operand = key.rpartition(".")
    if name not in weights:
        near = get_close_matches(name, weights, n=1)
        raise ValueError(f"the state is of a parameter {name!r} that the model does not have; "
                         + (f"the nearest is {near[0]!r}; " if near else "") + "load it into the model it was saved of")
    return weights[name], operand


def _checked(key: str, entry: Any) -> Mapping[str, Any]:
    row = entry.get("amax") if isinstance(entry, Mapping) else None
    if not isinstance(row, Tensor) or row.dim() != 1 or row.numel() < 2 or not {"due", "counted"} <= set(entry):
        raise ValueError(f"entry {key!r} of the state is not {{'amax': fp32 [1 + length], 'due', 'counted', 'of'}}")
    if entry.get("of") != _measured(key):
        raise ValueError(f"entry {key!r} of the state does not say what had been done to the operand that it is the "
                         f"history of ('of': {_measured(key)!r}): an earlier version of quartet saved it, which took "
                         "smoothed and rotated operands for those themselves. Load {**state, 'delayed': {}} instead: "
                         "histories begin anew, by the magnitudes of the first step")
    return entry


def _measured(key: str) -> str:
    """What had been done to the operand that a slot measures, from its name."""
    return key.rpartition(".")[2].partition(":")[2]


def _average(key: str, entry: Any) -> Average:
    value = entry.get("average") if isinstance(entry, Mapping) else None
    if not isinstance(value, Tensor) or not {"due", "counted"} <= set(entry):
        raise ValueError(f"entry {key!r} of the state is not {{'average': fp32 like the weight, 'due', 'counted'}}")
    with torch.inference_mode(False), torch.no_grad():
        return Average(value.detach().to(torch.float32, copy=True), due=bool(entry["due"]),
                       counted=bool(entry["counted"]))
