"""What one of two gloo processes does with delayed scaling; the test looks at what the ranks return."""

import torch
from residual_models import MLP, Deep
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import quartet
from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture
from quartet.runtime.slots import amax

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


def train(run, model, rank):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for step in range(STEPS):
        loss = run(torch.full((TOKENS, WIDTH), size(rank, step))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def data_parallel(rank, folder):
    found = {}
    for name, group in (("all", None), ("none", False)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        amax.reduce_over(group)
        model = MLP(WIDTH, HIDDEN)
        run = torch.compile(DistributedDataParallel(model), backend=backend())
        train(run, model, rank)
        found[name] = quartet.state_dict(model)["delayed"]
    return found


def sharded(rank, folder):
    mesh = init_device_mesh("cpu", (2,))

    def build():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Deep(WIDTH, HIDDEN)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for layer in model.layers:
            layer.compile(backend=backend())
        return model

    model = build()
    train(model, model, rank)
    state = quartet.state_dict(model)
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    goes_on = train(model, model, rank)

    model = build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.distributed.tensor.distribute_tensor(weights[name], mesh, p.placements))
    quartet.load_state_dict(model, state)
    return {"state": state["delayed"], "goes on": goes_on, "resumes": train(model, model, rank)}
