"""What the ranks of a data-parallel group exchange of quantised weights; the front door is ``quartet.distributed``."""

from quartet.runtime.distributed.extension import Packed, Refresh
from quartet.runtime.distributed.maxima import Maxima, Scale
from quartet.runtime.distributed.sharded import Sharded, sharded
from quartet.runtime.distributed.steps import STEPS
from quartet.runtime.distributed.weight import GatheredWeight, Packing

__all__ = ["STEPS", "GatheredWeight", "Maxima", "Packed", "Packing", "Refresh", "Scale", "Sharded",
           "sharded"]
