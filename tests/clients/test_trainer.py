"""``transformers.Trainer`` over a model that ``quartet.compile`` compiled in place."""

from pathlib import Path

import gloo
import pytest
import torch
import torchrun

pytest.importorskip("accelerate")

from small import llama, rows  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import quartet  # noqa: E402
from quartet import optim  # noqa: E402
from quartet.integrations.huggingface import QuartetCallback  # noqa: E402


def arguments(folder, **more):
    return TrainingArguments(str(folder), **dict(
        per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, logging_steps=1, save_steps=2, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=3, dataloader_pin_memory=False) | more)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_bf16_checkpointing_accumulation_and_evaluation(tmp_path):
    model = llama()
    keys, kind = list(model.state_dict()), type(model)
    trainer = Trainer(quartet.compile(model, "quartet", strict=True), arguments(
        tmp_path, bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2, max_steps=8, save_steps=8,
        eval_strategy="steps", eval_steps=4), train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert type(trainer.model) is kind and list(model.state_dict()) == keys
    again = kind.from_pretrained(tmp_path / "checkpoint-8")
    assert equal(weights(again), weights(model))
    model.eval()
    made = model.generate(rows(1)[0]["input_ids"][None, :8], max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 11)


def resumed(folder, policy, callbacks=(), **more):
    """Losses and weights of a run, and of one that goes on from the middle of it."""
    def trainer():
        return Trainer(quartet.compile(llama(), policy), arguments(folder), train_dataset=rows(),
                       callbacks=[one() for one in callbacks], **more)

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return [(losses(each), weights(each.model)) for each in (whole, again)]


@pytest.mark.parametrize(("policy", "optimizer"), [
    ("quartet", {"optimizer_cls_and_kwargs": (optim.AdamW, {"lr": 1e-2})}), ("fp8-delayed", {})])
def test_resumed_bit_for_bit(tmp_path, policy, optimizer):
    (whole, ours), (again, theirs) = resumed(tmp_path, policy, [QuartetCallback], **optimizer)
    assert whole == again and equal(ours, theirs)


def test_without_the_callback_histories_begin_anew(tmp_path):
    (whole, ours), (again, theirs) = resumed(tmp_path, "fp8-delayed")
    assert whole[:2] == again[:2] and not equal(ours, theirs)
    trainer = Trainer(llama(), arguments(tmp_path, max_steps=5), train_dataset=rows(), callbacks=[QuartetCallback()])
    with pytest.warns(UserWarning, match="checkpoint-4/quartet_state_0.pt does not exist: histories"):
        trainer.train(resume_from_checkpoint=True)


def test_an_optimizer_with_states_in_eight_bits(tmp_path):
    model = quartet.compile(llama(), "quartet")
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(model, arguments(tmp_path, max_steps=6, save_steps=10), train_dataset=rows(),
                      optimizers=(optimizer, None))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer and losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_the_enumeration_of_accelerate_refuses_the_name_and_a_page_says_what_to_do(tmp_path):
    with pytest.raises(ValueError) as refused:
        Trainer(llama(), arguments(tmp_path, torch_compile=True, torch_compile_backend="quartet"))
    page = (Path(__file__).parents[2] / "docs" / "works_with.md").read_text(encoding="utf-8")
    assert str(refused.value) == "'QUARTET' is not a valid DynamoBackend" and str(refused.value) in page


@gloo.available
def test_two_ranks_under_torchrun(tmp_path):
    torchrun.run(Path(__file__).with_name("trainer_program.py"), tmp_path)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for found in (ours, theirs):
        assert found["whole"] == found["resumed"] and equal(found["weights"], found["resumed weights"])
    assert equal(ours["weights"], theirs["weights"]) and ours["whole"][-1] < ours["whole"][0]
