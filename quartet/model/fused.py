"""Layers that PyTorch evaluates as one operator, in dynamo's graph, written as training runs them.

``nn.TransformerEncoderLayer`` does so where no gradient is asked for, and the operator hides four products of weights.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

_OPERATOR = "_transformer_encoder_layer_fwd"


def open_layers(gm: GraphModule) -> None:
    """Put :func:`encoder_layer` in place of each such operator."""
    fused = [node for node in gm.graph.nodes if getattr(node.target, "__name__", "") == _OPERATOR]
    for node in fused:
        node.target = encoder_layer
    if fused:
        gm.recompile()


def encoder_layer(src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
                  proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
                  norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
                  ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
                  mask: Tensor | None = None, mask_type: int | None = None) -> Tensor:
    """``[batch, tokens, embed_dim]``; the arguments are the operator's.

    Args:
        mask: nonzero where a token takes no part: ``[batch, tokens]`` under ``mask_type`` 1, else scores' shape.
    """
    taking = None if mask is None else (mask[:, None, None] if mask_type == 1 else mask) == 0

    def attend(x: Tensor) -> Tensor:
        each = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, embed_dim // num_heads))
        q, k, v = each.permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(q, k, v, taking)
        return F.linear(heads.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed(x: Tensor) -> Tensor:
        return F.linear((F.gelu if use_gelu else F.relu)(F.linear(x, ffn_weight_1, ffn_bias_1)),
                        ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first(src))
        return x + feed(second(x))
    x = first(src + attend(src))
    return second(x + feed(x))
