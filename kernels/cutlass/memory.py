"""How many compilations this machine's memory allows at once, over all of a user's processes."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quartet.kernels.build_cache import private_folder

COMPILE_BYTES = 6_000_000_000  # the most that one kernel's compilation was seen to take is 5.6e9
_POLL_SECONDS = 0.5


def available_bytes() -> int | None:
    """Memory that new processes can take without swapping, from /proc/meminfo; None where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def jobs_allowed() -> int:
    """Compilations that fit into the memory that is free now, at least 1."""
    free = available_bytes()
    return 1 if free is None else max(1, free // COMPILE_BYTES)


@contextmanager
def compile_slot() -> Iterator[None]:
    """Wait until one compilation more fits into memory, and hold its place.

    The places are locked files in a private folder that all processes of this user share. Compilations that run already
    are counted at their full size, whatever part of it they hold by now: this errs on the safe side. One may always
    run, however little memory there is.
    """
    folder = private_folder(Path(tempfile.gettempdir()) / f"quartet-compile-{os.getuid()}", "folder of locks", "TMPDIR")
    while True:
        with ExitStack() as held:
            handles = [held.enter_context(open(folder / f"slot-{i}", "w")) for i in range(os.cpu_count() or 1)]
            gate = held.enter_context(open(folder / "gate", "w"))
            fcntl.flock(gate, fcntl.LOCK_EX)
            free = [handle for handle in handles if _try_lock(handle.fileno())]
            taken = len(handles) - len(free)
            if free and (taken == 0 or taken < jobs_allowed()):
                for handle in free[1:]:
                    fcntl.flock(handle, fcntl.LOCK_UN)
                fcntl.flock(gate, fcntl.LOCK_UN)
                yield
                return
        time.sleep(_POLL_SECONDS)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
