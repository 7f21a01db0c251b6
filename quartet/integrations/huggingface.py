"""For ``transformers.Trainer``, and trl's trainers, which are such:

    trainer = Trainer(quartet.compile(model, "fp8-delayed"), arguments, …, callbacks=[QuartetCallback()])
    trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quartet.integrations import files
from quartet.kernels.files import expanded


class QuartetCallback(TrainerCallback):
    """Saves histories and averages beside the weights of each checkpoint, and puts them back when a run resumes.

    Args:
        resume_from: the checkpoint that ``train(resume_from_checkpoint=…)`` is given, where it is not the one of
            ``output_dir`` with the number of steps done.
    """

    def __init__(self, resume_from: str | os.PathLike[str] | None = None) -> None:
        self._resume_from = resume_from

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is None or state.global_step == 0:
            return
        named = self._resume_from or args.resume_from_checkpoint
        folder = _folder(args, state)
        if isinstance(named, str | os.PathLike) and expanded(named).is_dir():
            folder = expanded(named)
        if not files.load(model, folder):
            warnings.warn(f"{files.file_of(folder)} does not exist: histories of delayed scaling and averages of "
                          "weights begin anew. QuartetCallback(resume_from=folder) names another checkpoint",
                          stacklevel=2)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is not None:
            files.save(model, _folder(args, state))


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
