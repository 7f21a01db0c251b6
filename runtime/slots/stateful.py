"""The state of a model as ``torch.distributed.checkpoint`` takes it, an entry a parameter.

What a fresh process knows of a model before its first forward is its parameters, and DCP loads what a state already
names. So each parameter has an entry, bytes, empty where nothing is remembered; pipeline stages, whose names differ,
save into one checkpoint, and another division into stages loads from it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quartet.runtime.slots.state import load_state_dict, names_of_parameters, state_dict


class State:
    """``dcp.save({"model": …, "quartet": quartet.State(model)}, checkpoint_id=…)``, and the same with ``dcp.load``.

    It has the two methods of ``torch.distributed.checkpoint.stateful.Stateful``. Save after an optimizer step: what the
    micro-batches of an unfinished step have seen is each rank's own, and one rank's is kept.

    Raises:
        TypeError: no model.
    """

    def __init__(self, model: nn.Module) -> None:
        names_of_parameters(model)
        self._model = model

    def state_dict(self) -> dict[str, bytes]:
        """Name of a parameter → what :func:`quartet.state_dict` has of it, as ``torch.save`` writes it."""
        packed: dict[str, dict[str, Any]] = {name: {} for name in names_of_parameters(self._model)}
        for kind, entries in state_dict(self._model).items():
            for key, entry in entries.items():
                packed[key.rpartition(".")[0]].setdefault(kind, {})[key] = entry
        return {name: _bytes(kinds) if kinds else b"" for name, kinds in packed.items()}

    def load_state_dict(self, state: Mapping[str, bytes]) -> None:
        """Put back what :meth:`state_dict` gave, before the model is compiled or after.

        Raises:
            ValueError: as :func:`quartet.load_state_dict`.
        """
        kinds: dict[str, dict[str, Any]] = {"delayed": {}}
        for entry in filter(None, state.values()):
            for kind, entries in torch.load(io.BytesIO(entry), weights_only=True).items():
                kinds.setdefault(kind, {}).update(entries)
        load_state_dict(self._model, kinds)


def _bytes(kinds: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    on_cpu = {kind: {key: {name: value.cpu() if isinstance(value, torch.Tensor) else value
                           for name, value in entry.items()} for key, entry in entries.items()}
              for kind, entries in kinds.items()}
    torch.save(on_cpu, file)
    return file.getvalue()
