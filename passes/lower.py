"""Hand every quantised GEMM to the kernel that was planned for it; what none takes keeps its semantic ops.

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
from quartet.lowering.ir.op import REFERENCE, Op
from quartet.lowering.ir.operands import SCALED, Operand, Product
from quartet.lowering.ir.ops.fused import unrotate
from quartet.lowering.targets import byte_quantizers
from quartet.lowering.targets.epilogues import lower_sums
from quartet.passes.compilation import Compilation
from quartet.passes.graph_pass import graph_pass
from quartet.passes.sites import SITE_KEY, Quantized
from quartet.passes.state import State


class Undecided(AssertionError):
    """A product of the graph is not what its kernel was planned for."""


@graph_pass(reads=Quantized, writes=Quantized, optional=True,
            summary="each product and the chain around it → the kernel that was planned for it")
def lower(state: State) -> None:
    """Hand each kernel family its share of the graph, device by device, and then do what options change about it.

    Raises Undecided where the planned kernel cannot compute what stands in the graph, which is a bug of ours.
    """
    planned = {site.index: site for site in state.at(Quantized)}
    chosen: dict[tuple[registry.Kernel, torch.device], list[Node]] = {}
    for node in state.gm.graph.nodes:
        if node.target not in SCALED:
            continue
        device, (index, role) = val(node).device, node.meta[SITE_KEY]
        kernel = planned[index].decisions[role].kernel
        if kernel is None:
            continue
        product = Product.of(node)
        operands = _chain(product.a), _chain(product.b)
        why = kernel.refuses(state.config.target_of(device), val(node).dtype, operands, node.target)
        if why is not None:
            raise Undecided(f"kernel {kernel.name!r} was planned for {node.format_node()} and does not take it: {why}")
        planned[index] = planned[index].computed(role, kernel.name)
        chosen.setdefault((kernel, device), []).append(node)
    state.advance(*planned.values())
    for (kernel, device), nodes in chosen.items():
        if kernel.lower is not None:
            with editing(state.gm) as graph:
                kernel.lower(graph, nodes, partial(kernel.takes, state.config.target_of(device)))
    lower_sums(state.gm, partial(_computes, state.config, unrotate))
    for option, value, rewrite in dict.fromkeys(variant for kernel, _ in chosen for variant in kernel.variants):
        if getattr(state.config, option) == value:
            rewrite(state.gm.graph)
    with editing(state.gm) as graph:
        byte_quantizers.take(graph, partial(_computes, state.config))
    providers.settle(state.gm.graph, state.config.target_of, state.config.disable_kernels,
                     state.config.portable_rounding)


def _computes(config: Compilation, op: Op, device: torch.device) -> bool:
    """Whether a kernel computes an op on a device."""
    provider, _ = op.choose(config.target_of(device), config.disable_kernels)
    return provider is not None and provider.name != REFERENCE


def _chain(operand: Operand) -> tuple[QuantSpec, int]:
    """(quantiser, Hadamard size before it) of an operand.

    Raises:
        ValueError: neither the product nor the graph tells the latter.
    """
    if operand.rotation is None:
        raise ValueError(f"how {operand.codes.format_node()} is rotated is not known: make products by Product.emit")
    return operand.spec, operand.rotation
