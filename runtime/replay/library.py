"""The C++ library that repeats ops without Python: built once a machine, loaded when a GPU first runs one of them."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quartet.kernels import launcher
from quartet.kernels.build_cache import BuildError, build_once, fingerprint, intact, run_compiler, target_of
from quartet.kernels.cpu.build import compiler
from quartet.runtime.compat import call_through, function_of
from quartet.runtime.replay.recorder import NotReplayable, Recorder, tensors_of

log = logging.getLogger("quartet")

VARIABLE = "QUARTET_LAUNCHER"
_FOLDER = Path(__file__).parent
_DIRECT = "direct_call.cpp"  # which needs Python's headers
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-Wno-psabi")
_REMEDY = "install g++ 10 or newer (Debian: apt-get install g++), or point CXX at one"
_PYTHON = "quartet_python"  # the namespace of what C++ calls where it has no plan

Run = Callable[..., Any]


@dataclass(frozen=True)
class Counts:
    """Of an op: calls that C++ repeated and that Python ran, signatures with a plan and without one, and how often all
    were forgotten for being too many."""

    replays: int = 0
    runs: int = 0
    plans: int = 0
    unplanned: int = 0
    forgotten: int = 0


@dataclass
class _Offer:
    """An op as C++ may come before it."""

    name: str
    overload: str
    run: Run
    device: str
    owner: int

    @property
    def called(self) -> str:
        return f"{self.name}.{self.overload}" if self.overload else self.name

    def overload_of(self) -> Any:
        return getattr(getattr(torch.ops.quartet, self.name), self.overload or "default")


class _Aside(threading.Thread):
    """A call on a thread of its own, for which the process does not wait when it ends: what a pool's threads run, it
    waits for, whoever started them."""

    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._call = call
        self._found: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._call()
        except (BuildError, OSError, RuntimeError) as error:
            self._found = error

    def result(self) -> Any:
        """What the call has returned. Raises what it has raised."""
        self.join()
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found or self._call()  # a forked process has no thread that was begun before


@dataclass
class Launcher:
    """The library and the ops that are offered to it.

    Attributes:
        missing: why there is none; None where there is one, or nothing has asked for it.
    """

    missing: str | None = None
    _offers: dict[str, _Offer] = field(default_factory=dict)
    _defined: set[str] = field(default_factory=set)
    _ops: Any = None
    _claim: Callable[[], int] = int
    _direct: Callable[[bytes, Any], Any] | None = None
    _guard: threading.RLock = field(default_factory=threading.RLock)
    _building: _Aside | None = None
    _postponed: bool = False
    _python: torch.library.Library = field(default_factory=lambda: torch.library.Library(_PYTHON, "FRAGMENT"))

    def offer(self, called: str, schema: str, run: Run, device: str = "cuda", owner: int = -1) -> Run:
        """What to register as an op's implementation for the devices that have no kernel of their own.

        Args:
            called: ``cuda_fold`` or ``cuda_fold.triton``, of the namespace ``quartet``. schema: behind that name.
            run: the implementation in Python. What it returns and launches depends on nothing but its arguments'
                values and, of tensors, their dtypes, devices, sizes, strides, and alignment to 16 bytes.
            device: type of the device whose calls C++ takes.
            owner: position of a tensor for which Python may keep the results, and :meth:`permit` C++ to make them
                anew; −1 for none.
        """
        name, _, overload = called.partition(".")
        self._offers[called] = offer = _Offer(name, overload, run, device, owner)
        if called not in self._defined:
            self._defined.add(called)
            self._python.define(called + schema)
            self._python.impl(called, self._recorded(called), "CompositeExplicitAutograd")
        if self._ops is not None:
            self._attach(offer)

        def first(*args: Any) -> Any:
            wanted = self._ops is None and self.missing is None and not (self._postponed or self.building)
            if wanted and any(x.is_cuda for x in tensors_of(args)):
                self.start()
            return run(*args)

        return first

    def withdraw(self, called: str) -> None:
        """Python alone runs an op again, if it was offered."""
        offer = self._offers.pop(called, None)
        if offer is not None and self._ops is not None:
            function = function_of(offer.overload_of())
            call_through(offer.overload_of(), getattr(function, "usual", function))
            self._ops.detach(called)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Nothing is built or waited for meanwhile: where no library is loaded, Python launches."""
        before, self._postponed = self._postponed, True
        try:
            yield
        finally:
            self._postponed = before

    @property
    def building(self) -> bool:
        """Whether the library is built just now, on a thread of its own: Python launches meanwhile."""
        return self._building is not None and self._building.is_alive()

    def prepare(self) -> None:
        """Begin to build the library where it has not been, while the caller goes on; :meth:`start` waits for it."""
        with self._guard:
            if self._ops is None and self.missing is None and self._building is None:
                self._building = _Aside("quartet-launcher", library)

    def start(self) -> None:
        """Build the library where it has not been, load it, and put it before the ops offered so far."""
        with self._guard:
            if self._ops is not None or self.missing is not None:
                return
            try:
                self.load(library() if self._building is None else self._building.result(), launcher.DRIVER)
            except (BuildError, OSError, RuntimeError) as error:
                self.missing = str(error)
                log.warning("kernels are launched from Python, which takes some 90 µs each: %s", self.missing)
                return
            for offer in self._offers.values():
                self._attach(offer)

    def load(self, path: Path, driver: str) -> None:
        """Raises OSError and RuntimeError: the library or the driver does not load."""
        torch.ops.load_library(str(path))
        ops = torch.ops.quartet_replay
        ops.open_driver(driver)
        loaded = ctypes.PyDLL(str(path))
        self._claim = loaded.quartet_claim_recording
        direct = getattr(loaded, "quartet_direct_call", None)
        if direct is not None:
            direct.argtypes, direct.restype = (ctypes.c_char_p, ctypes.py_object), ctypes.py_object
            self._direct = direct
        self._ops = ops

    def repeated(self) -> bool:
        """Of the call that runs on this thread: whether its owner is as it was when C++ last served it."""
        return self._ops is not None and bool(self._ops.repeated())

    def permit(self, every: bool) -> None:
        """C++ may serve the like of the call that runs on this thread: every one, or the first after each time that its
        owner is written to or an optimizer steps.

        Owners are told apart by address. One that is allocated where another has died is served what is made of its own
        numbers, but Python is not asked, so that nothing is kept of it before permits are forgotten."""
        if self._ops is not None:
            self._ops.permit(every)

    def stepped(self) -> None:
        """An optimizer has stepped: owners may have been written to, whatever their version counters say."""
        if self._ops is not None:
            self._ops.stepped()

    def forbid(self) -> None:
        """C++ is not to serve the like of the call that runs on this thread."""
        if self._ops is not None:
            self._ops.forbid()

    def forbid_all(self) -> None:
        """What was permitted is asked for again."""
        if self._ops is not None:
            self._ops.forbid_all()

    def counts(self, called: str) -> Counts:
        return Counts(*self._ops.counts(called)) if self._ops is not None else Counts()

    def status(self) -> str:
        """How kernels are launched in this process, or would be, for a person; builds and loads nothing."""
        if self._ops is not None:
            return "C++, loaded"
        try:
            reason = self.missing or refusal()
            return reason or ("C++, built" if intact(target()) else "C++, built when a GPU first runs an op")
        except BuildError as error:
            return f"Python: {error}"

    def _attach(self, offer: _Offer) -> None:
        self._ops.attach(offer.name, offer.overload, offer.device.upper(), offer.owner)
        if self._direct is not None:
            called = offer.overload_of()
            usual = function_of(called)
            usual = getattr(usual, "usual", usual)
            call_through(called, self._direct(offer.called.encode(), usual))

    def _recorded(self, called: str) -> Run:
        """The op in Python, recorded where C++ asks for it."""

        def run(*args: Any) -> Any:
            offer = self._offers[called]
            if not self._claim():
                return offer.run(*args)
            recorder = Recorder(args)
            with recorder, launcher.recorded_by(recorder):
                results = offer.run(*args)
            try:
                self._ops.commit(*recorder.plan(results, self._ops.number))
            except NotReplayable as reason:
                log.debug("%s stays in Python for such arguments: %s", called, reason)
                self._ops.refuse()
            return results

        return run


