"""A benchmark's process of its own, with empty compile caches: it answers lines with lines of JSON."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "QUARTET_CACHE_DIR")


class WorkerError(RuntimeError):
    """The process ended or did not answer in time; the message ends with the last that it wrote."""


class Worker:
    """Start ``command`` and talk to it; what it prints besides JSON goes into the message of an error.

    Args:
        command: a program that prints a line of JSON when it is ready and one for each line it reads.
        environment: variables beside this process's own and the cache folders.
        patience: seconds to wait for an answer.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], patience: float) -> None:
        self.patience = patience
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        caches = {name: str(Path(self.folder.name, name)) for name in CACHES}
        self.log = Path(self.folder.name, "log")
        self.pending = b""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **caches, **environment}, stderr=log,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer. Raises WorkerError."""
        try:
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says how it ended
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON. Raises WorkerError."""
        end = time.monotonic() + self.patience
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                line, newline, rest = self.pending.partition(b"\n")
                if newline:
                    self.pending = rest
                    if line.startswith(b"{"):
                        return json.loads(line)
                    continue
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise WorkerError(f"no answer in {self.patience:.0f} s; {self.last_words()}")
                if not (data := os.read(self.process.stdout.fileno(), 1 << 16)):
                    raise WorkerError(f"ended with status {self.process.wait()}; {self.last_words()}")
                self.pending += data

    def last_words(self) -> str:
        """The last lines of the process's errors, most of all the exception."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "Failed"))]
        return (raised[-1] if raised else " / ".join(lines[-3:]))[:600]

    def end(self) -> None:
        """Close its input, or kill it and what it started, and drop its caches."""
        try:
            self.process.stdin.close()
            self.process.wait(20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()
