"""What one of two gloo processes does with delayed scaling; the test looks at what the ranks return."""

import contextlib

import torch
from residual_models import MLP, Deep
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import quartet
from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture
from quartet.runtime.slots.ranks import replicas

TOKENS, WIDTH, HIDDEN, STEPS = 32, 32, 48, 3  # fewer tokens would leave wgrad alone
SPEC = quartet.QuantSpec.parse("e4m3/tensor fp32 delayed nearest")


def backend():
    operand, saved = quartet.Operand(SPEC), quartet.Operand(SPEC, "saved")
    recipe = quartet.Recipe("delayed", fprop=quartet.Gemm(operand, operand), dgrad=quartet.Gemm(operand, saved),
                            wgrad=quartet.Gemm(operand, saved), history=quartet.Delayed(4))
    capture, options = Capture(), Options(policy=Policy(recipe))
    return lambda gm, inputs: compile_graph(gm, inputs, options, capture)


def size(rank, step):
    """Largest magnitude of a rank's data: on rank 0 in the first step and on rank 1 afterwards it is the larger one."""
    return 5.0 if step == 0 and rank == 0 else 1.0 + rank + step


def train(run, model, rank, micro_batches=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for step in range(STEPS):
        for micro in range(micro_batches):
            loss = run(torch.full((TOKENS, WIDTH), size(rank, step) + micro)).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@contextlib.contextmanager
def collectives():
    """Sizes of the maxima over ranks that are asked for meanwhile."""
    sizes, reduce = [], torch.distributed.all_reduce

    def counted(tensor, op=torch.distributed.ReduceOp.SUM, *args, **kwargs):
        if op == torch.distributed.ReduceOp.MAX:
            sizes.append(tensor.numel())
        return reduce(tensor, op, *args, **kwargs)

    torch.distributed.all_reduce = counted
    try:
        yield sizes
    finally:
        torch.distributed.all_reduce = reduce


def seen(model):
    return quartet.state_dict(model)["delayed"]


def data_parallel(rank, folder):
    found = {}
    for name, group in (("as wrapped", None), ("none", False), ("named", torch.distributed.group.WORLD)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        replicas.reduce_over(group)
        model = MLP(WIDTH, HIDDEN)
        run = torch.compile(model if name == "named" else DistributedDataParallel(model), backend=backend())
        with collectives() as sizes:
            train(run, model, rank, micro_batches=2)
        found[name] = seen(model), sizes
    replicas.reduce_over(None)
    return found


class Dropping(torch.nn.Module):
    """Layers, compiled one by one, of which some are left out."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(MLP(WIDTH, HIDDEN) for _ in range(3))
        for layer in self.layers:
            layer.compile(backend=backend())

    def forward(self, x, dropped=()):
        for number, layer in enumerate(self.layers):
            x = x if number in dropped else layer(x)
        return x


def uneven(rank, folder):
    """Ranks that do not run the same: layers left out, forwards more, inputs fewer, other models and steps."""
    torch.manual_seed(0)
    model = Dropping()
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step(value, dropped=()):
        replica(torch.full((TOKENS, WIDTH), value), dropped).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {}
    with collectives() as sizes:
        step(2.0 + rank, dropped=(1,) if rank == 0 else (2,))
        step(3.0 - rank, dropped=(1,) if rank == 0 else ())
        if rank == 1:
            with torch.no_grad():
                model(torch.full((TOKENS, WIDTH), 90.0))  # evaluation
            model(torch.full((TOKENS, WIDTH), 80.0))  # to log something
        step(1.0 + rank)
        step(1.5 + rank)
        found["dropped"], found["sizes"] = seen(model), list(sizes)
        del sizes[:]
        with replica.join():
            for number in range(1 + 2 * rank):
                step(4.0 + number)
        found["joined"], found["sizes there"] = seen(model), list(sizes)

        torch._dynamo.reset()
        stage = MLP(WIDTH, HIDDEN + 16 * rank)  # each rank one of its own
        run, optimizer = torch.compile(stage, backend=backend()), torch.optim.SGD(stage.parameters(), 0.01)
        for number in range(2 + rank):
            run(torch.full((TOKENS, WIDTH), 1.0 + number + rank)).square().mean().backward()
            optimizer.step()
        found["stage"] = seen(stage)
    return found


def sharded(rank, folder):
    mesh = init_device_mesh("cpu", (2,))

    def build(checkpointed=False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Deep(WIDTH, HIDDEN)
        for number, layer in enumerate(model.layers):
            layer.compile(backend=backend())
            if checkpointed:
                model.layers[number] = checkpoint_wrapper(layer)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    model = build()
    train(model, model, rank)
    state = quartet.state_dict(model)
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    with collectives() as sizes:
        goes_on = train(model, model, rank, micro_batches=2)
    ended = seen(model)

    model = build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.distributed.tensor.distribute_tensor(weights[name], mesh, p.placements))
    quartet.load_state_dict(model, state)
    resumes = train(model, model, rank, micro_batches=2)
    again = build(checkpointed=True)
    train(again, again, rank)
    found = {"state": state["delayed"], "goes on": goes_on, "resumes": resumes, "ended": ended, "sizes": sizes}
    return found | {"computed again": train(again, again, rank, micro_batches=2), "ended again": seen(again)}
