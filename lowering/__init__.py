"""The quantised IR, its kernels, and how Inductor inlines what no kernel takes."""

from quartet.lowering import cpu_ops, ir  # noqa: F401  defines torch.ops.quartet.*
