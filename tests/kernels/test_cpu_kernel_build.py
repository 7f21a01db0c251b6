"""Compiling and caching the CPU kernels."""

import os
import shutil
import stat
import subprocess
import sys
import warnings

import pytest

from quartet.kernels.build_cache import intact
from quartet.kernels.cpu import build, ops

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """Something that compiles at once: the cache does not care what it keeps."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "SOURCE", source)
    return source


@pytest.fixture
def compilations(monkeypatch):
    seen = []
    compile_ = build._compile

    def counted(*args):
        seen.append(args)
        compile_(*args)

    monkeypatch.setattr(build, "_compile", counted)
    return seen


@needs_compiler
def test_builds_once_in_a_private_folder(cache, small_source, compilations):
    first, second = build.library(), build.library()
    assert first == second and first.parent == cache and len(compilations) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not list(cache.glob("build-*"))


@needs_compiler
def test_source_flags_compiler_and_processor_are_in_the_name(cache, small_source, monkeypatch):
    names = {build.library().name}
    small_source.write_text(small_source.read_text() + "\n")
    names.add(build.library().name)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DX"))
    names.add(build.library().name)
    monkeypatch.setenv("CXX", "g++ -DY")
    names.add(build.library().name)
    monkeypatch.setattr(build, "_processor", lambda: "another")
    names.add(build.library().name)
    assert len(names) == 5


@needs_compiler
@pytest.mark.parametrize("damage", ("truncate", "tamper", "no digest", "no object", "garbage digest"))
def test_damaged_object_is_built_again(cache, small_source, compilations, damage):
    path = build.library()
    whole = path.read_bytes()
    digest = path.with_suffix(".sha256")
    if damage == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "tamper":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "no digest":
        digest.unlink()
    elif damage == "no object":
        path.unlink()
    else:
        digest.write_bytes(b"\xff\xfe")
    assert build.library() == path and len(compilations) == 2
    assert intact(path)


@needs_compiler
def test_two_processes_build_once(cache, small_source, tmp_path):
    log, wrapper = tmp_path / "log", tmp_path / "slow-g++"
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {{ echo run >> {log}; sleep 0.5; }}\nexec g++ "$@"\n')
    wrapper.chmod(0o755)
    code = f"""if True:
        import importlib.util, pathlib
        spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        build.SOURCE = pathlib.Path({str(small_source)!r})
        print(build.library())"""
    environment = {**os.environ, "CXX": str(wrapper)}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
                for _ in range(2)]
    paths = {child.communicate(timeout=600)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(paths) == 1 and log.read_text().splitlines() == ["run"]


@pytest.mark.parametrize("mode", (0o770, 0o702, 0o777))
def test_folder_that_others_can_write_is_refused(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(build.BuildError, match=f"mode {mode:04o}.*chmod 700"):
        build.cache_dir()


def test_folder_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(build.BuildError, match="belongs to user .* set QUARTET_CACHE_DIR"):
        build.cache_dir()


def test_folder_that_cannot_be_made_is_refused(cache, monkeypatch):
    cache.write_text("a file is in the way")
    with pytest.raises(build.BuildError, match="cannot create the kernel cache folder"):
        build.cache_dir()


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("QUARTET_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert build.cache_dir() == tmp_path / "x" / "quartet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / ".cache" / "quartet"


def test_missing_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="cannot run the C\\+\\+ compiler `no-such-compiler`.*install g\\+\\+"):
        build.library()


@needs_compiler
def test_failing_compiler_shows_its_words(cache, small_source):
    small_source.write_text("int broken(\n")
    with pytest.raises(build.BuildError, match="(?s)failed with status 1.*install g\\+\\+.*error:"):
        build.library()
    assert not list(cache.glob("*.so")) and not list(cache.glob("build-*"))


def test_unavailable_warns_once_with_the_reason(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    ops.unavailable.cache_clear()
    ops._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-such-compiler"):
            reason = ops.unavailable()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ops.unavailable() == reason and "no-such-compiler" in reason
    finally:
        ops.unavailable.cache_clear()
        ops._kernels.cache_clear()
