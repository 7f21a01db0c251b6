"""What one of several gloo processes does; the tests look at what the ranks return."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from direct_models import Net, stored, task
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from quartet import direct, optim

WIDTHS = {"4": 65, "8-paper": 65}  # rows that two ranks do not divide, else 64
CASES = {
    "ternary": ("ternary", False, torch.optim.AdamW),
    "4": (4, False, torch.optim.AdamW),
    "8-fp8": (8, False, lambda p, lr: optim.AdamW(p, lr=lr, min_quantized=0)),
    "8-paper": (8, True, torch.optim.AdamW),
}
STEPS = 4


def model(case, seed=0):
    torch.manual_seed(seed)
    bits, paper, _ = CASES[case]
    return direct.convert(Net(WIDTHS.get(case, 64)), bits, paper=paper)


def wrapped(case, net, seed=0):
    return direct.Optimizer(CASES[case][2](net.parameters(), lr=3e-3), generator=torch.Generator().manual_seed(seed))


def steps(run, optimizer, rank=0, ranks=1):
    """Each rank takes its part of the batch."""
    x, y = (t.chunk(ranks)[rank] for t in task())
    for _ in range(STEPS):
        nn.functional.cross_entropy(run(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp(rank, folder):
    """Ranks start with other weights and seeds, those of rank 0 are broadcast."""
    found = {}
    for case in CASES:
        net = model(case, seed=rank)
        run = DistributedDataParallel(net)
        steps(run, wrapped(case, net, seed=rank), rank, dist.get_world_size())
        found[case] = stored(net)
    net, alone = model("4", seed=rank), direct.convert(nn.Sequential(nn.Linear(8, 8, bias=False)), 4)
    DistributedDataParallel(alone)  # a bucket of one tensor
    return found | {"broadcast": stored(direct.broadcast(net, source=1)), "of one": stored(alone)}


def fsdp(rank, folder):
    found = {}
    for case in CASES:
        net = sharded(case)
        optimizer = wrapped(case, net)
        steps(net, optimizer, rank, dist.get_world_size())
        assert isinstance(net.up.weight, DTensor)
        part = net.up.weight.to_local()
        found[case] = rows(net)
        found[case]["bytes"] = part.codes.untyped_storage().nbytes()
    return found | {"uneven": uneven(folder)}


def fsdp_of_one(rank, folder):
    """A group of one rank, where FSDP2 gathers nothing."""
    return fsdp(rank, folder)


def sharded(case):
    net = model(case)
    for layer in (net.up, net.down):
        fully_shard(layer)
    return fully_shard(net)


def rows(net):
    """Codes and scales of this rank's rows."""
    return {name: (w.codes.clone(), w.scale.clone()) for name, p in net.named_parameters()
            if isinstance(w := p.to_local() if isinstance(p, DTensor) else p, direct.LowBitWeight)}


def push(net, optimizer, seeds):
    """Steps by gradients that do not depend on the weights, the same for whole parameters and for their shards."""
    for seed in seeds:
        for i, p in enumerate(net.parameters()):
            full = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)) * 1e-2
            if isinstance(p, DTensor):
                part = full.chunk(dist.get_world_size())[dist.get_rank()].contiguous()
                full = DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=full.shape,
                                          stride=full.stride())
            p.grad = full
        optimizer.step()


def save(rank, folder):
    """Two ranks step, save, and go on; what the rows were when saved and in the end."""
    found = {}
    for case in CASES:
        net = sharded(case)
        optimizer = wrapped(case, net)
        push(net, optimizer, range(3))
        weights, states = get_state_dict(net, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{case}")
        found[case] = {"saved": rows(net)}
        push(net, optimizer, range(3, 5))
        found[case]["then"] = rows(net)
    return found


def load(rank, folder, make=model):
    """Load each checkpoint into other weights and another optimizer, and go on: on one rank, unless ``make`` shards."""
    found = {}
    for case in CASES:
        net = make(case)
        optimizer = wrapped(case, net)
        weights, states = get_state_dict(net, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{case}")
        set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=states)
        found[case] = {"loaded": rows(net)}
        push(net, optimizer, range(3, 5))
        found[case]["then"] = rows(net)
    return found


def load_sharded(rank, folder):
    """Two ranks again."""
    return load(rank, folder, sharded)


UNEVEN = (5, 1)  # rows, of which the second of two ranks has two and none


def layers(rows, bits, paper):
    torch.manual_seed(rows)
    return direct.convert(nn.Sequential(nn.Linear(8, rows), nn.Linear(rows, 4)), bits, paper=paper)


def uneven(folder):
    """Outputs of three steps on what all ranks see, the last of which a loaded checkpoint takes; one rank has all."""
    found, x = {}, torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for rows in UNEVEN:
        for bits, paper in (("ternary", False), (8, True)):
            seen, into = [], None
            for last in (False, True):
                net = fully_shard(layers(rows, bits, paper)) if dist.get_world_size() > 1 else layers(rows, bits, paper)
                optimizer = direct.Optimizer(torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9),
                                             generator=torch.Generator().manual_seed(0))
                state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
                if last:
                    dcp.load(state, checkpoint_id=into)
                    set_state_dict(net, optimizer, model_state_dict=state["model"],
                                   optim_state_dict=state["optimizer"])
                for _ in range(1 if last else 2):
                    out = net(x)
                    out.square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    seen.append(out.detach())
                into = f"{folder}/{rows}-{bits}-{dist.get_world_size()}"
                state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
                dcp.save(state, checkpoint_id=into)
            found[rows, bits] = torch.stack([*seen, net(x).detach()])
    return found
