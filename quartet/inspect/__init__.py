"""See the numbers of a training run: statistics, what-if, the first value that is not finite. ``docs/inspect.md``."""

from quartet.inspect.inspector import Inspector, default
from quartet.inspect.records import Record
from quartet.inspect.statistics import Spike, Statistics
from quartet.runtime.inspect.recorder import NotFinite
from quartet.runtime.inspect.recorder import raise_if_not_finite as finite

__all__ = ["Inspector", "NotFinite", "Record", "Spike", "Statistics", "default", "finite"]
