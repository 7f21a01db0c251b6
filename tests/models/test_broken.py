"""Models of transformers with a graph break on both sides of every linear layer: each has the class of the whole."""

import os

import pytest
import torch
from torch import nn

from quartet.backend import compile_graph
from quartet.model.parts import parts_of
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128,
             num_labels=8, pad_token_id=0)
GROUPED = SMALL | dict(num_key_value_heads=2)
LATENT = SMALL | dict(num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16,
                      v_head_dim=16, first_k_dense_replace=1)


def breaks(layer):
    """Let a layer be a graph of its own."""
    class Broken(type(layer)):
        def forward(self, x):
            torch._dynamo.graph_break()
            y = nn.functional.linear(x, self.weight, self.bias)
            torch._dynamo.graph_break()
            return y

    layer.__class__ = Broken


def classes(model, inputs):
    """Module name → op class of each linear layer that was met; layers of one class and size share a graph."""
    torch._dynamo.reset()
    found, options = [], Options(Policy("bf16"))

    def backend(gm, example_inputs):
        return compile_graph(gm, example_inputs, options, Capture(), collect=found.extend)

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        torch.compile(model, backend=backend)(**inputs)
    return {r.fqn: r.op_class for r in found if r.role == "fprop" and r.op_class in ("linear", "lm_head", "router")}


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["k_proj", "v_proj"]))


MODELS = {
    "LlamaForCausalLM": GROUPED, "Phi3ForCausalLM": GROUPED, "DeepseekV3ForCausalLM": LATENT,
    "Qwen2ForTokenClassification": GROUPED, "BertForPreTraining": SMALL,
}


@pytest.mark.parametrize("name", [*MODELS, "lora"])
def test_a_layer_that_is_a_graph_of_its_own_has_the_class_that_it_has_in_the_whole(name):
    kind = getattr(transformers, "LlamaForCausalLM" if name == "lora" else name)
    config = kind.config_class(**MODELS.get(name, GROUPED))
    config.use_cache = False
    model = kind(config).eval()
    model = adapted(model) if name == "lora" else model
    inputs = {"input_ids": torch.randint(3, 128, (2, 32))}
    whole = classes(model, inputs)
    for layer in [layer for layer in model.modules() if type(layer) is nn.Linear]:
        breaks(layer)
    parts = classes(model, inputs)
    assert "linear" in parts.values() and ("lm_head" in parts.values() or name == "BertForPreTraining")
    assert parts == {layer: whole.get(layer, "lm_head") for layer in parts}  # a tied head has its table's name


def in_blocks(**layers):
    """Two blocks of such layers, behind each other."""
    return nn.Sequential(*(nn.ModuleDict(
        {name: nn.Linear(*sizes) for name, sizes in layers.items()}) for _ in range(2)))


@pytest.mark.parametrize("layers, parts", [
    (dict(q=(64, 64), k=(64, 32), v=(64, 32), o=(64, 64)), "k v"),
    (dict(v=(48, 32), k=(48, 32), q=(64, 64), o=(64, 64)), "v k"),
    (dict(q=(48, 128), kv=(48, 64), o=(128, 48)), "kv"),
    (dict(packed=(64, 128), o=(64, 64)), "packed"),
    (dict(o=(64, 64), qkv_proj=(64, 128)), "qkv_proj"),
    (dict(dense=(64, 64), out=(64, 128)), ""),
    (dict(gate_up=(64, 192), down=(96, 64)), "gate_up"),
    (dict(in_proj=(64, 256), x_proj=(128, 40), dt_proj=(8, 128), out_proj=(128, 64)), "in_proj"),
    (dict(up=(64, 96), down=(96, 64), early_exit=(64, 1000)), ""),
    (dict(dense=(64, 64), classes=(64, 32)), ""),
    (dict(policy=(64, 32), value=(64, 1)), ""),
    (dict(exit_head=(64, 32), second_head=(64, 32), q=(64, 64), o=(64, 64)), ""),
    (dict(gate=(64, 32), shared_gate=(64, 32), up=(64, 64), down=(64, 64)), ""),
    (dict(choose=(64, 8), up=(64, 64), down=(64, 64)), ""),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else None)
def test_parts_of_a_block_are_told_from_its_heads_and_gates_by_sizes(layers, parts):
    model = in_blocks(**layers)
    heads = {name for name, (_, n) in layers.items() if n not in {k for k, _ in layers.values()}}
    asked = [f"{i}.{name}" for i in range(2) for name in heads]
    assert parts_of(model, asked) == {f"{i}.{part}" for i in range(2) for part in parts.split()}
    assert not parts_of(model[0], list(layers))
