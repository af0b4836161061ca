"""Words as numbers: every word of the data at first, then those of a vocabulary learnt from training rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from unicodedata import normalize

import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, HeldRows
from pfedmoe_mpi.data.partition import Partition

PADDING, UNKNOWN = 0, 1  # tokens that are no word
FIRST = 2  # token of the most frequent word


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in small letters; accents may stand apart from theirs."""
    return re.findall(r"\w+", normalize("NFC", text.lower()))


def numbered(texts: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], list[str]]:
    """Every text as numbers (words,) int32, and all words in alphabetical order: number k is the k-th."""
    words = sorted({word for text in texts for word in text})
    number = {word: place for place, word in enumerate(words, 1)}
    return [np.array([number[word] for word in text], np.int32) for text in texts], words


def padded(texts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The first `length` words of every text, (n, length) int32, zeros after its end."""
    rows = np.full((len(texts), length), PADDING, np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text[:length]
    return rows


def counted(numbers: np.ndarray, partition: Partition, words: int) -> np.ndarray:
    """How often each number stands in the training rows of clients that train, (words + 1,).

    Args:
        numbers: (n,) or (n, length), of all rows.
    """
    trained = [rows for k, rows in enumerate(partition.train) if k not in partition.unseen]
    return np.bincount(numbers[np.concatenate(trained)].ravel(), minlength=words + 1)


def table(counts: np.ndarray, limit: int) -> tuple[np.ndarray, int]:
    """From numbers of all words to tokens, and how many tokens there are.

    The `limit` most frequent words have tokens from 2, the most frequent first, equal ones in alphabetical
    order; all others are unknown.

    Args:
        counts: how often each number stands in what is trained on, (words + 1,); that of padding is ignored.
    """
    counts = np.concatenate([[0], counts[1:]])
    kept = np.argsort(-counts, kind="stable")[: min(limit, int((counts > 0).sum()))]
    tokens = np.full(len(counts), UNKNOWN, np.int32)
    tokens[PADDING] = PADDING
    tokens[kept] = FIRST + np.arange(len(kept))
    return tokens, FIRST + len(kept)


@dataclass(frozen=True)
class Vocabulary:
    """A `Fit` for rows of numbered words: what is frequent in the training rows of clients that train."""

    words: int
    limit: int

    def __call__(self, data: Dataset, partition: Partition) -> Dataset:
        x = data.rows(np.arange(len(data)))
        tokens, vocabulary = table(counted(x, partition, self.words), self.limit)
        return replace(data, store=HeldRows(tokens[x]), vocabulary=vocabulary)
