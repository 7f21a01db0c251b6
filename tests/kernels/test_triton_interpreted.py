"""The Triton kernels' arithmetic on a CPU, bit for bit against the reference: one process interprets all the cases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import interpret

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from triton_cases import CASES  # noqa: E402

SCRIPT = Path(__file__).with_name("triton_cases.py")


@pytest.fixture(scope="session")
def results() -> dict[str, dict]:
    """What the script says of each case."""
    return interpret(SCRIPT)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, results):
    if results[name]["skipped"]:
        pytest.skip(results[name]["skipped"])
    assert not results[name]["differences"], "\n".join(results[name]["differences"])


def test_without_the_interpreter_the_script_says_what_it_needs():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1" in done.stderr
