"""Give every quantised GEMM the best kernel that takes it; what none takes keeps its semantic ops.

Semantic ops that remain run as the reference in eager execution, and Inductor inlines their decomposition.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import cpu, ir, registry
from quartet.lowering.graph import editing, val
from quartet.passes.sites import SITE_KEY
from quartet.passes.state import State


def lower(state: State) -> None:
    """Choose a kernel for every scaled_mm and hand each kernel family its share of the graph."""
    chosen: dict[str, list[Node]] = {}
    for node in state.gm.graph.find_nodes(op="call_function", target=ir.SCALED_MM):
        kernel, _ = registry.choose(state.device, val(node).dtype, _specs(node), state.config.disable_kernels)
        name = kernel.name if kernel is not None else "reference"
        state.kernels[node.meta[SITE_KEY]] = name
        chosen.setdefault(name, []).append(node)
    if "cpp" not in chosen:
        return
    cpp = next(k for k in registry.KERNELS if k.name == "cpp")

    def accepts(spec: QuantSpec, rotation: int, dtype: torch.dtype) -> bool:
        return cpp.supports(state.device, dtype, spec, rotation) is None

    with editing(state.gm) as graph:
        cpu.lower(graph, chosen["cpp"], accepts)


def _specs(gemm: Node) -> tuple[tuple[QuantSpec, int], ...]:
    """(quantiser, Hadamard size before it) of both operands."""
    specs: list[tuple[QuantSpec, int]] = []
    for codes, text in ((gemm.args[0], gemm.args[4]), (gemm.args[2], gemm.args[5])):
        assert isinstance(codes, Node) and isinstance(codes.args[0], Node) and isinstance(text, str)
        made_from = codes.args[0].args[0]
        rotation = 0
        if isinstance(made_from, Node) and made_from.target is ir.HADAMARD:
            rotation = int(made_from.args[1])  # type: ignore[arg-type]
        specs.append((QuantSpec.parse(text), rotation))
    return tuple(specs)
