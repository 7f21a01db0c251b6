"""What gloo processes do with collectives that stand in the graph."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel import SequenceParallel as Sequence
from workers import MLP, Gathered, collectives, data, gradients, local, seeded

from quartet.backend import compile_graph
from quartet.options import Options
from quartet.policy import Policy
from quartet.runtime.capture import Capture

WIDTH = 64


class Compiler:
    """The backend without code generation; ``travel``: with the pass of that name."""

    def __init__(self, policy, travel):
        disabled = () if travel else ("travel",)
        self.options = Options(policy=Policy.coerce(policy), disable_passes=disabled)
        self.capture, self.records = Capture(), []

    def __call__(self, gm, inputs):
        return compile_graph(gm, inputs, self.options, self.capture, self.records.extend)


class Exchanged(nn.Module):
    """Tokens go to the other rank and through its layer, as those of experts do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        half = [x.shape[0] // 2] * 2
        x = functional.all_to_all_single_autograd(x.relu(), half, half, dist.group.WORLD)
        return self.layer(x)


def sequence(mesh):
    model = seeded(MLP)
    parallelize_module(model, mesh, {
        "norm": Sequence(), "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False)})
    return parallelize_module(model, mesh, PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Shard(1), use_local_output=False))


def travelling(rank, folder):
    """Gradients with and without the pass, and what the records say, for each way that collectives come in."""
    mesh = init_device_mesh("cpu", (2,))
    cases = {"sequence parallel": (lambda: sequence(mesh), data(7, 2, 32, WIDTH).chunk(2, 1)[rank]),
             "weights": (lambda: seeded(lambda: nn.Sequential(Gathered(mesh), Gathered(mesh))), data(rank, 32, WIDTH)),
             "experts": (lambda: seeded(Exchanged), data(rank, 64, WIDTH))}
    found = {}
    for name, (make, x) in cases.items():
        for policy in ("quartet", "fp8") if name == "sequence parallel" else ("quartet",):
            ways = []
            for travel in (True, False):
                torch._dynamo.reset()
                model, backend = make(), Compiler(policy, travel)
                compiled = torch.compile(model, backend=backend)
                ways.append(gradients(model, lambda x, compiled=compiled: local(compiled(x)), x))
                notes = [f"{record.role}: {note}" for record in backend.records for note in record.notes]
                found[f"{name} {policy} {'moved' if travel else 'whole'}"] = {
                    "notes": notes, "collectives": collectives(backend), "dtypes": dtypes(backend)}
            found[f"{name} {policy}"] = [key for key in ways[0] if not torch.equal(ways[0][key], ways[1][key])]
    return found


def dtypes(backend):
    """Of what gathers and exchanges are given."""
    nodes = (node for gm in backend.capture.graphs for node in gm.graph.nodes)
    return sorted({str(node.args[0].meta["val"].dtype) for node in nodes
                   if "all_gather" in str(node.target) or "all_to_all" in str(node.target)})
