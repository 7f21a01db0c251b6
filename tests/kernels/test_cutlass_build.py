"""Building and caching CUTLASS kernels, with an nvcc that only pretends."""

import ast
import multiprocessing
import os
import re
import stat
import threading
from contextlib import nullcontext

import pytest
import torch
from cutlass_tools import compiled, fake_toolchain

from quartet.kernels import build_cache
from quartet.kernels.build_cache import BuildError, entries, fingerprint, intact
from quartet.kernels.cutlass import build as building
from quartet.kernels.cutlass import memory, toolchain
from quartet.kernels.cutlass.build import Build, build, build_all, is_built, resources, target, unready
from quartet.kernels.cutlass.configuration import Configuration, table
from quartet.kernels.cutlass.library import Library, load
from quartet.kernels.cutlass.template import render
from quartet.kernels.spec import QuantSpec
from quartet.lowering import registry
from quartet.options import Options
from quartet.runtime.devices import Target

KERNEL = Configuration("mxf4", "sm_100a", (128, 128, 256))
OTHERS = tuple(table(["sm_120a"], ["mxf4", "nvf4"]))
FAILS = Configuration("mxf4", "sm_100a", (128, 128, 256), output="fp16")  # the fake nvcc knows no fp16


@pytest.fixture
def log(tmp_path, monkeypatch):
    return fake_toolchain(tmp_path, monkeypatch)


def test_builds_once_and_notes_what_the_compiler_said(log):
    assert not is_built(KERNEL)
    first, second = build(KERNEL), build(KERNEL)
    assert first.fresh and not second.fresh and first.path == second.path and compiled(log) == 1 and is_built(KERNEL)
    assert (second.registers, second.spills, second.nvcc, second.cutlass) == (168, 0, "13.0.88", "4.2.0")
    assert first.path.parent == build_cache.cache_dir() and stat.S_IMODE(first.path.parent.stat().st_mode) == 0o700
    assert first.path.name.startswith(f"{KERNEL.name}-") and first.path.read_text() == render(KERNEL)
    (entry,) = entries()
    assert entry.intact and entry.path == first.path and entry.notes["configuration"] == KERNEL.name
    assert not list(first.path.parent.glob("build-*"))


def test_the_command_generates_one_code(log, tmp_path):
    (tmp_path / "cuda/bin/nvcc").write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo V13.0.88; exit 0; fi\n'
                                            f'echo "$@" >> {log}\nfor out; do :; done\n: > "$out"\n')
    build(Configuration("nvf4", "sm_103a", (128, 128, 768), schedule="1sm-ultra"))
    said = log.read_text()
    assert said.count("-gencode") == 1 and "arch=compute_103a,code=sm_103a" in said
    assert f"-I{tmp_path}/cutlass/include" in said


def test_source_flags_and_versions_are_in_the_name(tmp_path, monkeypatch):
    fake_toolchain(tmp_path, monkeypatch)
    names = {target(KERNEL, toolchain.toolchain()).name, target(OTHERS[0], toolchain.toolchain()).name}
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-DX"))
    names.add(target(KERNEL, toolchain.toolchain()).name)
    fake_toolchain(tmp_path / "b", monkeypatch, nvcc="13.1.2")
    names.add(target(KERNEL, toolchain.toolchain()).name)
    fake_toolchain(tmp_path / "c", monkeypatch, cutlass=(4, 3, 0))
    names.add(target(KERNEL, toolchain.toolchain()).name)
    monkeypatch.setattr(building, "render", lambda configuration: render(configuration) + "\n")
    names.add(target(KERNEL, toolchain.toolchain()).name)
    assert len(names) == 6


def test_fingerprint_knows_where_parts_end():
    assert len({fingerprint(b"ab", b"c"), fingerprint(b"a", b"bc"), fingerprint(b"abc"), fingerprint(b"abc", b"")}) == 4


@pytest.mark.parametrize("damage", ("truncate", "tamper", "no digest", "no object", "garbage digest", "empty digest"))
def test_damaged_object_is_built_again(log, damage):
    path = build(KERNEL).path
    whole, digest = path.read_bytes(), path.with_suffix(".sha256")
    if damage == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "tamper":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "no object":
        path.unlink()
    elif damage == "no digest":
        digest.unlink()
    else:
        digest.write_bytes(b"\xff\xfe" if damage == "garbage digest" else b"")
    assert not intact(path) and not is_built(KERNEL)
    again = build(KERNEL)
    assert again.fresh and again.path.read_bytes() == whole and intact(path) and compiled(log) == 2


