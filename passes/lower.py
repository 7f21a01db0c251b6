"""Give every quantised GEMM the best kernel that takes it; what none takes keeps its semantic ops.

Semantic ops that remain run as the reference in eager execution, and Inductor inlines their decomposition. Last, every
op is given a provider that runs on its device.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from quartet.kernels.spec import QuantSpec
from quartet.lowering import registry
from quartet.lowering.ir import providers
from quartet.lowering.ir.graph import editing, val
from quartet.lowering.ir.operands import SCALED, Operand, Product
from quartet.lowering.targets import fp8_products
from quartet.lowering.targets.blackwell import block_scaled
from quartet.lowering.targets.blackwell import lower as blackwell
from quartet.passes.graph_pass import graph_pass
from quartet.passes.sites import SITE_KEY, Quantized
from quartet.passes.state import State
from quartet.runtime.devices import Target


@graph_pass(reads=Quantized, optional=True,
            summary="each product and the chain around it → the first kernel that accepts it")
def lower(state: State) -> None:
    """Choose a kernel for every product and hand each kernel family its share of the graph, device by device."""
    chosen: dict[tuple[registry.Kernel, torch.device], list[Node]] = {}
    for node in state.gm.graph.nodes:
        if node.target not in SCALED:
            continue
        product = Product.of(node)
        specs = _chain(product.a), _chain(product.b)
        device, gemm = val(node).device, node.meta[SITE_KEY]
        target = state.config.target_of(device)
        kernel, reasons = registry.choose(target, val(node).dtype, specs, state.config.disable_kernels,
                                          node.target)
        if kernel is None:
            state.declined[gemm] = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            continue
        state.kernels[gemm] = kernel.name
        chosen.setdefault((kernel, device), []).append(node)
    for (kernel, device), nodes in chosen.items():
        if kernel.lower is not None:
            with editing(state.gm) as graph:
                kernel.lower(graph, nodes, partial(_accepts, state.config.target_of(device), kernel))
    if state.config.accumulation == "promoted":
        fp8_products.promote(state.gm.graph)
    if state.config.portable_rounding:
        blackwell.use_integers(state.gm.graph)
    if state.config.autotune:
        block_scaled.autotune(state.gm.graph)
    providers.settle(state.gm.graph, state.config.target_of, state.config.disable_kernels)


def _accepts(target: Target, kernel: registry.Kernel, spec: QuantSpec, rotation: int, dtype: torch.dtype) -> bool:
    return (kernel.reads or kernel.supports)(target, dtype, spec, rotation) is None


def _chain(operand: Operand) -> tuple[QuantSpec, int]:
    """(quantiser, Hadamard size before it) of an operand.

    Raises:
        ValueError: neither the product nor the graph tells the latter.
    """
    if operand.rotation is None:
        raise ValueError(f"how {operand.codes.format_node()} is rotated is not known: make products by Product.emit")
    return operand.spec, operand.rotation
