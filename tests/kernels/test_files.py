"""Writing where other users may have put links."""

import os
from pathlib import Path

import pytest
import torch

from quartet.kernels.files import check, expanded, foreign_link, opener, trusted, write_text
from quartet.report.dump import GraphDump
from quartet.runtime.direct.export import export, read


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """(another user's link to a file, the file)."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("precious")
    link.symlink_to(file)
    monkeypatch.setattr("quartet.kernels.files.trusted", lambda: (os.getuid() + 1,))
    return link, file


def test_a_home_is_found_and_none_is_made_up(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expanded("~/a") == expanded(Path("~/a")) == tmp_path / "a" and expanded("~") == tmp_path
    assert expanded("a~/~b") == Path("a~/~b")
    assert expanded("./~unknown/a") == expanded(expanded("./~unknown/a")) == tmp_path / "~unknown" / "a"
    model = torch.nn.Linear(1, 1)
    export(model, "~/a.pt")
    assert (tmp_path / "a.pt").is_file() and set(read("~/a.pt")) == {"weight", "bias"}
    for use in (expanded, read, lambda path: export(model, path)):
        with pytest.raises(FileNotFoundError, match="~unknown is nobody's home folder here; write the path from / on, "
                                                    "or ./~unknown/a.pt for what is named so"):
            use("~unknown/a.pt")
    assert not list(tmp_path.glob("~*"))


def test_a_file_is_written_and_overwritten(tmp_path):
    for text in ("a longer text, “quoted”", "short"):
        write_text(tmp_path / "a", text)
        assert (tmp_path / "a").read_text(encoding="utf-8") == text


def test_ones_own_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    assert foreign_link(tmp_path / "link") is None


def test_another_users_link_is_not_followed(planted):
    link, file = planted
    assert foreign_link(link) == link
    for write in (lambda: write_text(link, "text"), lambda: open(link, "wb", opener=opener), lambda: check(link),
                  lambda: export(torch.nn.Linear(1, 1), link)):
        with pytest.raises(PermissionError, match="belongs to user .*; remove it, or write to another folder"):
            write()
    assert file.read_text() == "precious"


def test_another_users_link_on_the_way_is_not_followed(planted, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to("folder")
    with pytest.raises(PermissionError, match=f"{tmp_path}/way belongs"):
        write_text(tmp_path / "way" / "a", "text")
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(("map", "overflow"), [
    ("0 0 4294967295", False), ("0 1000 1\n1 100000 65536", True), ("1000 1000 1", True), ("1000 0 1", False),
    ("", True), ("nonsense", False),
])
def test_root_outside_of_a_user_namespace_is_trusted_too(tmp_path, map, overflow):
    for file, text in (("self/uid_map", map), ("sys/kernel/overflowuid", "65534\n")):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    assert trusted(tmp_path) == {os.getuid(), 0} | ({65534} if overflow else set())
    assert trusted(tmp_path / "absent") == {os.getuid(), 0}


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert foreign_link(tmp_path / "a" / "c") is None
    with pytest.raises(OSError, match="Too many levels"):
        write_text(tmp_path / "a" / "c", "text")


def test_a_dump_does_not_follow_another_users_link(planted, tmp_path):
    link, file = planted
    dump = GraphDump(tmp_path / "dumps")
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    dump.before(0, "a", gm)
    (dump.folder / "00_a.py").symlink_to(file)
    with pytest.warns(UserWarning, match="could not dump.*PermissionError.*belongs to user"):
        dump.after(0, "a", torch.fx.symbolic_trace(torch.nn.ReLU()), 0.0)
    assert dump.failure and file.read_text() == "precious"
