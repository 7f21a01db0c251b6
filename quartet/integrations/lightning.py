"""For Lightning's ``Trainer``:

    trainer = lightning.Trainer(callbacks=[QuartetCallback()])
    trainer.fit(module, data, ckpt_path="last")
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import nn

from quartet.runtime.slots.state import load_state_dict, state_dict

KEY = "quartet"


class QuartetCallback(lightning.Callback):
    """Histories and averages of the module travel in each checkpoint under the key ``"quartet"``.

    So do the states of PyTorch's generators, which stochastic rounding draws from and Lightning does not keep: those of
    the rank that writes. They are put back when training starts, after Lightning has begun to read the data: a run goes
    on bit for bit if its ``DataLoader`` draws from a ``generator`` of its own.
    """

    def __init__(self) -> None:
        self._generators: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {**state_dict(pl_module), "generators": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if pl_module.device.type == "cuda" else None}}

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint:
            state = dict(checkpoint[KEY])
            self._generators = state.pop("generators")
            load_state_dict(pl_module, state)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: nn.Module) -> None:
        generators, self._generators = self._generators, None
        if generators is not None:
            torch.set_rng_state(generators["cpu"].cpu())
            if generators["cuda"] is not None and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(generators["cuda"].cpu())
