"""For all tests: what has to be in place before a test imports anything."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("shared")))

from torchvision_here import complete  # noqa: E402

complete()
