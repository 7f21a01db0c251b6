"""The cache folder among other files and other users: what is removed, refused, followed and created."""

import errno
import os
import shutil

import pytest

from quartet.cli.main import main
from quartet.kernels import build_cache
from quartet.kernels.build_cache import BuildError
from quartet.kernels.cpu import build, ops, optimizer
from quartet.kernels.cutlass import memory
from quartet.kernels.cutlass.configuration import table
from quartet.kernels.cutlass.selection import PREFIX

HASH = "0123456789abcdef" * 2
OURS = [f"{name}-{HASH}.{suffix}" for name in ("quartet_cpu", "optimizer", "cutlass_tuned")
        for suffix in ("so", "sha256", "json", "lock")]
THEIRS = ["package.json", "poetry.lock", "mymodule.so", "mymodule.sha256", f"data-{HASH}.json", "quartet.json",
          "quartet_cpu.so", f"quartet_cpu-{HASH}.so.bak", f"quartet_cpu-{HASH[1:]}.so", f"my-quartet_cpu-{HASH}.so",
          f"quartet_cpu-{HASH.upper()}.so", f"optimizer-{HASH}.pt", f"build-{HASH}", "build-mymodule.output"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def full(cache):
    """A private folder with our files among others."""
    cache.mkdir(mode=0o700)
    for name in (*OURS, *THEIRS):
        (cache / name).write_text(name)
    scratch = cache / f"build-quartet_cpu-{HASH}.a1b2c3d4"
    scratch.mkdir()
    (scratch / "quartet_cpu.so").write_text("half of it")
    return cache


def test_clear_removes_our_files_and_no_other(full):
    folder = full / "build-other.output"
    folder.mkdir()
    (folder / "f").write_text("kept")
    sizes = sum(len(name) for name in OURS if name.endswith(".so"))
    assert build_cache.clear() == (3, sizes)
    assert sorted(path.name for path in full.iterdir()) == sorted([*THEIRS, folder.name])
    assert (folder / "f").read_text() == "kept"


def test_names_of_everything_that_is_built_are_known():
    names = [f"{path.stem}" for path in build.SOURCE.parent.glob("*.cpp")]
    names += [configuration.name for configuration in table()] + [PREFIX.removesuffix("-")]
    assert len(names) > 20 and all(build_cache._FILE.fullmatch(f"{name}-{HASH}.so") for name in names)


@pytest.mark.parametrize("name", [f"quartet_cpu-{HASH}.so", f"quartet_cpu-{HASH}.lock",
                                  f"build-quartet_cpu-{HASH}.a1b2c3d4"])
def test_clear_does_not_follow_links(cache, tmp_path, name):
    cache.mkdir(mode=0o700)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    (cache / name).symlink_to(precious if name.startswith("build") else precious / "file")
    build_cache.clear()
    assert (precious / "file").read_text() == "precious"
    assert (cache / name).is_symlink() == name.startswith("build")  # scratch is a folder, so that link is another's


def test_a_lock_that_is_a_link_is_refused_and_what_is_locked_is_never_changed(cache, tmp_path):
    build_cache.cache_dir()
    (tmp_path / "file").write_text("precious")
    (cache / "a.lock").symlink_to(tmp_path / "file")
    with pytest.raises(BuildError, match="cannot write to the folder"), build_cache.locked(cache / "a.so"):
        pass
    (cache / "b.lock").write_text("precious")
    with build_cache.locked(cache / "b.so"):
        pass
    assert (tmp_path / "file").read_text() == (cache / "b.lock").read_text() == "precious"


def test_looking_creates_nothing(cache, capsys):
    assert build_cache.entries() == [] and build_cache.files("*", "so") == [] and build_cache.clear() == (0, 0)
    assert not cache.exists() and build_cache.cache_dir(create=False) == cache and not cache.exists()
    for command in ("list", "clear"):
        assert main(["cache", command]) == 0 and "0 objects" in capsys.readouterr().out and not cache.exists()


def test_only_our_objects_are_listed(full):
    assert [entry.path.name for entry in build_cache.entries()] == sorted(n for n in OURS if n.endswith(".so"))


@pytest.fixture
def stranger(monkeypatch):
    """Nothing on this disk is this user's but by number."""
    for module in ("files", "build_cache"):
        monkeypatch.setattr(f"quartet.kernels.{module}.trusted", lambda: (os.getuid() + 1,))


@pytest.mark.parametrize("create", (True, False))
@pytest.mark.parametrize("where", ("itself", "above"))
def test_a_folder_behind_another_users_link_is_refused(tmp_path, stranger, where, create):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = tmp_path / "link" / "cache" if where == "above" else tmp_path / "link"
    with pytest.raises(BuildError, match=rf"behind the link {tmp_path}/link of user \d+, .*set QUARTET_CACHE_DIR"):
        build_cache.private_folder(folder, create=create)
    assert not list((tmp_path / "real").iterdir())


def test_ones_own_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    assert build_cache.private_folder(tmp_path / "link" / "cache").is_dir() and (tmp_path / "real/cache").is_dir()


def test_a_folder_in_one_of_another_user_is_refused(tmp_path, stranger):
    with pytest.raises(BuildError, match=rf"lies in {tmp_path} of user \d+, who could put another in its place; set"):
        build_cache.private_folder(tmp_path / "cache")


@needs_root
def test_links_and_folders_that_were_given_away_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    os.lchown(tmp_path / "link", 4321, 4321)
    with pytest.raises(BuildError, match="behind the link .*/link of user 4321"):
        build_cache.private_folder(tmp_path / "link" / "cache")
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 4321, 4321)
    with pytest.raises(BuildError, match="theirs of user 4321, who could"):
        build_cache.private_folder(tmp_path / "theirs" / "cache")


