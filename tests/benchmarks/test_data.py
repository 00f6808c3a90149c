"""Batches are a function of (seed, step); validation text is never trained on; the hash knows names and contents."""

import numpy as np
import pytest

from benchmarks.experiment.data import open_corpus
from benchmarks.experiment.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    """Thirty files; file i is byte 48 + i, eighty times over, so that a token tells its file."""
    for i in range(30):
        path = tmp_path / "text" / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([48 + i]) * 80)
    return tmp_path / "text"


def test_batches_depend_on_seed_and_step_alone(folder):
    corpus = open_corpus(folder)
    first = corpus.batch(seed=1, step=7, batch_size=4, length=16)
    for step in range(5):
        corpus.batch(seed=0, step=step, batch_size=2, length=16)
    again = open_corpus(folder).batch(seed=1, step=7, batch_size=4, length=16)
    np.testing.assert_array_equal(first, again)
    others = [corpus.batch(seed=s, step=t, batch_size=4, length=16) for s, t in ((1, 8), (2, 7))]
    assert not any(np.array_equal(first, other) for other in others)


def test_a_window_is_consecutive_text(tmp_path):
    path = tmp_path / "ramp.u16"
    np.arange(1000, dtype="<u2").tofile(path)
    windows = open_corpus(path).batch(seed=0, step=0, batch_size=50, length=8)
    assert windows.shape == (50, 9)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows - windows[:, :1], np.broadcast_to(np.arange(9), (50, 9)))
    assert windows.max() < 900
    assert len(set(windows[:, 0].tolist())) > 40


def test_files_are_trained_on_or_validated_on(folder):
    corpus = open_corpus(folder)
    trained, validated = set(corpus.train.tolist()), set(corpus.validation.tolist())
    assert len(validated) == 3
    assert trained | validated == {48 + i for i in range(30)}
    assert not trained & validated
    seen = corpus.validation_batch(index=0, batch_size=64, length=16)
    assert set(seen.ravel().tolist()) <= validated
    assert corpus.record().split == "by file"


def test_one_file_is_split_by_position(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(250)))
    corpus = open_corpus(path)
    assert bytes(corpus.train) + bytes(corpus.validation) == bytes(range(250))
    assert len(corpus.validation) == 25
    assert corpus.record().split == "by position"
    assert corpus.record().vocab_size == 256


def test_hash_knows_names_and_contents(folder):
    def digest():
        return open_corpus(folder).record().sha256

    before = digest()
    assert before == digest()
    file = folder / "part0" / "0.txt"
    moved = file.rename(folder / "part0" / "zero.txt")
    assert digest() != before
    moved.rename(file)
    assert digest() == before
    file.write_bytes(b"0" * 79 + b"1")
    assert digest() != before


def test_hidden_and_binary_files_are_left_out(folder):
    before = open_corpus(folder).record()
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert open_corpus(folder).record() == before


@pytest.mark.parametrize(("suffix", "dtype"), [(".bin", "<u2"), (".u16", "<u2"), (".u32", "<u4")])
def test_token_files(tmp_path, suffix, dtype):
    tokens = np.array([3, 40_000, 7, 5] * 25, dtype=dtype)
    path = tmp_path / f"tokens{suffix}"
    tokens.tofile(path)
    corpus = open_corpus(path)
    np.testing.assert_array_equal(np.concatenate((corpus.train, corpus.validation)), tokens)
    record = corpus.record()
    assert (record.kind, record.vocab_size, record.train_tokens, record.validation_tokens) == ("tokens", 40_001, 90, 10)


def test_the_default_is_the_standard_library():
    corpus = open_corpus()
    assert {"argparse.py", "json/decoder.py"} <= set(corpus.files)
    assert not any("site-packages" in name or "/test/" in name for name in corpus.files)
    assert len(corpus.train) > 2_000_000
    assert len(corpus.validation) > 200_000


def test_unusable_data_is_named(tmp_path, folder):
    with pytest.raises(UsageError, match=r"--data: .*nowhere does not exist"):
        open_corpus(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no text"):
        open_corpus(tmp_path / "empty")
    (tmp_path / "odd.u32").write_bytes(b"123456")
    with pytest.raises(UsageError, match=r"6 bytes.*4-byte token ids"):
        open_corpus(tmp_path / "odd.u32")
    (tmp_path / "small.txt").write_text("forty characters and not a single more..")
    with pytest.raises(UsageError, match="4 tokens for validation; a window needs 9"):
        open_corpus(tmp_path / "small.txt").require(8)
