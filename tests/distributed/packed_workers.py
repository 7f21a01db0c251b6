"""What gloo processes do with weights that FSDP2 gathers as codes."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from workers import Deep, data, local, seeded

from quartet.backend import compile_graph
from quartet.distributed import pack_all_gather
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture, Pretence
from quartet.runtime.devices import Target

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from traffic import Traffic  # noqa: E402

WIDTH = 128
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
RECIPES = ("quartet", "fp8", "quartet2", "quartet-paper")


def backend(policy):
    options = Options(policy=Policy.coerce(policy))
    return lambda gm, inputs: compile_graph(gm, inputs, options, Capture())


def built(policy, pack, mp=BF16, after=True, mesh=None, whole=False, checkpointed=False, **packing):
    """A model of two blocks under FSDP2, compiled by block or as a ``whole``, and how it is gathered."""
    torch._dynamo.reset()
    model = seeded(lambda: Deep(WIDTH))
    for i, block in enumerate(model.layers):
        if not whole:
            block.compile(backend=backend(policy))
        if checkpointed:
            model.layers[i] = block = checkpoint_wrapper(block)
        fully_shard(block, mp_policy=mp, reshard_after_forward=after, mesh=mesh)
    fully_shard(model, mp_policy=mp, reshard_after_forward=after, mesh=mesh)
    report = pack_all_gather(model, policy, **packing) if pack else None
    return model, torch.compile(model, backend=backend(policy)) if whole else model, report


def trained(rank, model, compiled, steps=2, parts=2, seed=5):
    """Losses, the last gradients and the weights after a few steps of accumulated micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    torch.manual_seed(seed)
    losses = []
    for step in range(steps):
        for part in range(parts):
            loss = compiled(data(rank + 10 * step + 5 * part, 32, WIDTH)).float().square().mean()
            loss.backward()
            losses.append(loss.detach())
        found = {f"grad {name}": local(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: local(p).detach() for name, p in model.named_parameters()} | {"losses": torch.stack(losses)}


def both(rank, policy, **how):
    """Whether a run with packed gathers is that with whole ones bit for bit, and how the former gathers."""
    model, compiled, report = built(policy, True, **how)
    packed = trained(rank, model, compiled)
    whole = trained(rank, *built(policy, False, **how)[:2])
    return {"differ": [name for name in whole if not torch.equal(packed[name], whole[name])], "packed": report.packed,
            "plain": all(type(p) is nn.Parameter or isinstance(p, DTensor) for p in model.parameters()),
            "fell": bool(packed["losses"][-1] < packed["losses"][0]), "losses": packed["losses"]}


def packed(rank, folder):
    """Every recipe, and every way to shard and compile."""
    found = {recipe: both(rank, recipe) for recipe in RECIPES}
    found["kept unsharded"] = both(rank, "fp8", after=False)
    found["fp32"] = both(rank, "quartet", mp=MixedPrecisionPolicy())
    found["checkpointed"] = both(rank, "fp8", checkpointed=True)
    found["whole"] = both(rank, "fp8", whole=True)
    return found


def replicated(rank, folder):
    """Sharded over two of four ranks, replicated over the other two; a group of one rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    return {"hsdp": both(rank, "fp8", mesh=mesh), "one rank": both(rank, "quartet", mesh=alone)}


def sent(rank, folder):
    """Bytes of a step by collective and dtype, with two micro-batches."""
    found = {}
    for policy, pack in (("bf16", False), ("quartet", True), ("fp8", True)):
        model, compiled, _ = built(policy, pack)
        with Traffic() as traffic:
            trained(rank, model, compiled, steps=1)
        found[policy] = dict(traffic.bytes), dict(traffic.calls)
    return found


def pretended(rank, folder):
    """A step of one layer as it is compiled for a GPU that is not here."""
    options = replace(Options(policy=Policy.coerce("quartet")), target=Target.named("h200"))
    model = seeded(lambda: Deep(WIDTH, 1))
    model.layers[0].compile(backend=lambda gm, inputs: compile_graph(gm, inputs, options, Pretence()))
    fully_shard(model, mp_policy=BF16)
    pack_all_gather(model, "quartet")
    model(data(rank, 64, WIDTH)).float().sum().backward()
    return all(p.grad is not None for p in model.parameters())


def saved(rank, folder):
    """A checkpoint of a packed run, read by one that is not and the other way round."""
    found = {}
    for first in (True, False):
        model, compiled, _ = built("fp8", first)
        trained(rank, model, compiled)
        state = model.state_dict()
        found[f"keys {first}"] = {name: type(value).__name__ for name, value in state.items()}
        dcp.save(state, checkpoint_id=f"{folder}/{first}")
        goes_on = trained(rank, model, compiled, seed=6)
        other, compiled, _ = built("fp8", not first)
        state = other.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/{first}")
        other.load_state_dict(state, assign=first)
        resumed = trained(rank, other, compiled, seed=6)
        found[first] = [name for name in goes_on if not torch.equal(goes_on[name], resumed[name])]
    return found


def refused(rank, folder):
    """What is gathered in high precision, and which reads of codes are errors."""
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.odd = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, 33)
            self.lm_head = nn.Linear(WIDTH, 64, bias=False)
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.second.weight = self.first.weight
            self.free = nn.Linear(WIDTH, WIDTH)

    found = {}
    for policy in ("fp8", "fp8-block", "fp8-rowwise", "fp8-delayed", "bitnet", "halo-fp8-1", "fp4-dge"):
        model = fully_shard(seeded(Tied))
        found[policy] = {row.name: row.reason for row in pack_all_gather(model, policy, skip="none").rows}
    found["skipped"] = {row.name: row.reason for row in built("fp8", True, skip="layers.0.*")[2].rows}
    for name, (compiled_with, gathered_by) in {"other": ("quartet", "fp8"), "eager": (None, "fp8")}.items():
        torch._dynamo.reset()
        model = seeded(lambda: Deep(WIDTH))
        for block in model.layers:
            if compiled_with is not None:
                block.compile(backend=backend(compiled_with))
            fully_shard(block, mp_policy=BF16)
        fully_shard(model, mp_policy=BF16)
        pack_all_gather(model, gathered_by)
        try:
            model(data(rank, 32, WIDTH))
        except Exception as error:
            found[name] = " ".join(str(error).split())
    for name, call in {"auto": lambda: pack_all_gather(model, "auto"), "late": lambda: pack_all_gather(model, "fp8"),
                       "unsharded": lambda: pack_all_gather(seeded(Deep), "fp8")}.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found
