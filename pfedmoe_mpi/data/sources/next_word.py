"""Texts to continue: a folder of plain text files, one natural client each; words are told by those before.

A row is a window of `data.length` words of one file, its class the word after them. The last fifth of a
file's rows is its test part, whoever holds them, and the last training rows of a client are its validation
part: dealt by draw, these windows would lie among training windows that hold their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import Dataset, HeldRows, Loaded
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.sources.text_file import text_of
from pfedmoe_mpi.data.sources.tokens import UNKNOWN, counted, numbered, table, words_of
from pfedmoe_mpi.errors import DataError

TEST = 0.2  # share of a file's rows, at its end


def load_words(root: Path, settings: Data) -> Loaded:
    """Every file's windows, (n, length) int32 numbers of words, and the number of the word after each.

    Raises:
        DataError: no text files, or one that is empty, not UTF-8 or too short for two windows.
    """
    files = sorted(root.glob("*.txt"))
    if not files:
        raise DataError(f"{root} has no file *.txt", "--data.path names a folder of plain text files")
    texts, words = numbered([words_of(text_of(path)) for path in files])
    windows = [_windows(path, text, settings.length) for path, text in zip(files, texts, strict=True)]
    rows = np.concatenate(windows)
    following, labels = np.unique(rows[:, -1], return_inverse=True)
    return Loaded(
        name=root.resolve().name,
        where=f"text files in {root}",
        store=HeldRows(rows[:, :-1]),
        labels=labels.astype(np.int64),
        class_names=tuple(words[number - 1] for number in following),
        client=np.repeat(np.arange(len(files)), [len(own) for own in windows]),
        official_test=np.concatenate([_last(len(own)) for own in windows]),
        client_names=tuple(path.stem for path in files),
        proposals={
            "partition.kind": "natural",
            "partition.pool": "official",
            "clients": len(files),
            "model.shared": "lstm3",
        },
        fit=NextWord(tuple(words), following, settings.vocabulary),
        ordered=True,
    )


def _windows(path: Path, text: np.ndarray, length: int) -> np.ndarray:
    """(n, length + 1), a row for every word that has `length` words before it."""
    if len(text) < length + 2:
        raise DataError(
            f"{path} has {len(text)} words, and two windows of data.length {length} need {length + 2}",
            f"lower --data.length to {len(text) - 2} or less" if len(text) > 2 else "remove the file",
        )
    return sliding_window_view(text, length + 1)


def _last(rows: int) -> np.ndarray:
    """Marks the last fifth, one row at least, (rows,)."""
    return np.arange(rows) >= rows - max(1, int(TEST * rows + 0.5))


@dataclass(frozen=True, eq=False)
class NextWord:
    """A `Fit` for windows: tokens and classes of the words that training clients' windows ask for most.

    Class 0 is any word without a token of its own, and may have no row; class c is the word of token c + 1.
    """

    words: Sequence[str]
    following: np.ndarray  # number of the word of every class before the fit
    limit: int

    def __call__(self, data: Dataset, partition: Partition) -> Dataset:
        x, asked = data.rows(np.arange(len(data))), self.following[data.labels]
        tokens, vocabulary = table(counted(asked, partition, len(self.words)), self.limit)
        numbers = np.argsort(tokens, kind="stable")[len(tokens) - (vocabulary - UNKNOWN - 1) :]
        return replace(
            data,
            store=HeldRows(tokens[x]),
            labels=tokens[asked].astype(np.int64) - UNKNOWN,
            classes=vocabulary - UNKNOWN,
            class_names=("unknown", *(self.words[number - 1] for number in numbers)),
            vocabulary=vocabulary,
        )
