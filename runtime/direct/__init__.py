"""Training on quantised weights alone; the front door is ``quartet.direct``."""

from quartet.runtime.direct.bitnet import BitLinear, bitnet
from quartet.runtime.direct.convert import SKIPPED, broadcast, convert, weight_bytes, weights
from quartet.runtime.direct.export import export, load, read, ternarize
from quartet.runtime.direct.optimizer import Optimizer
from quartet.runtime.direct.weight import LowBitWeight

__all__ = ["SKIPPED", "BitLinear", "LowBitWeight", "Optimizer", "bitnet", "broadcast", "convert", "export", "load",
           "read", "ternarize", "weight_bytes", "weights"]
