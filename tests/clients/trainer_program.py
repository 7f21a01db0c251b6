"""What each of two processes under torchrun does: train by ``Trainer``, and resume from the middle of it."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "shared")]

from torchvision_here import complete  # noqa: E402

complete()

from small import llama, rows  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402
from uncompiled import uncompiled  # noqa: E402

import quartet  # noqa: E402
from quartet.integrations.huggingface import QuartetCallback  # noqa: E402


def main(folder):
    torch._dynamo.lookup_backend("quartet")
    torch._dynamo.backends.registry._COMPILER_FNS["quartet"] = uncompiled
    found = {}
    for name, start in (("whole", None), ("resumed", f"{folder}/checkpoint-2")):
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, logging_steps=1, save_steps=2,
            report_to=[], disable_tqdm=True, use_cpu=True, ddp_backend="gloo", dataloader_pin_memory=False, seed=3)
        model = quartet.compile(llama(), quartet.Policy("quartet").on("*.mlp.*", "fp8-delayed"))
        trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=[QuartetCallback()])
        trainer.train(resume_from_checkpoint=start)
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found["weights" if name == "whole" else "resumed weights"] = {
            name: p.detach() for name, p in model.named_parameters()}
    torch.save(found, f"{folder}/{arguments.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
