"""How many compilations this machine's memory allows at once, over all of a user's processes."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quartet.kernels.build_cache import open_lock, private_folder

COMPILE_BYTES = 6_000_000_000  # the most that one kernel's compilation was seen to take is 5.6e9
_POLL_SECONDS = 0.5


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that new processes can take without swapping: of the machine or, if less, of the control group that this
    process is in, or of one that holds it; None where neither is known. ``root`` holds ``proc`` and ``sys``."""
    bounds = [_machine_bytes(root), *map(_group_bytes, _groups(root))]
    return min((bound for bound in bounds if bound is not None), default=None)


def _machine_bytes(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the memory control groups of this process, of versions 2 and 1, each with those around it.

    In a container the kernel may name a group as the host sees it: where that is no folder here, the mount is it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in filter(None, lines):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mount / path.lstrip("/")
        group = group if group.is_dir() else mount
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(mount))


def _group_bytes(group: Path) -> int | None:
    """What a control group may still take, its file cache given back; None where it has no bound."""
    for limit, used, cache in (("memory.max", "memory.current", "inactive_file"),
                               ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
        try:
            free = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
        return max(0, free + _statistic(group, cache))
    return None


def _statistic(group: Path, name: str) -> int:
    try:
        found = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
        return int(found.get(name, 0))
    except (OSError, ValueError):
        return 0


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
            slots = (folder / f"slot-{i}" for i in range(os.cpu_count() or 1))
            handles = [held.enter_context(open_lock(slot, "TMPDIR")) for slot in slots]
            gate = held.enter_context(open_lock(folder / "gate", "TMPDIR"))
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
