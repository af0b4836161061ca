"""Next-word prediction: a folder of plain text files, one natural client each.

A row is a window of `data.length` words, or characters, of one file; its class is the next one. The last
fifth of a file's rows is its test part under any partition, and the last training rows of a client are its
validation part. If these windows were drawn at random, overlapping training windows would contain their
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import Dataset, MemoryRows, SourceData
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.sources.numbering import sort_names
from pfedmoe_mpi.data.sources.text_file import read_text
from pfedmoe_mpi.data.sources.tokens import (
    UNKNOWN,
    count_words,
    number_words,
    split,
    token_table,
    unspaced,
)
from pfedmoe_mpi.errors import DataError

TEST = 0.2  # share of a file's rows, at its end


def load_words(root: Path, settings: Data) -> SourceData:
    """Read every file's windows, (n, length) int32 word numbers, with the next word of each as its label.

    Raises:
        DataError: no text files, or one that is empty, not UTF-8 or too short for two windows.
    """
    stems = sort_names(path.stem for path in root.glob("*.txt") if path.name[0] != ".")
    if not stems:
        raise DataError(f"{root} has no file *.txt", "set --data.path to a folder of plain text files")
    files = [root / f"{stem}.txt" for stem in stems]
    texts, words = number_words(split(read_text(path), settings.tokens) for path in files)
    windows = [_windows(path, text, settings) for path, text in zip(files, texts, strict=True)]
    rows = next_tokens(windows, words, settings)
    return SourceData(
        name=root.resolve().name,
        where=f"text files in {root}",
        store=MemoryRows(rows.x),
        labels=rows.labels,
        class_names=rows.class_names,
        client=np.repeat(np.arange(len(files)), [len(of_file) for of_file in windows]),
        official_test=np.concatenate([last_fifth(len(of_file)) for of_file in windows]),
        client_names=tuple(stems),
        proposals={
            "partition.kind": "natural",
            "partition.pool": "official",
            "clients": len(files),
            "model.shared": "lstm3",
        },
        fit=rows.fit,
        ordered=True,
        warnings=unspaced(words, str(root), settings),
    )


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Windows (n, length) int32 with the next token of each as its label (n,)."""

    x: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    fit: NextWord


def next_tokens(windows: Sequence[np.ndarray], words: Sequence[str], settings: Data) -> NextTokens:
    """Return the rows of windows (n, length + 1) of token numbers, one array per client and part."""
    rows = np.concatenate(windows)
    following, labels = np.unique(rows[:, -1], return_inverse=True)
    fit = NextWord(tuple(words), following, settings.vocabulary)
    names = tuple(words[number - 1] for number in following)
    return NextTokens(rows[:, :-1], labels.astype(np.int64), names, fit)


def _windows(path: Path, text: np.ndarray, settings: Data) -> np.ndarray:
    """Return the windows (n, length + 1), one for every token that has `length` tokens before it."""
    length, unit = settings.length, "characters" if settings.tokens == "char" else "words"
    if len(text) < length + 2:
        raise DataError(
            f"{path} has {len(text)} {unit}, but two windows with data.length = {length} need {length + 2}",
            f"lower --data.length to {len(text) - 2} or less" if len(text) > 2 else "remove the file",
        )
    return sliding_window_view(text, length + 1)


def last_fifth(rows: int) -> np.ndarray:
    """Return a mask (rows,) of the last fifth, at least one row."""
    return np.arange(rows) >= rows - max(1, int(TEST * rows + 0.5))


@dataclass(frozen=True, eq=False)
class NextWord:
    """The `Fit` for windows: tokens and classes of the most frequent next words of training clients.

    Class 0 stands for all words without a token and may have no row; class c is the word of token c + 1.
    """

    words: Sequence[str]
    following: np.ndarray  # number of the word of every class before the fit
    limit: int

    def __call__(self, data: Dataset, partition: Partition) -> Dataset:
        x, next_words = data.rows(np.arange(len(data))), self.following[data.labels]
        counts = count_words(next_words, partition, len(self.words))
        tokens, vocabulary = token_table(counts, self.limit)
        numbers = np.argsort(tokens, kind="stable")[len(tokens) - (vocabulary - UNKNOWN - 1) :]
        return replace(
            data,
            store=MemoryRows(tokens[x]),
            labels=tokens[next_words].astype(np.int64) - UNKNOWN,
            classes=vocabulary - UNKNOWN,
            class_names=("unknown", *(self.words[number - 1] for number in numbers)),
            vocabulary=vocabulary,
        )
