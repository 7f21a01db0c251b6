"""Small random models of real architectures, from the libraries that people take them from.

An architecture is a function that gives a model, the arguments of each call, and how a loss is made of what it returns.
Several calls of different lengths are compiled with symbolic sizes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY, LENGTH = 128, 32
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)
VISION = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32,
              patch_size=8, num_labels=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "resid_pdrop",
              "embd_pdrop", "attn_pdrop", "hidden_dropout", "embedding_dropout", "activation_dropout", "drop_path_rate",
              "layerdrop", "classifier_dropout", "final_dropout", "feat_proj_dropout", "hidden_dropout_rate")


@dataclass
class Specimen:
    """A model, the keyword arguments of each call, and the loss of what it returns."""

    model: nn.Module
    calls: list[dict[str, Any]]

    @staticmethod
    def loss(out: Any) -> Tensor:
        """The model's own, or a mean of what it returns."""
        if getattr(out, "loss", None) is not None:
            return out.loss
        if not isinstance(out, Tensor):
            out = next(iter(out.values() if isinstance(out, dict) else out))
        return out.float().square().mean()


def transformers(model: str, config: str | None = None, **sizes: Any) -> nn.Module:
    """A model of transformers by the names of its class and configuration, without dropout."""
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    made = getattr(library, config or model.removesuffix("ForCausalLM") + "Config")(**sizes)
    for name in NO_DROPOUT:
        if isinstance(getattr(made, name, None), float):
            setattr(made, name, 0.0)
    if hasattr(made, "use_cache"):
        made.use_cache = False
    return getattr(library, model)(made)


def text(length: int = LENGTH, batch: int = 2) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (batch, length))
    return {"input_ids": ids, "labels": ids}


def image(size: int = 32, batch: int = 4, name: str = "pixel_values") -> dict[str, Any]:
    return {name: torch.randn(batch, 3, size, size)}


def causal(model: str, *lengths: int, **sizes: Any) -> Callable[[], Specimen]:
    """A decoder with its usual small sizes, trained on texts of ``lengths``."""
    return lambda: Specimen(transformers(model, **(SMALL | sizes)), [text(n) for n in lengths or (LENGTH,)])


def pictures(model: str, config: str, size: int = 32, **sizes: Any) -> Callable[[], Specimen]:
    return lambda: Specimen(transformers(model, config, **sizes), [image(size) | {"labels": torch.arange(4)}])


def timm(name: str, **sizes: Any) -> Callable[[], Specimen]:
    """A model that timm registers, or one of its classes, where the registered ones fix the sizes."""
    size = sizes.pop("input", 32)

    def made() -> Specimen:
        library = importlib.import_module("timm")
        make = partial(library.create_model, name) if library.is_model(name) else getattr(library.models, name)
        model = make(num_classes=8, **sizes)
        for weight in (p for p in model.parameters() if p.dim() > 1 and not p.any()):
            nn.init.normal_(weight, std=0.02)  # a head of zeros would leave the loss without a gradient
        return Specimen(model, [image(size, name="x")])

    return made


def peft(base: Callable[[], Specimen], **settings: Any) -> Callable[[], Specimen]:
    """Adapters around a model, whose names all begin with the wrapper's."""

    def made() -> Specimen:
        library, inner = importlib.import_module("peft"), base()
        kind = getattr(library, settings.get("kind", "LoraConfig"))
        given = {name: value for name, value in settings.items() if name != "kind"}
        return Specimen(library.get_peft_model(inner.model, kind(**given)), inner.calls)

    return made


def diffusers(name: str, call: Callable[[], dict[str, Any]], **sizes: Any) -> Callable[[], Specimen]:
    return lambda: Specimen(getattr(importlib.import_module("diffusers"), name)(**sizes), [call()])


LLAMA = causal("LlamaForCausalLM", num_key_value_heads=2)
ADAPTED = dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
DIFFUSION_UNET = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
                      cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
                      down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def unet_call() -> dict[str, Any]:
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 7]),
            "encoder_hidden_states": torch.randn(2, 7, 32)}


def dit_call() -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 7]),
            "class_labels": torch.tensor([1, 2])}


def sd3_call() -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1.0, 7.0]),
            "encoder_hidden_states": torch.randn(2, 7, 32), "pooled_projections": torch.randn(2, 64)}


def pixart_call() -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 7]),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def sequence_to_sequence(model: str, config: str, **sizes: Any) -> Callable[[], Specimen]:
    return lambda: Specimen(transformers(model, config, vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0,
                                         **sizes), [text()])


def clip() -> Specimen:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = transformers("CLIPModel", "CLIPConfig", projection_dim=32, vision_config=sizes | dict(
        image_size=32, patch_size=8), text_config=sizes | dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH))
    return Specimen(model, [{"input_ids": text(16, 4)["input_ids"], "return_loss": True} | image()])


def wav2vec2(model: str = "Wav2Vec2ForCTC", config: str = "Wav2Vec2Config") -> Specimen:
    made = transformers(model, config, **SMALL, conv_dim=(32, 32), conv_stride=(5, 4), conv_kernel=(10, 8),
                        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
                        mask_time_prob=0.0, apply_spec_augment=False)
    return Specimen(made, [{"input_values": torch.randn(2, 640), "labels": torch.randint(1, VOCABULARY, (2, 5))}])


def sequences_of_labels(model: str, config: str, **sizes: Any) -> Callable[[], Specimen]:
    return lambda: Specimen(transformers(model, config, **(SMALL | dict(num_labels=8) | sizes)),
                            [text() | {"labels": torch.randint(0, 8, (2, LENGTH))}])


