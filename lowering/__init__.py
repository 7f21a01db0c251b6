"""The quantised IR, its kernels, and how Inductor inlines what no kernel takes.

``import quartet.lowering`` defines all of ``torch.ops.quartet``, which is what a dumped graph calls.
"""

from quartet.lowering import ir  # noqa: F401
from quartet.lowering.ir.ops import (  # noqa: F401
    experts,
    fp8,
    fused,
    gathered,
    grouped,
    inspect,
    outliers,
    saved,
    state,
    weights,
)
from quartet.lowering.targets.blackwell import block_scaled_ops  # noqa: F401
from quartet.lowering.targets.blackwell import ops as blackwell_ops  # noqa: F401
from quartet.lowering.targets.cpu import ops as cpu_ops  # noqa: F401
from quartet.lowering.targets.int8 import ops as int8_ops  # noqa: F401
