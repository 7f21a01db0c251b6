"""The quantised IR, its kernels, and how Inductor inlines what no kernel takes."""

from quartet.lowering import ir  # noqa: F401  defines torch.ops.quartet.*
from quartet.lowering.targets.cpu import ops  # noqa: F401  and those that run on a CPU
