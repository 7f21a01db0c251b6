"""PEFT's adapters over a frozen base whose products are quantised, and trl's supervised fine-tuning with packing."""

import pytest
import torch

pytest.importorskip("accelerate")

from small import VOCABULARY, llama, rows  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import quartet  # noqa: E402
from quartet import direct  # noqa: E402

ADAPTED = ("q_proj", "v_proj", "up_proj")


def arguments(folder, kind=TrainingArguments, **more):
    return kind(str(folder), **dict(
        per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, seed=3, dataloader_pin_memory=False) | more)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def numbers(parameter):
    return parameter.dequantize() if isinstance(parameter, direct.LowBitWeight) else parameter.detach()


@pytest.mark.parametrize("base", ["weights as they are", "codes alone"])
def test_lora(tmp_path, base):
    peft = pytest.importorskip("peft")
    model = llama()
    if base == "codes alone":
        direct.convert(model, bits=8)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=list(ADAPTED), init_lora_weights="gaussian"))
    before = {name: numbers(p).clone() for name, p in model.named_parameters()}
    quartet.compile(model, quartet.Policy("quartet").on("*lora_*", None), strict=base == "weights as they are")
    trainer = Trainer(model, arguments(tmp_path, learning_rate=5e-2), train_dataset=rows())
    trainer.train()
    assert losses(trainer)[-1] < 0.95 * losses(trainer)[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(numbers(p), before[name])}
    assert changed and all("lora_" in name for name in changed)

    roles = {}
    for r in quartet.explain(model, **{name: row[None] for name, row in rows(1)[0].items()}).records:
        if r.lowered:
            roles.setdefault(r.fqn.rpartition("layers.")[2], set()).add(r.role)
    if base == "weights as they are":
        assert roles["0.mlp.up_proj.base_layer"] == {"fprop", "dgrad"}, "a frozen weight has no gradient"
    assert not any("lora_" in name for name in roles)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    theirs = dict(again.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters() if "lora_" in name)


def test_supervised_fine_tuning_with_packing(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(
        {str(i): i for i in range(VOCABULARY)}, unk_token="0")), eos_token="1", pad_token="2", unk_token="0")
    data = datasets.Dataset.from_dict({"input_ids": [row["input_ids"].tolist()[:10 + i % 5] for i, row in
                                                     enumerate(rows(32))]})
    model = quartet.compile(llama(), "quartet", strict=True)
    trainer = trl.SFTTrainer(model, arguments(
        tmp_path, trl.SFTConfig, packing=True, packing_strategy="wrapped", max_length=32, max_steps=4, bf16=False,
        gradient_checkpointing=False), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    assert len(trainer.train_dataset) < len(data), "rows were packed"
