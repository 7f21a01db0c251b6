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

import quartet
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
RECIPES = ("quartet", "fp8", "quartet-paper")


def backend(policy):
    options = Options(policy=Policy.coerce(policy))
    return lambda gm, inputs: compile_graph(gm, inputs, options, Capture())


def built(policy, pack, mp=BF16, after=True, mesh=None, whole_model=False, checkpointed=False, **packing):
    """A model of two blocks under FSDP2, compiled by block or as a whole, and how it is gathered."""
    torch._dynamo.reset()
    model = seeded(lambda: Deep(WIDTH))
    for i, block in enumerate(model.layers):
        if not whole_model:
            block.compile(backend=backend(policy))
        if checkpointed:
            model.layers[i] = block = checkpoint_wrapper(block)
        fully_shard(block, mp_policy=mp, reshard_after_forward=after, mesh=mesh)
    fully_shard(model, mp_policy=mp, reshard_after_forward=after, mesh=mesh)
    report = pack_all_gather(model, policy, **packing) if pack else None
    return model, torch.compile(model, backend=backend(policy)) if whole_model else model, report


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


def stepped_in_backward(rank, model, compiled, steps=3):
    """Losses and weights where an optimizer a parameter steps as soon as there is a gradient."""
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    losses = []
    for _ in range(steps):
        loss = compiled(data(rank, 32, WIDTH)).float().square().mean()
        loss.backward()
        losses.append(loss.detach())
    return {name: local(p).detach() for name, p in model.named_parameters()} | {"losses": torch.stack(losses)}


def named(values):
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in values.items()}


def compared(rank, policy, whole=None, train=trained, **how):
    """Whether a run with packed gathers is that with ``whole`` ones bit for bit, and how it gathers; and the latter."""
    model, compiled, report = built(policy, True, **how)
    found = named(train(rank, model, compiled))
    if whole is None:
        whole = train(rank, *built(policy, False, **how)[:2])
    return {"differ": [name for name in whole if not torch.equal(found[name], whole[name])],
            "packed": tuple(named(dict.fromkeys(report.packed))),
            "fell": bool(found["losses"][-1] < found["losses"][0]),
            "plain": all(isinstance(p, DTensor) for p in model.parameters())}, whole


def packed(rank, folder):
    """Recipes, and every way to shard and compile: against one run that gathers weights whole."""
    found = {}
    for recipe in RECIPES:
        found[recipe], whole = compared(rank, recipe)
        if recipe == "fp8":
            for name, how in {"kept unsharded": {"after": False}, "checkpointed": {"checkpointed": True},
                              "compiled whole": {"whole_model": True}}.items():
                found[name], _ = compared(rank, recipe, whole, **how)
            found["optimizer in backward"], _ = compared(rank, recipe, train=stepped_in_backward)
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    found["groups of one rank"], _ = compared(rank, "quartet", mesh=alone, mp=MixedPrecisionPolicy())
    return found


def replicated(rank, folder):
    """Sharded over two of four ranks, replicated over the other two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return compared(rank, "fp8", mesh=mesh)[0]


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
    """A checkpoint of a packed run, read by one that gathers weights whole."""
    model, compiled, _ = built("fp8", True)
    remembered = [quartet.state_dict(model)]
    trained(rank, model, compiled, parts=1)
    remembered.append(quartet.state_dict(model))
    quartet.State(model).load_state_dict(quartet.State(model).state_dict())
    state = model.state_dict()
    found = {"kinds": {type(value).__name__ for value in state.values()}, "keys": list(state), "remembered": remembered}
    dcp.save(state, checkpoint_id=f"{folder}/packed")
    goes_on = trained(rank, model, compiled, steps=1, seed=6)
    other, compiled, _ = built("fp8", False)
    state = other.state_dict()
    found["others"] = list(state)
    dcp.load(state, checkpoint_id=f"{folder}/packed")
    other.load_state_dict(state, assign=True)
    resumed = trained(rank, other, compiled, steps=1, seed=6)
    return found | {"differ": [name for name in goes_on if not torch.equal(goes_on[name], resumed[name])]}


def changed(rank, folder):
    """Losses after weights were written to within an optimizer step, with packed and with whole gathers."""
    found = {}
    for pack in (True, False):
        model, _, _ = built("fp8", pack)
        trained(rank, model, model, steps=1, parts=1)
        weights, losses = [layer.up.weight for layer in model.layers], {}
        averages = [-0.5 * weight.detach() for weight in weights]
        state = {"model": model.state_dict()}
        dcp.save(state, checkpoint_id=f"{folder}/{pack}")

        def loss(name, model=model, losses=losses):
            value = model(data(rank, 32, WIDTH)).float().square().mean()
            losses[name] = float(value.detach())
            return value

        def swap(weights=weights, averages=averages):
            for weight, average in zip(weights, averages, strict=True):
                kept = weight.detach().clone()
                weight.data.copy_(average)
                average.copy_(kept)

        loss("first").backward()
        with torch.no_grad():
            loss("evaluated")
            swap()
            loss("averages")
            swap()
        loss("after averages").backward()
        with torch.no_grad():
            for weight in weights:
                weight.mul_(-2)
        loss("in place").backward()
        model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
        loss("load_state_dict").backward()
        model.zero_grad()
        dcp.load(state, checkpoint_id=f"{folder}/{pack}")
        loss("loaded in place").backward()
        found[pack] = losses
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
