"""Where CUTLASS is required, as in continuous integration, what cannot compile fails and is not skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE = f"{ROOT}/tests/kernels/test_cutlass_host.py::test_the_offset_formula"


@pytest.mark.parametrize(("required", "status", "said"), [
    ("0", 0, "1 skipped"), ("1", 1, "CUTLASS_PATH=/nowhere has no include/cutlass/version.h")])
def test_missing_headers_fail_where_they_are_required(required, status, said):
    environment = {**os.environ, "CUTLASS_PATH": "/nowhere", "QUARTET_REQUIRE_CUTLASS": required}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ONE], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and said in done.stdout, done.stdout


def test_continuous_integration_requires_them():
    run = ROOT / ".ci" / "run"
    if not run.exists():
        pytest.skip("the checkout has no .ci/run")
    done = subprocess.run(["bash", "-c", f"make() {{ test \"$QUARTET_REQUIRE_CUTLASS\" = 1; }}; export -f make; {run}"])
    assert done.returncode == 0
