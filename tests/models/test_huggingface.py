"""One training step of tiny random transformers, with quantised linear layers, against the same step in eager."""

import os

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.runtime.capture import Capture

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCABULARY, TOKENS = 128, 32
DECODER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
               num_key_value_heads=2, vocab_size=VOCABULARY)
ENCODER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_labels=8,
               hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ONE_TOKEN_A_TEXT = {"bert.pooler.dense"}
HEADS = {"lm_head", "proj_out", "classifier"}


def text(batch=2):
    ids = torch.randint(0, VOCABULARY, (batch, TOKENS))
    return {"input_ids": ids, "labels": ids}


def causal(model, config, **sizes):
    return lambda: (model(config(**DECODER, **sizes)), text())


def gpt2():
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=TOKENS,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config), text()


def bert():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER, vocab_size=VOCABULARY))
    return model, text() | {"labels": torch.tensor([1, 2])}


def t5():
    config = transformers.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=VOCABULARY,
                                   dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config), text()


def vit():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**ENCODER, image_size=32, patch_size=8))
    return model, {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}


def whisper():
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=VOCABULARY, num_mel_bins=16, max_source_positions=TOKENS,
        max_target_positions=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        dropout=0.0)
    inputs = {"input_features": torch.randn(2, 16, 2 * TOKENS), "labels": text()["labels"]}
    return transformers.WhisperForConditionalGeneration(config), inputs


ZOO = {
    "llama": causal(transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "gpt2": gpt2,
    "qwen3": causal(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, head_dim=16),
    "gemma2": causal(transformers.Gemma2ForCausalLM, transformers.Gemma2Config, head_dim=16),
    "mixtral": causal(transformers.MixtralForCausalLM, transformers.MixtralConfig, num_local_experts=4),
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


@pytest.fixture(scope="module", params=list(ZOO))
def trained(request):
    """(name, model, what eager and compiled steps gave, records)"""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = ZOO[request.param]()
    model.train()
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    state = {name: (t.dtype, t.clone()) for name, t in model.state_dict().items()}
    loss = step(model, inputs)
    eager = (loss, gradients(model))
    records = []

    def backend(gm, example_inputs):
        return compile_graph(gm, example_inputs, Options(), inner_compile=Capture(), collect=records.extend)

    compiled = torch.compile(model, backend=backend)
    ours = (step(compiled, inputs), gradients(model))
    return request.param, model, state, eager, ours, records


def test_loss_is_near_eager(trained):
    _, _, _, (eager, _), (loss, _), _ = trained
    assert torch.isfinite(loss) and abs(loss - eager) < 0.1 * eager


def test_every_gradient_exists_and_is_finite(trained):
    _, _, _, (_, eager), (_, ours), _ = trained
    assert ours.keys() == eager.keys()
    assert [name for name, grad in ours.items() if not torch.isfinite(grad).all()] == []


def test_gradient_points_the_same_way(trained):
    name, _, _, (_, eager), (_, ours), _ = trained
    a, b = (torch.cat([g[k].flatten() for k in sorted(eager)]) for g in (eager, ours))
    cosine = cosine_similarity(a, b, dim=0)
    assert 0.5 < cosine < 0.9999, f"{name}: {cosine}"


def test_every_linear_layer_is_lowered(trained):
    _, model, _, _, _, records = trained
    lowered = {}
    for record in records:
        if record.lowered:
            lowered.setdefault(record.fqn, []).append(record.role)
    linear = {path for path, module in model.named_modules()
              if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)} - HEADS
    assert linear, "the model has linear layers"
    for path in sorted(linear):
        few = path in ONE_TOKEN_A_TEXT  # so its wgrad contracts the two texts of the batch: less than a block
        assert sorted(lowered.pop(path, [])) == ["dgrad", "fprop", *([] if few else ["wgrad"])], path
    assert not lowered, "nothing else is lowered"


def test_head_is_an_op_class_of_its_own(trained):
    _, model, _, _, _, records = trained
    heads = {record.fqn for record in records if record.op_class == "lm_head"}
    assert heads == {path for path, _ in model.named_modules()} & HEADS, "also where the weight is the embedding's"
    assert all("lm_head" in record.reason for record in records if record.op_class == "lm_head")


def test_routers_and_experts_of_mixtral(trained):
    name, _, _, _, _, records = trained
    if name != "mixtral":
        assert not [r for r in records if r.op_class in ("router", "grouped")]
        return
    assert {r.fqn for r in records if r.op_class == "router"} == {"model.layers.0.mlp.gate"}
    grouped = [r for r in records if r.op_class == "grouped"]
    assert sorted(r.role for r in grouped) == ["dgrad"] * 2 + ["fprop"] * 2 + ["wgrad"] * 2
    assert {(r.m, r.n, r.k) for r in grouped if r.role == "fprop"} == {(128, 192, 64), (128, 64, 96)}
    assert {r.fqn for r in grouped} == {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert all(not r.lowered and "grouped" in r.reason for r in grouped)


def test_the_model_is_unchanged(trained):
    _, model, state, _, _, _ = trained
    after = model.state_dict()
    assert list(after) == list(state)
    for key, (dtype, before) in state.items():
        assert after[key].dtype == dtype and torch.equal(after[key], before), key
