"""What one of several gloo processes does; the tests look at what the ranks return."""

import os

import torch
import torch.distributed as dist
from direct_models import Net, stored, task
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from quartet import direct, optim

CASES = {
    "ternary": ("ternary", False, torch.optim.AdamW),
    "4": (4, False, torch.optim.AdamW),
    "8-fp8": (8, False, lambda p, lr: optim.AdamW(p, lr=lr, min_quantized=0)),
    "8-paper": (8, True, torch.optim.AdamW),
}
STEPS = 4


def main(rank, name, folder, ranks):
    """Run the function ``name`` on one rank and store what it returns."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=ranks)
    try:
        torch.save(globals()[name](rank, ranks), f"{folder}/{name}{rank}.pt")
    finally:
        dist.destroy_process_group()


def model(case, seed=0):
    torch.manual_seed(seed)
    bits, paper, _ = CASES[case]
    return direct.convert(Net(), bits, paper=paper)


def wrapped(case, net):
    return direct.Optimizer(CASES[case][2](net.parameters(), lr=3e-3), generator=torch.Generator().manual_seed(0))


def steps(run, optimizer, rank=0, ranks=1):
    """Each rank takes its part of the batch."""
    x, y = (t.chunk(ranks)[rank] for t in task())
    for _ in range(STEPS):
        nn.functional.cross_entropy(run(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp(rank, ranks):
    """Ranks start with other weights, rank 0's are broadcast."""
    found = {}
    for case in CASES:
        net = model(case, seed=rank)
        run = DistributedDataParallel(direct.broadcast(net), init_sync=False)
        steps(run, wrapped(case, net), rank, ranks)
        found[case] = stored(net)
    return found


def fsdp(rank, ranks):
    found = {}
    for case in CASES:
        net = model(case)
        for layer in (net.up, net.down):
            fully_shard(layer)
        fully_shard(net)
        optimizer = wrapped(case, net)
        steps(net, optimizer, rank, ranks)
        assert isinstance(net.up.weight, DTensor)
        part = net.up.weight.to_local()
        found[case] = {name: (p.to_local().codes.clone(), p.to_local().scale.clone())
                       for name, p in net.named_parameters() if isinstance(p.to_local(), direct.LowBitWeight)}
        found[case]["bytes"] = part.codes.untyped_storage().nbytes()
    return found


def uneven(rank, ranks):
    """The error of rows that no number of ranks divides."""
    net = direct.convert(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 4)), 8)
    fully_shard(net)
    try:
        net(torch.ones(2, 8))
    except ValueError as error:
        return str(error)
    return ""
