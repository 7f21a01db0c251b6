"""Training over several processes: what they exchange of quantised weights.

    for block in model.layers:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        block.compile(backend="quartet", options={"policy": "quartet"})
    fully_shard(model, mp_policy=…)
    print(quartet.distributed.pack_all_gather(model, "quartet"))     # what is gathered as codes, and why other is not

``docs/distributed.md`` has set-ups, what each gathers, and measurements.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from quartet.lowering.recipe.depth import Layer
from quartet.lowering.recipe.types import Gemm
from quartet.lowering.registry import QUANTIZED
from quartet.lowering.shards import multiple, quantize_shard
from quartet.passes.classify.by_name import class_by_name
from quartet.passes.classify.layers import layers_of
from quartet.policy import Policy
from quartet.report.text import human_bytes
from quartet.runtime.distributed import STEPS, Maxima, Packed, Packing, Refresh, Sharded, sharded

__all__ = ["Gathered", "PackedGather", "pack_all_gather"]
log = logging.getLogger("quartet")

Skip = Callable[[str, nn.Module], bool] | str | Iterable[str]
_MANY = 1 << 20  # tokens: what a rule about their number is asked at


@dataclass(frozen=True)
class Gathered:
    """How one parameter ``[out, in]`` is gathered.

    Attributes:
        name: in the model. spec: quantiser of the codes that travel, None in high precision. reason: why, then.
        bytes: of the gathered tensor. whole_bytes: in high precision.
    """

    name: str
    spec: str | None
    reason: str
    bytes: int
    whole_bytes: int


@dataclass(frozen=True)
class PackedGather:
    """How a model's parameters are gathered; prints as a table."""

    rows: tuple[Gathered, ...]

    @property
    def packed(self) -> tuple[str, ...]:
        """Names of the parameters that are gathered as codes."""
        return tuple(row.name for row in self.rows if row.spec is not None)

    @property
    def ratio(self) -> float:
        """Bytes of all gathers of a forward over those in high precision."""
        return sum(row.bytes for row in self.rows) / max(1, sum(row.whole_bytes for row in self.rows))

    def __str__(self) -> str:
        lines = [f"{len(self.packed)} of {len(self.rows)} parameters are gathered as codes, "
                 f"{human_bytes(sum(row.bytes for row in self.rows))} in place of "
                 f"{human_bytes(sum(row.whole_bytes for row in self.rows))} ({self.ratio:.3f})"]
        groups: dict[str, list[str]] = {}
        for row in self.rows:
            groups.setdefault(row.spec or f"high precision: {row.reason}", []).append(row.name)
        for what, names in groups.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  {what}\n      {shown}")
        return "\n".join(lines)


def pack_all_gather(model: nn.Module, policy: Any = "quartet", *, skip: Skip = ()) -> PackedGather:
    """Let FSDP2 gather the weights of linear layers as the codes that the policy's products read.

    Call it on the root, after all ``fully_shard`` and before the first forward. Parameters, gradients, optimizer and
    state dict stay in high precision and keep their names. The results are those of quantising after the gather, bit
    for bit. Weights that a product reads in high precision, or that the ranks cannot quantise alone, are gathered in
    high precision; the reasons are in what is returned, and logged.

    Args:
        model: what ``fully_shard`` was applied to; its blocks are compiled with ``backend="quartet"``.
        policy: the one that they are compiled with: a recipe's name, a Policy, a path.
        skip: weights to leave alone: module names with wildcards, or a function of (name, module).

    Raises:
        ValueError: nothing is sharded by ``fully_shard``, a forward has run, or the policy is ``"auto"``, which
            decides by prices only while it compiles.
        PolicyError: no such policy.
    """
    decides = Policy.coerce(policy)
    if decides.where_it_pays:
        raise ValueError("pack_all_gather needs a policy that says what is quantised; 'auto' decides when it compiles. "
                         "Name a recipe, for example pack_all_gather(model, 'fp8'), and compile with the same")
    places = sharded(model)
    if not places:
        raise ValueError(f"no parameter of this {type(model).__name__} is sharded by fully_shard; call "
                         "torch.distributed.fsdp.fully_shard on its blocks and on it first")
    if any(place.started for place in places):
        raise ValueError("FSDP has prepared its first all-gather; call pack_all_gather before the first forward")
    names = {id(module): name for name, module in model.named_modules()}
    linear = [names[id(place.owner)] for place in places if isinstance(place.owner, nn.Linear)]
    layers, left = layers_of(linear), _skips(skip)
    maxima, packed, rows = Maxima(), list[Packed](), list[Gathered]()
    for place in places:
        module = names[id(place.owner)]
        found = ("left out by skip=" if left(module, place.owner) else
                 _obstacle(place) or _packing(decides, place, module, layers.get(module)))
        rows.append(_row(place, module, found))
        if isinstance(found, Packing):
            packed.append(Packed(place, found, quantize_shard, maxima))
    report = PackedGather(tuple(rows))
    log.info("%s", report)
    STEPS.watch()

    refresh = Refresh(packed, maxima)

    @torch.compiler.disable
    def before(module: nn.Module, inputs: Any) -> None:
        refresh()

    for each in packed:
        each.attach()
    model.register_forward_pre_hook(before, prepend=True)
    return report


