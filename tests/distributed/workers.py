"""What one of several gloo processes does; the tests look at what the ranks return."""

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import linear, relu, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.runtime.capture import Capture

WIDTH, HEADS, RATE = 64, 4, 3e-3


class Backend:
    """The backend with Inductor's code generation left out; counts its calls and keeps the records."""

    def __init__(self):
        self.calls, self.records, self.capture = 0, [], Capture()

    def __call__(self, gm, inputs):
        self.calls += 1
        return compile_graph(gm, inputs, Options(), self.capture, self.records.extend)

    def lowered(self):
        """(module, role) of what was lowered."""
        return sorted((record.fqn, record.role) for record in self.records if record.lowered)


class MLP(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(relu(self.up(self.norm(x))))


class Deep(nn.Module):
    """Not nn.Sequential: dynamo runs the forward of PyTorch's own containers in eager when a graph starts there."""

    def __init__(self, width=WIDTH, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(MLP(width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Gathered(nn.Module):
    """A linear layer that gathers its sharded weight inside the graph."""

    def __init__(self, mesh):
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(torch.randn(WIDTH, WIDTH) / 8, mesh, [Shard(0)]))

    def forward(self, x):
        return x + linear(x, self.weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]))


def seeded(function, seed=0):
    torch.manual_seed(seed)
    return function()


def gradients(model, compiled, x, seed=1):
    """Local gradients of one step."""
    model.zero_grad()
    torch.manual_seed(seed)
    compiled(x).square().mean().backward()
    return {name: local(p.grad).clone() for name, p in model.named_parameters()}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def data(rank, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + rank))


def fit(model, compiled, x, steps=8):
    """Losses of a few steps of Adam towards zero output."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    return [descend(optimizer, compiled, x) for _ in range(steps)], optimizer


def descend(optimizer, compiled, x):
    loss = compiled(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def ddp(rank, folder):
    """Gradients of a model alone, in DDP as one graph, and in DDP cut at its buckets; then a little training."""
    x, same = data(rank, 32, WIDTH), data(7, 32, WIDTH)
    model = seeded(MLP)
    alone = torch.compile(model, backend=Backend())
    found = {"same data": gradients(model, alone, same), "same data again": gradients(model, alone, same),
             "alone": gradients(model, alone, x)}
    wrapped, backend = DistributedDataParallel(model), Backend()
    with torch._dynamo.config.patch(optimize_ddp=False):
        found["whole"] = gradients(model, torch.compile(wrapped, backend=backend), x)
    found["whole lowered"] = backend.lowered()

    deep = seeded(lambda: Deep(256, 3))
    wrapped, backend = DistributedDataParallel(deep, bucket_cap_mb=1), Backend()
    compiled, x = torch.compile(wrapped, backend=backend), data(rank, 32, 256)
    found["split"] = gradients(deep, compiled, x)
    found |= {"split calls": backend.calls, "split lowered": backend.lowered()}
    found["losses"], _ = fit(deep, compiled, x)
    found["weights"] = {name: p.detach() for name, p in deep.named_parameters()}
    return found


def sharded():
    model = seeded(Deep)
    for block in model.layers:
        fully_shard(block)
    return fully_shard(model)


def fsdp(rank, folder):
    """Training with FSDP2, compiled by block and as a whole, and a checkpoint in the middle."""
    x, found = data(rank, 32, WIDTH), {}
    plain = torch.compile(seeded(Deep), backend=Backend())
    found["unsharded"] = plain(x).detach()

    whole, backend = sharded(), Backend()
    compiled = torch.compile(whole, backend=backend)
    found["whole"] = compiled(x).detach()
    found["whole losses"], _ = fit(whole, compiled, x)
    found["whole lowered"] = backend.lowered()

    torch._dynamo.reset()
    model, backend = sharded(), Backend()
    keys = list(model.state_dict())
    for block in model.layers:
        block.compile(backend=backend)
    found["blocks"] = model(x).detach()
    found["losses"], optimizer = fit(model, model, x)
    found |= {"lowered": backend.lowered(), "keys": list(model.state_dict()) == keys,
              "sharded": all(isinstance(p, DTensor) for p in model.parameters())}

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/checkpoint")
    torch.manual_seed(3)
    found["goes on"] = [descend(optimizer, model, x) for _ in range(2)]

    torch._dynamo.reset()
    model = sharded()
    for block in model.layers:
        block.compile(backend=Backend())
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    torch.manual_seed(3)
    found["resumes"] = [descend(optimizer, model, x) for _ in range(2)]
    return found


def tensor_parallel(rank, folder):
    """One step with the weights of attention and MLP split over the ranks, in eager and compiled; then training."""
    mesh, x = init_device_mesh("cpu", (2,)), data(7, 2, 16, WIDTH)
    model = seeded(lambda: nn.Sequential(Attention(), MLP()))
    parallelize_module(model[0], mesh, {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(),
                                        "o": RowwiseParallel()})
    parallelize_module(model[1], mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    found = {"eager": gradients(model, model, x), "compiled": gradients(model, compiled, x),
             "lowered": backend.lowered(), "collectives": collectives(backend)}
    found["losses"], _ = fit(model, compiled, x)
    found["replicated"] = {name: local(p).detach() for name, p in model.named_parameters()
                           if not isinstance(p, DTensor) or p.placements == (Replicate(),)}
    return found


def sequence_parallel(rank, folder):
    """The MLP with its tokens split over the ranks outside of the matmuls, and a weight gathered in the graph."""
    mesh, x = init_device_mesh("cpu", (2,)), data(7, 1, 32, WIDTH)
    model = seeded(MLP)
    parallelize_module(model, mesh, {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    })
    parallelize_module(model, mesh, PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1),
                                                       use_local_output=False))
    backend, shard = Backend(), x.chunk(2, 1)[rank]
    found = {"eager": gradients(model, lambda x: local(model(x)), shard)}
    compiled = torch.compile(model, backend=backend)
    found |= {"compiled": gradients(model, lambda x: local(compiled(x)), shard), "lowered": backend.lowered(),
              "collectives": collectives(backend)}

    model, backend = seeded(lambda: nn.Sequential(Gathered(mesh), Gathered(mesh))), Backend()
    compiled, x = torch.compile(model, backend=backend), data(rank, 32, WIDTH)
    found |= {"gathered eager": gradients(model, model, x), "gathered": gradients(model, compiled, x),
              "gathered lowered": backend.lowered(), "gathered collectives": collectives(backend)}
    return found


def collectives(backend):
    names = {str(node.target) for gm in backend.capture.graphs for node in gm.graph.nodes}
    return sorted(name.split(".")[1] for name in names if name.startswith("_c10d_functional"))
