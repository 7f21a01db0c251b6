"""The demo's data: whole, disjoint by file, the same in every run."""

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def corpus_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("corpus")


@pytest.fixture(scope="module")
def library(corpus_module):
    return corpus_module.read_corpus()


def test_the_standard_library_is_real_text_in_two_parts(library):
    assert len(library.train) > 5_000_000
    share = len(library.validation) / (len(library.train) + len(library.validation))
    assert 0.05 < share < 0.2
    assert b"def " in bytes(library.train[:1_000_000].tolist())


def test_batches_are_windows_of_the_text_shifted_by_one(library):
    tokens, targets = library.batch("train", seed=3, step=5, batch=4, length=16)
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert bytes(tokens[0].tolist()) in bytes(library.train.tolist())


def test_batches_depend_on_seed_step_and_split_only(library):
    def tokens(split="train", seed=0, step=0):
        return library.batch(split, seed, step, 4, 16)[0]

    assert torch.equal(tokens(), tokens())
    for other in (tokens(step=1), tokens(seed=1), tokens("validation")):
        assert not torch.equal(tokens(), other)


def test_a_file_is_cut_at_nine_tenths(corpus_module, tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(100)))
    corpus = corpus_module.read_corpus(file)
    assert (corpus.train.tolist(), corpus.validation.tolist()) == (list(range(90)), list(range(90, 100)))


def test_too_short_a_text_names_the_longest_sequence(corpus_module, tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="has 10 bytes, a sequence of 32 needs 33; use --seq 9 or less"):
        corpus_module.read_corpus(file).batch("validation", 0, 0, 1, 32)
