"""Layers inside of a block whose results only the block reads, told by the sizes of the layers in it.

What a head makes leaves the last graph of a model, and no layer reads vectors of its width. So does what keys and
values are made of leave a graph that ends inside of an attention. In a block of a stack, an entry of a list of modules,
a layer of k inputs and n outputs is such a part where, of the layers behind it,

    split       one beside it reads w < n < 4w, w ≠ k: a part of its result, as of gate and up, of latents, of Mamba's Δ
    packed      one beside it reads w, n = w + 2d, d divides w: queries, keys and values in one
    repeated    one reads w = gn, g > 1, as much as a layer beside it makes, the queries; and another layer beside it
                has its sizes, or it makes keys and values: n/2 divides w

Behind is what is registered later (what is called qkv may come last), beside what is in the same module. A head or a
gate in a block is of other sizes, and what is called one is none of these whatever its size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from torch import nn

from quartet.model.flat import own_parameters, path_in_model
from quartet.passes.classify.by_name import class_by_name

Layers = dict[str, tuple[int, int]]  # name → inputs and outputs, in the order in which they are registered
_HEADS = {"head", "heads", "exit", "cls", "classes", "logits", "score", "scores", "predictions", "vocab", "experts"}
_LEAST = 32  # outputs: gates and heads of few scores have fewer


def parts_of(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of the named layers that are parts, or in one that makes as much: what an adapter is around, and its second
    matrix."""
    layers = dict(_layers(model))
    held = Counter(above for name in layers for above in _above(name))
    return frozenset(name for name in names if name in layers and any(
        around in layers and layers[around][1] == layers[name][1] and not _is_called_a_head(around)
        and _is_part(around, layers, held) for around in (*_above(name), name)))


def _is_called_a_head(name: str) -> bool:
    """Whether a layer is called a head or a gate, or something like it."""
    return class_by_name(name) != "linear" or not _HEADS.isdisjoint(re.split(r"[\W_]", name.rpartition(".")[2].lower()))


def _layers(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for path, module in nn.Module.named_modules(model):
        sizes: Any = [vars(module).get(name) for name in ("in_features", "out_features")]
        weight = own_parameters(module).get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            sizes = weight.shape if "nf" in vars(module) else reversed(weight.shape)  # Conv1D of GPT-2 is [in, out]
        k, n = sizes
        if isinstance(k, int) and isinstance(n, int):
            yield path_in_model(path), (k, n)


def _is_part(name: str, layers: Layers, held: Counter[str]) -> bool:
    block, home, (k, n) = _block(name), _home(name, held), layers[name]
    if not block or n < _LEAST:
        return False
    order = [other for other in layers if other.startswith(f"{block}.") and not other.startswith(f"{name}.")]
    behind = {layers[other][0] for other in order[order.index(name) + 1:]}
    beside = [other for other in order if other != name and _home(other, held) == home]
    read = {layers[other][0] for other in beside if order.index(other) > order.index(name)}
    made = [layers[other] for other in beside]
    return (any(w < n < 4 * w and w != k for w in read)
            or any(w < n and (n - w) % 2 == 0 and w % ((n - w) // 2) == 0 for w in (
                {k for k, _ in made} if "qkv" in name.rpartition(".")[2].lower() else read))
            or any(w > n and w % n == 0 and w in behind and (
                (k, n) in made or n % 2 == 0 and w % (n // 2) == 0) for _, w in made))


def _above(name: str) -> list[str]:
    """The modules around one, the model itself left out."""
    return list(accumulate(name.split(".")[:-1], "{}.{}".format))


def _block(name: str) -> str:
    """The innermost entry of a list that a layer is in; empty where there is none."""
    return next((above for above in reversed(_above(name)) if above.rpartition(".")[2].isdecimal()), "")


def _home(name: str, held: Counter[str]) -> str:
    """The innermost module around a layer that has others in it."""
    return next((above for above in reversed(_above(name)) if held[above] > 1 + held[name]), "")