def test_what_a_killed_build_left_is_removed(log):
    path = target(KERNEL, toolchain.toolchain())
    (path.parent / f"build-{path.stem}.killed").mkdir()
    assert build(KERNEL).fresh and not list(path.parent.glob("build-*"))


@pytest.mark.parametrize("notes", (b"", b"[]", b"\xff", b'{"registers": 7}'))
def test_lost_notes_do_not_matter(log, notes):
    path = build(KERNEL).path
    path.with_suffix(".json").write_bytes(notes)
    again = build(KERNEL)
    assert not again.fresh and again.registers == (7 if b"7" in notes else 0) and compiled(log) == 1


@pytest.mark.parametrize("mode", (0o770, 0o702, 0o777))
def test_folder_that_others_can_write_is_refused(log, tmp_path, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(BuildError, match=f"mode {mode:04o}.*chmod 700"):
        build(KERNEL)
    assert compiled(log) == 0


def test_folder_of_another_user_is_refused(log, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(BuildError, match="belongs to user .* set QUARTET_CACHE_DIR"):
        build(KERNEL)
    assert compiled(log) == 0


@pytest.mark.parametrize(("mode", "refused"), ((0o777, True), (0o702, True), (0o1777, False), (0o755, False)))
def test_a_parent_that_others_can_write_is_refused(tmp_path, mode, refused):
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(mode)
    if not refused:
        assert build_cache.private_folder(parent / "cache").is_dir()
        return
    with pytest.raises(BuildError, match=rf"/parent/cache lies in .*/parent, of mode {mode:04o}: .*`chmod go-w .*/p"):
        build_cache.private_folder(parent / "cache")
    (tmp_path / "link").symlink_to(parent / "cache")
    with pytest.raises(BuildError, match="/parent, of mode"):
        build_cache.private_folder(tmp_path / "link")


@pytest.mark.parametrize("own", (True, False))
def test_a_parent_that_a_group_can_write(tmp_path, monkeypatch, own):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent").chmod(0o775)
    group = (tmp_path / "parent").stat().st_gid
    monkeypatch.setattr(os, "getgid", lambda: group if own else group + 1)
    with nullcontext() if own else pytest.raises(BuildError, match="of mode 0775"):
        build_cache.private_folder(tmp_path / "parent" / "cache")


def test_failure_leaves_nothing_and_says_what_the_compiler_said(log):
    with pytest.raises(BuildError, match=r"(?s)status 2; quartet_mxf4_sm_100a_128x128x256_1x1_1sm_fp16 was not built; "
                                         r'options={"disable_kernels": \["cutlass"\]} of torch.compile takes .*'
                                         r"gemm.cu\(7\): error: no such kernel"):
        build(FAILS)
    folder = build_cache.cache_dir()
    assert not list(folder.glob("*.so")) and not list(folder.glob("build-*")) and not list(folder.glob("*.json"))


def in_a_process(queue):
    queue.put(build(KERNEL).fresh)


def test_processes_build_once(tmp_path, monkeypatch):
    log = fake_toolchain(tmp_path, monkeypatch, seconds=0.5)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=in_a_process, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    assert sorted(queue.get(timeout=600) for _ in children) == [False, False, True]
    for child in children:
        child.join(timeout=600)
        assert child.exitcode == 0
    assert compiled(log) == 1


def most_at_once(log):
    running = most = 0
    for line in log.read_text().splitlines():
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    assert running == 0
    return most


@pytest.mark.parametrize(("free", "most"), ((1e9, 1), (memory.COMPILE_BYTES * 2.5, 2)))
def test_no_more_at_once_than_memory_allows(tmp_path, monkeypatch, free, most):
    log = fake_toolchain(tmp_path, monkeypatch, seconds=0.3)
    compiler = tmp_path / "cuda/bin/nvcc"  # each goes on when as many as may have begun, or after 20 seconds
    compiler.write_text(compiler.read_text().replace(
        "sleep 0.3\n", f"sleep 0.3\nn=0; until [ $(grep -c begin {log}) -ge {most} ] || [ $n = 200 ]; do sleep 0.1; "
                       "n=$((n + 1)); done\n"))
    monkeypatch.setattr(memory, "available_bytes", lambda: int(free))
    monkeypatch.setattr(memory, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    outcomes = build_all(OTHERS, 4)
    assert [outcome.configuration for outcome in outcomes] == list(OTHERS) and compiled(log) == len(OTHERS)
    assert most_at_once(log) == most


def test_no_more_at_once_than_asked_for(tmp_path, monkeypatch):
    log = fake_toolchain(tmp_path, monkeypatch, seconds=0.1)
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 * memory.COMPILE_BYTES)
    build_all(OTHERS[:3], 1)
    assert most_at_once(log) == 1


def test_places_are_shared_by_processes(tmp_path, monkeypatch):
    fake_toolchain(tmp_path, monkeypatch)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()

    def hold():
        with memory.compile_slot():
            held.set()
            release.wait(30)

    child = context.Process(target=hold)
    child.start()
    assert held.wait(30)
    entered = threading.Event()

    def enter():
        with memory.compile_slot():
            entered.set()

    waiter = threading.Thread(target=enter)
    waiter.start()
    assert not entered.wait(0.3)
    release.set()
    assert entered.wait(30)
    waiter.join()
    child.join()


def test_memory_that_is_free():
    free = memory.available_bytes()
    assert free is None or 0 < free < 2**60
    assert memory.jobs_allowed() >= 1


def machine(root, cgroup, **files):
    """Fake ``proc`` and ``sys`` with 20 GiB free in the machine; files by their path, ``__`` for ``/``."""
    for name, text in {"proc__meminfo": "MemTotal: 1 kB\nMemAvailable: 20971520 kB\n", "proc__self__cgroup": cgroup,
                       **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return memory.available_bytes(root)


GIB = 2**30
V2, V1 = "sys__fs__cgroup", "sys__fs__cgroup__memory"


@pytest.mark.parametrize(("cgroup", "files", "gib"), [
    ("", {}, 20),
    ("0::/", {}, 20),
    ("0::/", {f"{V2}__memory.max": "max", f"{V2}__memory.current": 7 * GIB}, 20),
    ("0::/", {f"{V2}__memory.max": 8 * GIB, f"{V2}__memory.current": 3 * GIB}, 5),
    ("0::/", {f"{V2}__memory.max": 8 * GIB, f"{V2}__memory.current": 7 * GIB,
              f"{V2}__memory.stat": f"anon 5\ninactive_file {2 * GIB}"}, 3),
    ("0::/", {f"{V2}__memory.max": 2 * GIB, f"{V2}__memory.current": 3 * GIB}, 0),
    ("0::/", {f"{V2}__memory.max": 64 * GIB, f"{V2}__memory.current": GIB}, 20),
    ("0::/a/b", {f"{V2}__a__b__memory.max": "max", f"{V2}__a__b__memory.current": GIB,
                 f"{V2}__a__memory.max": 6 * GIB, f"{V2}__a__memory.current": 2 * GIB}, 4),
    ("0::/of/the/host", {f"{V2}__memory.max": 9 * GIB, f"{V2}__memory.current": GIB}, 8),
    ("5:cpu,memory:/x\n1:pids:/", {f"{V1}__x__memory.limit_in_bytes": 4 * GIB,
                                   f"{V1}__x__memory.usage_in_bytes": GIB}, 3),
    ("5:memory:/of/the/host", {f"{V1}__memory.limit_in_bytes": 4 * GIB, f"{V1}__memory.usage_in_bytes": 2 * GIB,
                               f"{V1}__memory.stat": f"total_inactive_file {GIB}"}, 3),
    ("5:memory:/", {f"{V1}__memory.limit_in_bytes": 2**63 - 4096, f"{V1}__memory.usage_in_bytes": GIB}, 20),
])
def test_a_container_has_less_memory_than_its_machine(tmp_path, cgroup, files, gib):
    assert machine(tmp_path, cgroup, **files) == gib * GIB


def test_without_proc_nothing_is_known(tmp_path):
    assert memory.available_bytes(tmp_path) is None


def test_one_failure_stops_no_other(log):
    seen = []
    outcomes = build_all([FAILS, KERNEL], 1, lambda configuration, outcome: seen.append((configuration, outcome)))
    assert isinstance(outcomes[0], BuildError) and isinstance(outcomes[1], Build) and outcomes[1].fresh
    assert seen == [(FAILS, None), (FAILS, outcomes[0]), (KERNEL, None), (KERNEL, outcomes[1])]


def test_clear_removes_what_is_not_being_built(log):
    paths = [build(configuration).path for configuration in (KERNEL, OTHERS[0])]
    sizes = [path.stat().st_size for path in paths]
    with build_cache.locked(paths[0]):
        assert build_cache.clear() == (1, sizes[1])
    assert [entry.path for entry in entries()] == [paths[0]]
    stray = paths[0].parent / f"build-{paths[0].stem}.abandoned"
    stray.mkdir()
    assert build_cache.clear() == (1, sizes[0])
    assert not list(paths[0].parent.iterdir())


def test_who_waits_for_a_lock_that_is_cleared_holds_the_new_one(log):
    path = target(KERNEL, toolchain.toolchain())
    waiting, inside, leave = threading.Event(), threading.Event(), threading.Event()

    def wait():
        waiting.set()
        with build_cache.locked(path):
            inside.set()
            leave.wait(30)

    waiter = threading.Thread(target=wait)
    with build_cache.locked(path):
        waiter.start()
        assert waiting.wait(30) and not inside.wait(0.3)
        path.with_suffix(".lock").unlink()  # as `clear` does while it holds the lock
    try:
        assert inside.wait(30)
        with pytest.raises(BlockingIOError), build_cache.locked(path, wait=False):
            pass
    finally:
        leave.set()
        waiter.join()


def test_what_ptxas_says():
    said = """ptxas info    : 11 bytes gmem
    128 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 8 barriers, 128 bytes cumulative stack size
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 23 registers"""
    assert resources(said) == {"registers": 168, "spills": 152}
    assert resources("") == {"registers": 0, "spills": 0}


def test_an_object_that_is_no_library(log):
    load.cache_clear()
    with pytest.raises(BuildError, match=f"cannot open the kernel {KERNEL.name}: .*quartet cache clear"):
        load(KERNEL)
    with pytest.raises(BuildError, match="cannot open the kernel"):
        Library(KERNEL, log.with_name("absent.so"))


def test_nvcc_is_looked_for_in_this_order(tmp_path, monkeypatch):
    fake_toolchain(tmp_path, monkeypatch)
    home = tmp_path / "cuda" / "bin" / "nvcc"
    for name in ("other", "path"):
        copy = tmp_path / name / "bin" / "nvcc"
        copy.parent.mkdir(parents=True)
        copy.write_bytes(home.read_bytes())
        copy.chmod(0o755)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    monkeypatch.setenv("PATH", f"{tmp_path}/path/bin:{os.environ['PATH']}")
    found = [toolchain.find_nvcc()]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    found.append(toolchain.find_nvcc())
    monkeypatch.delenv("CUDA_PATH")
    found.append(toolchain.find_nvcc())
    assert found == [home, tmp_path / "other/bin/nvcc", tmp_path / "path/bin/nvcc"]


def test_missing_nvcc(log, monkeypatch):
    monkeypatch.setattr(toolchain.os, "access", lambda path, mode: False)
    with pytest.raises(BuildError, match="nvcc is missing: install the CUDA toolkit 13.0 .*apt-get install cuda-nvcc"):
        build(KERNEL)
    assert "nvcc is missing" in toolchain.unavailable("sm_100a")


def without_nvcc(monkeypatch):
    monkeypatch.setattr(toolchain.os, "access", lambda path, mode: False)


def chosen(arch, text="e2m1/32 e8m0 quest nearest", dtype=torch.bfloat16):
    """The kernel that a device of this process would get, and why not CUTLASS's."""
    spec = QuantSpec.parse(text)
    kernel, reasons = registry.choose(Target("cuda", arch), dtype, ((spec, 32), (spec, 32)))
    return kernel.name, reasons.get("cutlass")


def test_objects_built_ahead_serve_where_no_compiler_is(log, monkeypatch):
    pytest.importorskip("triton", reason="its quantisers are asked for what they take")
    paths = {c: build(c).path for c in table(["sm_100a"], ["mxf4"])}
    without_nvcc(monkeypatch)
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    for configuration, path in paths.items():
        again = build(configuration)
        assert is_built(configuration) and (again.path, again.fresh, again.nvcc) == (path, False, "13.0.88")
    assert compiled(log) == 3 and chosen("sm_100") == ("cutlass", None)
    name, reason = chosen("sm_120")
    assert name == "dot-scaled" and "headers are missing" in reason and "the cache" not in reason.split(";")[1]
    assert chosen("sm_100", dtype=torch.float16)[0] == "dot-scaled"
    assert chosen("sm_100", "e2m1/16 e4m3 amax nearest")[0] == "scaled-mm"


def test_one_kernel_that_is_missing_is_named(log, monkeypatch):
    first, *others = table(["sm_100a"], ["mxf4"])
    for configuration in others:
        build(configuration)
    without_nvcc(monkeypatch)
    reason = unready("sm_100a", "mxf4", "bf16")
    assert reason.startswith("nvcc is missing") and f"has others, but not {first.name}, which" in reason
    assert "`quartet build --arch sm_100a --kinds mxf4` makes" in reason and not is_built(first)
    with pytest.raises(BuildError, match=rf"{first.name} is not in the cache .*/cache, where `quartet build --arch "
                                         r"sm_100a --kinds mxf4` puts it, and cannot be compiled here: nvcc is"):
        build(first)
    with pytest.raises(BuildError, match="--kinds mxf4 --output fp32 --bias --accumulate` puts it"):
        build(Configuration("mxf4", "sm_100a", (128, 128, 256), output="fp32", bias=True, accumulate=True))


def test_an_object_that_came_later_is_noticed(log, monkeypatch, tmp_path):
    kernels = list(table(["sm_120a"], ["mxf8"]))
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("QUARTET_CACHE_DIR", str(tmp_path / "elsewhere"))
        for configuration in kernels:
            build(configuration)
    without_nvcc(monkeypatch)
    assert unready("sm_120a", "mxf8", "bf16").startswith("nvcc is missing")
    for path in (tmp_path / "elsewhere").iterdir():
        path.rename(build_cache.cache_dir() / path.name)
    assert unready("sm_120a", "mxf8", "bf16") is None and is_built(kernels[0])


@pytest.mark.parametrize("damage", ("truncate", "no digest", "no notes", "another source", "another's folder"))
def test_what_is_taken_without_a_compiler_is_checked(log, monkeypatch, tmp_path, damage):
    path = build(KERNEL).path
    without_nvcc(monkeypatch)
    assert is_built(KERNEL)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no digest":
        path.with_suffix(".sha256").unlink()
    elif damage == "no notes":
        path.with_suffix(".json").unlink()
    elif damage == "another source":
        monkeypatch.setattr(building, "render", lambda configuration: render(configuration) + "\n")
    else:
        (tmp_path / "cache").chmod(0o777)
    with pytest.raises(BuildError):
        build(KERNEL)
    assert not is_built(KERNEL) if damage != "another's folder" else "chmod 700" in unready("sm_100a", "mxf4", "bf16")


def test_an_nvcc_that_is_too_old_is_as_good_as_none(tmp_path, monkeypatch):
    fake_toolchain(tmp_path, monkeypatch)
    path = build(KERNEL).path
    fake_toolchain(tmp_path, monkeypatch, nvcc="12.6.20")
    assert build(KERNEL).path == path and is_built(KERNEL)


def test_the_remedy_is_an_option(log, monkeypatch):
    without_nvcc(monkeypatch)
    with pytest.raises(BuildError) as caught:
        build(KERNEL)
    said = re.search(r"options=(\{.*?\})", str(caught.value))[1]
    assert Options.parse(None, ast.literal_eval(said), kernels=registry.NAMES).disable_kernels == ("cutlass",)


def test_a_compilation_at_first_use_is_announced(log, caplog):
    load.cache_clear()
    for times in (1, 1):  # the second finds the object, which is no library either
        with pytest.raises(BuildError, match="cannot open"):
            load(KERNEL)
        warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(warned) == times
    assert f"compiling {KERNEL.name} with nvcc" in warned[0]
    assert "`quartet build --arch sm_100a --kinds mxf4` does it ahead of time" in warned[0]
    caplog.clear()
    build(OTHERS[0])
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_missing_headers(log, monkeypatch):
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="headers are missing: run `pip install nvidia-cutlass`"):
        build(KERNEL)
    monkeypatch.setenv("CUTLASS_PATH", "/nowhere")
    with pytest.raises(BuildError, match="CUTLASS_PATH=/nowhere has no include/cutlass/version.h"):
        build(KERNEL)


@pytest.mark.parametrize(("versions", "arch", "message"), [
    ({"cutlass": (4, 1, 0)}, "sm_100a", r"headers in .* are version 4.1.0; 4.2 or newer are needed: run `pip install"),
    ({"nvcc": "12.6.20"}, "sm_100a", "nvcc is version 12.6.20; sm_100a needs 12.8 or newer: install the CUDA toolkit"),
    ({"nvcc": "12.8.61"}, "sm_103a", "nvcc is version 12.8.61; sm_103a needs 12.9 or newer"),
    ({"nvcc": "12.8.61"}, "sm_100a", None),
    ({"nvcc": "nonsense"}, "sm_100a", "names no version but 'Cuda compilation tools"),
])
def test_versions_that_are_not_enough(tmp_path, monkeypatch, versions, arch, message):
    fake_toolchain(tmp_path, monkeypatch, **versions)
    said = toolchain.unavailable(arch)
    assert said is None if message is None else re.search(message, said), said


def test_a_new_nvcc_is_noticed(tmp_path, monkeypatch):
    fake_toolchain(tmp_path, monkeypatch)
    assert toolchain.toolchain().nvcc_version == "13.0.88"
    fake_toolchain(tmp_path, monkeypatch, nvcc="13.2.1")
    assert toolchain.toolchain().nvcc_version == "13.2.1"
