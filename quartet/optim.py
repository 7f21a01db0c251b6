"""Optimizers whose states take a byte: drop-in for ``torch.optim``, FP8 and 8-bit, fused, on GPU and CPU.

    optimizer = quartet.optim.AdamW(model.parameters(), lr=3e-4)                      # m in E4M3, v in E5M2
    optimizer = quartet.optim.AdamW(model.parameters(), state_format="e4m3/256")      # blocks of 256
    optimizer = quartet.optim.AdamW(model.bfloat16().parameters(), stochastic_rounding=True)
    optimizer = quartet.optim.Lion(model.parameters(), state_format="dynamic")

Around any optimizer of ``torch.optim``, for weights that are trained in FP4:

    optimizer = quartet.optim.QRamping(torch.optim.AdamW(model.parameters()), model)  # oscillating weights step rarely

``docs/optimizers.md`` has the formats, their arithmetic and their speed.
"""

from quartet.kernels.reference.optim.state_format import COAT, DYNAMIC, E4M3_BLOCKS, E4M3_E5M2, FP32, StateFormat
from quartet.runtime.optim import SGD, Adam, AdamW, Lion, LowBitOptimizer, QRamping

__all__ = ["COAT", "DYNAMIC", "E4M3_BLOCKS", "E4M3_E5M2", "FP32", "SGD", "Adam", "AdamW", "Lion", "LowBitOptimizer",
           "QRamping", "StateFormat"]
