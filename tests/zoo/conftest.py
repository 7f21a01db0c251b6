"""The architectures are a module beside the test."""

import logging
import sys
from pathlib import Path

logging.getLogger("torch.__trace").propagate = False  # pytest would format and keep every line
sys.path.insert(0, str(Path(__file__).parent))