# the first dozen run with every test suite, all of them by `make zoo`
ARCHITECTURES: dict[str, Callable[[], Specimen]] = {
    "llama, lengths": causal("LlamaForCausalLM", 32, 24, 41, num_key_value_heads=2),
    "mamba2, lengths": lambda: Specimen(transformers(
        "Mamba2ForCausalLM", hidden_size=64, num_hidden_layers=1, num_heads=8, head_dim=16, state_size=16, n_groups=1,
        chunk_size=16, vocab_size=VOCABULARY), [text(n) for n in (32, 24, 41)]),
    "deepseek v3": causal("DeepseekV3ForCausalLM", num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4,
                          num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32,
                          kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16),
    "deberta v2": sequences_of_labels("DebertaV2ForTokenClassification", "DebertaV2Config", relative_attention=True,
                                      pos_att_type=["p2c", "c2p"], position_buckets=16),
    "clip": clip,
    "timm vit": timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2),
    "timm convnext": timm("convnext_atto", depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), input=64),
    "timm swin": timm("swin_tiny_patch4_window7_224", img_size=64, depths=(2, 2), num_heads=(2, 4), embed_dim=32,
                      window_size=4, input=64),
    "diffusers unet": diffusers("UNet2DConditionModel", unet_call, **DIFFUSION_UNET),
    "diffusers dit": diffusers("DiTTransformer2DModel", dit_call, num_attention_heads=4, attention_head_dim=16,
                               in_channels=4, out_channels=4, num_layers=2, norm_num_groups=8, sample_size=8,
                               patch_size=2, num_embeds_ada_norm=10),
    "peft lora": peft(LLAMA, **ADAPTED),
    "bloom": lambda: Specimen(transformers("BloomForCausalLM", hidden_size=64, n_layer=2, n_head=4,
                                           vocab_size=VOCABULARY), [text()]),

    "mistral": causal("MistralForCausalLM", num_key_value_heads=2),
    "phi3": causal("Phi3ForCausalLM", num_key_value_heads=2, pad_token_id=0),
    "gemma3": causal("Gemma3ForCausalLM", config="Gemma3TextConfig", num_key_value_heads=2, head_dim=16),
    "qwen3 moe": causal("Qwen3MoeForCausalLM", num_key_value_heads=2, head_dim=16, moe_intermediate_size=32,
                        num_experts=4, num_experts_per_tok=2),
    "olmo2": causal("Olmo2ForCausalLM", num_key_value_heads=2),
    "granite": causal("GraniteForCausalLM", num_key_value_heads=2),
    "starcoder2": causal("Starcoder2ForCausalLM", num_key_value_heads=2),
    "stablelm": causal("StableLmForCausalLM", num_key_value_heads=2),
    "gpt neox": causal("GPTNeoXForCausalLM"),
    "opt": causal("OPTForCausalLM", ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64),
    "falcon": causal("FalconForCausalLM", alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "mamba, lengths": lambda: Specimen(transformers("MambaForCausalLM", hidden_size=64, num_hidden_layers=2,
                                                    state_size=8, vocab_size=VOCABULARY), [text(n) for n in (16, 24)]),
    "roberta": sequences_of_labels("RobertaForTokenClassification", "RobertaConfig", max_position_embeddings=64),
    "electra": sequences_of_labels("ElectraForTokenClassification", "ElectraConfig", embedding_size=32),
    "albert": sequences_of_labels("AlbertForTokenClassification", "AlbertConfig", embedding_size=32),
    "distilbert": sequences_of_labels("DistilBertForTokenClassification", "DistilBertConfig", dim=64, hidden_dim=96,
                                      n_layers=2, n_heads=4),
    "bart": sequence_to_sequence("BartForConditionalGeneration", "BartConfig", d_model=64, encoder_layers=1,
                                 decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                                 encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64),
    "wav2vec2": wav2vec2,
    "hubert": lambda: wav2vec2("HubertForCTC", "HubertConfig"),
    "beit": pictures("BeitForImageClassification", "BeitConfig", **VISION),
    "dinov2": pictures("Dinov2ForImageClassification", "Dinov2Config", **VISION),
    "segformer": pictures("SegformerForImageClassification", "SegformerConfig", 64, hidden_sizes=[32, 64],
                          depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[1, 2], sr_ratios=[2, 1],
                          patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], num_labels=8),
    "timm mixer": timm("MlpMixer", img_size=64, patch_size=8, num_blocks=2, embed_dim=64, input=64),
    "timm resnet": timm("resnet18", channels=(32, 32, 64, 64), layers=(1, 1, 1, 1), input=64),
    "diffusers pixart": diffusers("PixArtTransformer2DModel", pixart_call, num_attention_heads=4, attention_head_dim=16,
                                  in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=64,
                                  norm_num_groups=8, sample_size=8, patch_size=2, caption_channels=32,
                                  use_additional_conditions=False),
    "diffusers sd3": diffusers("SD3Transformer2DModel", sd3_call, sample_size=8, patch_size=2, in_channels=4,
                               num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
                               caption_projection_dim=64, pooled_projection_dim=64, out_channels=4,
                               pos_embed_max_size=16),
    "peft rslora": peft(LLAMA, **ADAPTED, use_rslora=True),
    "peft ia3": peft(LLAMA, kind="IA3Config", target_modules=["k_proj", "down_proj"],
                     feedforward_modules=["down_proj"]),
}
COMMON = tuple(ARCHITECTURES)[:12]
