"""``bench_fsdp.py --check``: numbers of distributed steps against each other and against one process.

    packed    losses and weights of a few steps with packed gathers are those of quantising after it, bit for bit,
              resharded after forward and not
    ddp       gradients of one step are the mean of those that one process finds for each rank's batch
    tp        one step of tensor parallelism with sequence parallelism against one process: cosine of the gradients

Attention is computed from its products: the backward of the fused kernels adds up in no fixed order on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import fsdp_columns as columns
import gpu_common as common
import torch
import torch.distributed as dist
from llama import Llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

STEPS, LAYERS = 3, 1
LEAST = {"bf16": 0.999, "fp8": 0.98, "quartet": 0.75}  # cosine of a gradient with that of one process


def check(shape: columns.Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Every comparison by name: whether it holds, and a figure."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    results: dict[str, Any] = {}
    with sdpa_kernel(SDPBackend.MATH):
        for policy in ("fp8", "quartet"):
            _try(results, f"packed {policy}", lambda p=policy: _packed(p, shape, args), args)
        for policy in LEAST:
            _try(results, f"ddp {policy}", lambda p=policy: _ddp(p, shape, args), args)
            _try(results, f"tp {policy}", lambda p=policy: _tensor_parallel(p, shape, args), args)
    return results


def show(results: dict[str, Any]) -> str:
    return "\n".join(f"{'ok  ' if found.get('ok') else 'FAIL'}  {name}: {found.get('failed') or found['figure']}"
                     for name, found in results.items())


def _try(results: dict[str, Any], name: str, compare: Callable[[], dict[str, Any]], args: argparse.Namespace) -> None:
    if not name.startswith(args.only):
        return
    try:
        found = compare()
        held = torch.tensor([found["ok"]], dtype=torch.int32, device=args.device)
        dist.all_reduce(held, dist.ReduceOp.MIN)
        results[name] = {**found, "ok": bool(held.item())}
    except Exception as error:  # the same on all ranks
        results[name] = common.failure(error)
    if dist.get_rank() == 0:
        common.say(show({name: results[name]}))
    common.release(args.device)


def _packed(policy: str, shape: columns.Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways to reshard, one after the other."""
    ends: list[list[Tensor]] = []
    for column in (policy, policy + columns.PACKED):
        torch._dynamo.reset()
        run = columns.prepared(column, shape, args.device, args.eager)
        for after in (True, False):
            run.reshard(after)
            for _ in range(STEPS):
                run.step()
        ends.append([torch.stack(run.losses), *(_local(p) for p in run.model.parameters())])
    differ = sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    losses = ", ".join(f"{loss:.6f}" for loss in ends[1][0].tolist())
    return {"ok": differ == 0, "figure": f"{differ} of {len(ends[0])} tensors differ; losses {losses}"}


def _ddp(policy: str, shape: columns.Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Ranks draw their own random bits, so that what rounds stochastically is compared by direction only."""
    batches = [_batch(shape, rank, args.device) for rank in range(dist.get_world_size())]
    model = _model(shape, args.device)
    alone = _compiled(model, policy, args)
    for tokens in batches:
        (_loss(alone, tokens) / len(batches)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    torch._dynamo.reset()
    model = _model(shape, args.device)
    wrapped = DistributedDataParallel(_compiled(model, policy, args))
    _loss(wrapped, batches[dist.get_rank()]).backward()
    return _compared(policy, expected, [p.grad for p in model.parameters()])


def _tensor_parallel(policy: str, shape: columns.Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Blocks with their tokens sharded between the products; each rank quantises its part of a weight."""
    tokens, mesh = _batch(shape, 0, args.device), init_device_mesh(args.device.type, (dist.get_world_size(),))
    model = _model(shape, args.device)
    _loss(_compiled(model, policy, args), tokens).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    torch._dynamo.reset()
    model = _model(shape, args.device)
    for block in model.blocks:
        _parallelize(block, mesh)
    parallelize_module(model, mesh, {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())})
    backend = columns.backend(None if policy == "bf16" else policy, args.eager)
    _loss(torch.compile(model, **backend), tokens).backward()
    whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return _compared(policy, expected, whole)


def _parallelize(block: nn.Module, mesh: Any) -> None:
    block.attention.heads //= mesh.size()
    parallelize_module(block, mesh, {
        "attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(Shard(1), None, None),
                                        desired_input_layouts=(Replicate(), None, None)),
        "attention.q_proj": ColwiseParallel(), "attention.k_proj": ColwiseParallel(),
        "attention.v_proj": ColwiseParallel(), "attention.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "ffn": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "ffn.gate_proj": ColwiseParallel(), "ffn.up_proj": ColwiseParallel(),
        "ffn.down_proj": RowwiseParallel(output_layouts=Shard(1))})


def _compared(policy: str, expected: list[Tensor], found: list[Tensor]) -> dict[str, Any]:
    """Cosines of the gradients of matrices, and whether all are equal bit for bit."""
    same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    cosines = [torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()
               for a, b in zip(expected, found, strict=True) if a.dim() == 2]
    least = min(cosines)
    return {"ok": least >= LEAST[policy], "figure": f"least cosine of a gradient {least:.6f}"
            + (", all equal bit for bit" if same else "")}


def _model(shape: columns.Shape, device: torch.device) -> Llama:
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(shape.config, shape.length)


def _compiled(model: Llama, policy: str, args: argparse.Namespace) -> nn.Module:
    """In place, by block."""
    for block in model.blocks:
        block.compile(**columns.backend(None if policy == "bf16" else policy, args.eager))
    return model


def _batch(shape: columns.Shape, rank: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(shape.config.vocabulary, (shape.batch, shape.length + 1), generator=generator).to(device)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _local(parameter: Tensor) -> Tensor:
    whole = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return whole.detach().clone()
