"""Run a script of cases in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def interpret(script: Path) -> dict[str, dict[str, Any]]:
    """Case → the line of JSON that the script prints of it."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script.name} ended with status {done.returncode}\n{done.stderr}"
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def differences(script: Path) -> dict[str, list[str]]:
    """Case → how it differs from the reference, for a script that prints this as ``differences``."""
    return {case: line["differences"] for case, line in interpret(script).items()}