def _skips(skip: Skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    return lambda name, module: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _obstacle(place: Sharded) -> str:
    """Why a parameter cannot travel as codes whatever the policy says; empty where it can."""
    parameter = place.parameter
    if not isinstance(place.owner, nn.Linear) or place.name != "weight":
        return "no weight of a linear layer"
    *replicated, placement = parameter.placements
    if place.tied:
        return "shared with another module"
    if any(not isinstance(each, Replicate) for each in replicated) or type(placement) is not Shard:
        return "sharded by tensor parallelism too"
    if placement.dim != 0:
        return f"sharded along dimension {placement.dim}, across its rows"
    if parameter.shape[0] % place.mesh.size():
        return f"{parameter.shape[0]} rows are no multiple of the {place.mesh.size()} ranks"
    if place.offloaded:
        return "its shards are offloaded to the CPU"
    if place.regrouped:
        return "reshard_after_forward is a number: between forward and backward FSDP2 shards over fewer ranks"
    dtype = place.dtype or parameter.dtype
    return "" if dtype in QUANTIZED else f"of {dtype}"


def _packing(policy: Policy, place: Sharded, name: str, layer: Layer | None) -> Packing | str:
    """How the policy quantises a weight in forward, or why its codes are not all that is read of it."""
    out, features = place.parameter.shape
    found = policy.resolve(class_by_name(name), name, _MANY, out, features, layer)
    forward, recipe = found.fprop.gemm, found.fprop.recipe
    if forward is None or recipe is None or forward.b.spec is None:
        return f"read in high precision: {found.fprop.reason}"
    packing = Packing(str(forward.b.spec), *_basis(forward))
    for wanted, why in (
        (recipe.average is None, "rounds toward a moving average of it"),
        (recipe.estimator == "straight-through", "takes the slope of its quantiser for the gradient"),
        (recipe.smooth == "none", "scales its columns by the activations"),
    ):
        if not wanted:
            return f"recipe {recipe.name!r} {why}"
    if (reason := _unfit(packing, forward)) or (reason := _in_backward(found.dgrad.gemm, forward, found.dgrad.reason)):
        return reason
    if features % multiple(packing):
        return f"{features} columns are no multiple of {multiple(packing)}"
    return packing


def _basis(gemm: Gemm) -> tuple[int, tuple[int, ...] | None]:
    if gemm.rotation is None:
        return 0, None
    return gemm.rotation.n, gemm.rotation.signs if isinstance(gemm.rotation.signs, tuple) else None


def _unfit(packing: Packing, forward: Gemm) -> str:
    """Why ranks do not make the codes of their rows by themselves, given the tensor's largest magnitude."""
    spec = packing.quantizer
    if forward.rotation is not None and forward.rotation.signs == "random":
        return "rotated by random signs in every forward"
    if spec.stochastic:
        return "rounded at random in every forward"
    if spec.rule == "delayed":
        return "scaled by its earlier steps, whose record needs it in high precision"
    if spec.rule == "absmean":
        return "scaled by the mean magnitude of all ranks' rows, which depends on the order of the sum"
    if spec.tile:
        return f"its scales are those of {spec.block} rows together"
    rotated = packing.by_tensor and packing.rotation
    return "scaled by the largest magnitude of the whole rotated tensor" if rotated else ""


def _in_backward(dgrad: Gemm | None, forward: Gemm, reason: str) -> str:
    """Why dgrad reads the weight itself; empty where it starts from the codes of forward."""
    if dgrad is None:
        return f"read in high precision by dgrad: {reason}"
    if dgrad.b.source == "saved":
        return ""
    assert forward.b.spec is not None
    same = dgrad.b.spec == forward.b.spec and forward.b.spec.commutes_with_transpose
    return "" if same and dgrad.rotation is None and forward.rotation is None else "quantised anew by dgrad"


def _row(place: Sharded, module: str, found: Packing | str) -> Gathered:
    parameter = place.parameter
    name = f"{module}.{place.name}" if module else place.name
    size = (place.dtype or parameter.dtype).itemsize
    whole = parameter.numel() * size
    if isinstance(found, str):
        return Gathered(name, None, found, whole, whole)
    spec = found.quantizer
    bits = spec.bits + (8 / spec.block if spec.blocked and spec.scale != "fp32" else 0) + (1 if spec.mask else 0)
    rows = 4 * parameter.shape[0] if spec.block == "row" else 0
    blocks = 4 * parameter.numel() // spec.block if spec.blocked and spec.scale == "fp32" else 0
    return Gathered(name, found.spec, "", int(parameter.numel() * bits / 8) + rows + blocks, whole)