def refusal() -> str | None:
    """Why the user wants no library; None where they have not said so."""
    said = os.environ.get(VARIABLE, "")
    if said not in ("", "c++", "python"):
        raise BuildError(f"{VARIABLE}={said!r} is unknown; possible are 'c++' and 'python'")
    return f"Python: {VARIABLE}=python" if said == "python" else None


def library() -> Path:
    """Path of the compiled library, built if need be. Raises BuildError: it cannot be, or the user wants none."""
    reason = refusal()
    if reason is not None:
        raise BuildError(reason)
    path, command = target(), compiler()
    if not intact(path):
        log.warning("compiling the launcher of kernels with %s: up to a minute, this once", shlex.join(command))
    before = time.monotonic()
    if build_once(path, lambda made: _compile(command, made)):
        log.info("the launcher of kernels: built in %.0f s", time.monotonic() - before)
    return path


def target() -> Path:
    """Where it lies, built or not. Raises BuildError: no compiler."""
    command = compiler()
    version, _ = run_compiler([*command, "--version"], "C++ compiler", _REMEDY)
    about = (*_FLAGS, *command, version, torch.__version__, str(torch.version.git_version),
             str(_python_headers()), sys.version)
    sources = (path.read_bytes() for path in sorted(_FOLDER.glob("*.cpp")) + sorted(_FOLDER.glob("*.h")))
    return target_of(f"quartet_launcher-{fingerprint(*sources, *(part.encode() for part in about))}")


def _python_headers() -> Path | None:
    """The folder of Python.h, if it is installed; without it ops are called through PyTorch's dispatcher alone."""
    folder = Path(sysconfig.get_paths()["include"])
    return folder if (folder / "Python.h").is_file() else None


def _compile(command: list[str], path: Path) -> None:
    """Each source by a compiler of its own, at the same time: both read most of PyTorch's headers."""
    root, python = Path(torch.__file__).parent, _python_headers()
    sources = [_FOLDER / "replay.cpp", *([_FOLDER / _DIRECT] if python else [])]
    folders = [root / "include", root / "include/torch/csrc/api/include", *([python] if python else [])]
    libraries = ["-ltorch_cpu", "-lc10", "-ldl", *(["-ltorch_python"] if python else [])]

    def compiled(source: Path) -> str:
        made = str(path.with_name(f"{source.stem}.o"))
        run_compiler([*command, *_FLAGS, "-c", *(f"-I{folder}" for folder in folders), str(source), "-o", made],
                     "C++ compiler", _REMEDY)
        return made

    threads = [_Aside(f"quartet-{source.stem}", partial(compiled, source)) for source in sources]
    for thread in threads:  # none writes any more when one has failed
        thread.join()
    objects = [thread.result() for thread in threads]
    run_compiler([*command, *_FLAGS, "-shared", *objects, "-o", str(path), f"-L{root / 'lib'}", *libraries],
                 "C++ compiler", _REMEDY)


LAUNCHER = Launcher()
