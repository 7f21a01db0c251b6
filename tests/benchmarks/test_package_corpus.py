"""The text of ``train_gap.py``: whole files, the splits disjoint, nothing twice, the same in every run."""

import importlib
import sysconfig
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def corpus_module(monkeypatch, tmp_path):
    """The module in a Python with 60 files of 100 bytes, a copy of each in a package, and one that is too large."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("corpus")
    library, packages = tmp_path / "lib", tmp_path / "lib/site-packages"
    for i in range(60):
        for folder in (library, packages / "vendored"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"module{i}.py").write_bytes(bytes([i]) * 100)
    (library / "table.py").write_bytes(b"x" * (module.MOST_BYTES + 1))
    (library / "note.txt").write_bytes(b"y" * 100)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": library, "purelib": packages, "platlib": packages}.get)
    return module


def test_every_file_is_there_once_and_in_one_split(corpus_module):
    corpus = corpus_module.read_packages(10_000, 10_000)
    train, validation = bytes(corpus.train.tolist()), bytes(corpus.validation.tolist())
    assert sorted(train[::100] + validation[::100]) == list(range(60))
    assert len(train) + len(validation) == 6000 and len(validation) > 0
    assert all(len(set(text[i:i + 100])) == 1 for text in (train, validation) for i in range(0, len(text), 100))


def test_splits_end_at_their_size(corpus_module):
    corpus, whole = corpus_module.read_packages(1050, 150), corpus_module.read_packages(10_000, 10_000)
    assert (len(corpus.train), len(corpus.validation)) == (1050, 150)
    assert corpus.train.tolist() == whole.train[:1050].tolist()