def test_the_places_of_compilations_are_never_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = build_cache.private_folder(tmp_path / f"quartet-compile-{os.getuid()}")
    (folder / "slot-0").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with memory.compile_slot():
        pass
    assert (folder / "slot-0").read_text() == "precious"
    (folder / "gate").unlink()
    (folder / "gate").symlink_to(tmp_path / "file")
    with pytest.raises(BuildError, match="cannot write to the folder .*set TMPDIR to"), memory.compile_slot():
        pass
    assert (tmp_path / "file").read_text() == "precious"


@pytest.fixture
def homeless(monkeypatch):
    """A container's user: no home, no entry in the password database."""
    for name in ("HOME", "XDG_CACHE_HOME", "QUARTET_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", no_entry)


def test_without_a_home_the_variable_is_enough(homeless, monkeypatch, tmp_path):
    with pytest.raises(BuildError, match="has no home folder for the kernel cache: set QUARTET_CACHE_DIR to a folder"):
        build_cache.cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build_cache.cache_dir() == tmp_path / "quartet"
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "cache"))
    assert build_cache.cache_dir() == tmp_path / "cache"


@pytest.mark.parametrize("variable", ("QUARTET_CACHE_DIR", "XDG_CACHE_HOME"))
def test_a_home_in_a_variable_is_found_and_none_is_made_up(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("QUARTET_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "~unknown/x")
    with pytest.raises(BuildError, match=f"variable {variable}.*: ~unknown is nobody.s home.*; write the path"):
        build_cache.cache_dir()
    monkeypatch.setenv(variable, "~/x")
    assert build_cache.cache_dir() in (tmp_path / "x", tmp_path / "x" / "quartet")
    assert not list(tmp_path.glob("~*"))


@pytest.fixture
def asked_anew():
    """What this process knows of its kernels is forgotten, before and after."""
    known = ops.unavailable, ops._kernels, optimizer.unavailable, optimizer._kernel
    for cached in known:
        cached.cache_clear()
    yield
    for cached in known:
        cached.cache_clear()


@pytest.mark.parametrize("kernels", (ops, optimizer))
def test_a_user_without_a_home_gets_the_reference_and_is_told(homeless, asked_anew, kernels):
    with pytest.warns(UserWarning, match="using the reference: .*no home folder .*set QUARTET_CACHE_DIR"):
        assert "no home folder" in kernels.unavailable()


REMEDIES = {errno.EROFS: "set QUARTET_CACHE_DIR to a folder that you can write to",
            errno.EACCES: "set QUARTET_CACHE_DIR to a folder that you can write to",
            errno.ENOSPC: "make room on that disk, or set QUARTET_CACHE_DIR to a folder on another one",
            errno.EDQUOT: "make room on that disk, or set QUARTET_CACHE_DIR to a folder on another one",
            errno.EIO: "set QUARTET_CACHE_DIR to another folder of yours"}


@pytest.mark.parametrize("code", REMEDIES, ids=errno.errorcode.get)
def test_a_disk_that_fills_up_while_an_object_is_written_is_told(cache, code):
    def build(path):
        raise OSError(code, os.strerror(code), str(path))

    with pytest.raises(BuildError, match=f"cannot write to the folder {cache}: {os.strerror(code)}; {REMEDIES[code]}"):
        build_cache.build_once(build_cache.target_of("a"), build)
    assert not list(cache.glob("*.so")) and not list(cache.glob("build-*"))


@pytest.mark.parametrize("code", REMEDIES, ids=errno.errorcode.get)
@pytest.mark.parametrize("kernels", (ops, optimizer))
def test_a_folder_that_nothing_can_be_written_to_is_no_error_of_a_step(cache, asked_anew, monkeypatch, kernels, code):
    cache.mkdir(mode=0o700)
    real = os.open

    def refuse(path, flags, *arguments, **keywords):
        if flags & os.O_CREAT and str(path).startswith(str(cache)):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match=f"using the reference: .*{os.strerror(code)}; {REMEDIES[code]}$") as said:
        reason = kernels.unavailable()
        assert kernels.unavailable() == reason and len(said) == 1
    assert "g++" not in reason and "delete" not in reason


def test_without_a_temporary_folder_the_remedy_is_one(cache, monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/']")

    monkeypatch.setattr(memory.tempfile, "gettempdir", none)
    with pytest.raises(BuildError, match="No usable temporary directory .*; set TMPDIR to a folder that you can write"):
        build_cache.build_once(build_cache.target_of("a"), lambda path: memory.compile_slot().__enter__())


def test_a_compiler_that_is_no_command(cache, monkeypatch, asked_anew):
    monkeypatch.setenv("CXX", "g++ '-O3")
    with pytest.raises(BuildError, match="CXX=.* is no command: No closing quotation; point CXX at g\\+\\+"):
        build.library()
    assert main(["doctor"]) in (0, 1)


def test_nobody_is_told_to_close_a_folder_that_others_use(tmp_path):
    tmp_path.chmod(0o1777)
    with pytest.raises(BuildError, match="set QUARTET_CACHE_DIR to one of your own, or, if nobody else uses it, run"):
        build_cache.private_folder(tmp_path)


@pytest.mark.parametrize(("said", "remedy"), [
    ("fatal error: error writing to /tmp/cc1.s: No space left on device", "make room on that disk, or set "
     "QUARTET_CACHE_DIR and TMPDIR to "),
    ("Cannot create temporary file in /tmp/: Read-only file system", "set QUARTET_CACHE_DIR and TMPDIR to "),
    ("g++: fatal error: Killed signal terminated program cc1plus", "more memory than is free"),
    ("error: expected ')'", "install g\\+\\+"),
])
def test_the_remedy_is_for_what_the_compiler_says(cache, tmp_path, monkeypatch, said, remedy):
    fake = tmp_path / "g++"
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "{said}" >&2; exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(BuildError, match=f"(?s)status 1; .*{remedy}"):
        build.library()


@needs_compiler
@pytest.mark.parametrize(("kernels", "load"), ((ops, "_kernels"), (optimizer, "_kernel")))
@pytest.mark.parametrize("damage", ("another library", "no library"))
def test_an_object_that_cannot_be_used_says_what_helps(cache, tmp_path, asked_anew, monkeypatch, kernels, load, damage):
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    path = build.library(source)
    if damage == "no library":
        path.write_text("not a library")
    monkeypatch.setattr(build, "library", lambda source=None: path)
    with pytest.raises(BuildError, match="cannot use the compiled kernels: .*; set QUARTET_CACHE_DIR to an empty"):
        getattr(kernels, load)()
    with pytest.warns(UserWarning, match="using the reference: cannot use the compiled kernels"):
        assert kernels.unavailable()


def test_a_compiled_graph_whose_kernels_are_gone_says_what_to_do(cache, asked_anew, monkeypatch):
    import torch

    from quartet.kernels.spec import QuantSpec

    monkeypatch.setenv("CXX", "no-such-compiler")
    codes, scales = torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(BuildError, match=r'compile the model again .*"disable_kernels": \["cpp"\].*install g\+\+'):
        ops.dequantize(codes, scales, QuantSpec.parse("e2m1/32 e8m0 ceil nearest"))
