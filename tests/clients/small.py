"""A small Llama of transformers, and rows of tokens to learn."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 64, 32


def llama(layers=1, **more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, bos_token_id=0, eos_token_id=1, **more))


def rows(count=16):
    """Each token is the one before it plus one."""
    tokens = (torch.arange(LENGTH) + torch.arange(count)[:, None] * 5) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]
