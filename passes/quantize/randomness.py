"""The graph's own random draw on a device, and whether the user's operations draw there too."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from quartet.lowering.ir.graph import FORWARD, Builder, arguments, is_backward
from quartet.lowering.ir.ops.state import SEED
from quartet.passes.state import State
from quartet.runtime.compat import OpOverload

_DRAWS = {"rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "bernoulli", "uniform",
          "normal_functional", "exponential", "native_dropout", "inductor_seed", "inductor_seeds"}
SEED_KEY = "quartet_seed"  # node.meta key of the seed on a device: that device
_PROBABILITIES = ("p", "dropout_p")


def draw_seed(state: State, device: torch.device) -> Node:
    """The graph's one random draw on a device, made on first use (``quartet.runtime.streams``).

    It is saved whatever the user's checkpointing says, and under a memory budget: made again it would be another one.
    """
    graph = state.gm.graph
    drawn = next((node for node in graph.nodes if node.meta.get(SEED_KEY) == device), None)
    if drawn is not None:
        return drawn
    first = next(n for n in graph.nodes if n.op != "placeholder")
    build = Builder(graph, like=first, before=first, backward=False)
    build.meta = {"partitioner_tag": FORWARD, "recompute": CheckpointPolicy.MUST_SAVE}
    replayed = state.config.replayed and device.type == "cuda"
    seed = build(SEED, str(device), not replayed and moves_generator(graph, device))
    seed.meta[SEED_KEY] = device
    return seed


def moves_generator(graph: Graph, device: torch.device) -> bool:
    """Whether every forward draws numbers on a device for its results, beside our seed."""
    results = [n for n in graph.output_node().all_input_nodes if not is_backward(n)]
    needed = set(results)
    while results:
        above = [n for n in results.pop().all_input_nodes if n not in needed]
        needed.update(above)
        results += above
    return any(_draws(node) and _made(node).device == device for node in needed)


def _draws(node: Node) -> bool:
    """Whether an operation moves its generator whenever it runs."""
    if not isinstance(node.target, OpOverload) or is_backward(node):
        return False
    schema = node.target._schema
    chances = [value for name, value in arguments(node).items() if name in _PROBABILITIES]
    if "attention" in schema.name or schema.name.endswith("::native_dropout"):
        return any(isinstance(chance, float) and 0 < chance < 1 for chance in chances)
    if schema.name.split("::")[-1] not in _DRAWS:  # a size is no tensor
        return False
    return not any(isinstance(size, int) and size == 0 for size in _made(node).shape)


def _made(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value
