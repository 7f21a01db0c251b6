"""``python -m quartet``."""

import sys

from quartet.cli.main import main

sys.exit(main())
