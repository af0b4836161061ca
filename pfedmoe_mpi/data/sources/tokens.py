"""Words as numbers: first every word of the data, then the tokens of a vocabulary from training rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from unicodedata import normalize

import numpy as np

from pfedmoe_mpi.data.dataset import Dataset, MemoryRows
from pfedmoe_mpi.data.partition import Partition

PADDING, UNKNOWN = 0, 1  # tokens that do not stand for one word
FIRST = 2  # token of the most frequent word


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, digits and underscores.

    Letters and separate combining accents are composed first (NFC).
    """
    return re.findall(r"\w+", normalize("NFC", text.lower()))


def number_words(texts: Sequence[Sequence[str]]) -> tuple[list[np.ndarray], list[str]]:
    """Return every text as word numbers (words,) int32, and all words in alphabetical order.

    Number k is the k-th word, counted from 1.
    """
    words = sorted({word for text in texts for word in text})
    number = {word: place for place, word in enumerate(words, 1)}
    return [np.array([number[word] for word in text], np.int32) for text in texts], words


def pad(texts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Return the first `length` words of every text, (n, length) int32, zeros after its end."""
    rows = np.full((len(texts), length), PADDING, np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text[:length]
    return rows


def count_words(numbers: np.ndarray, partition: Partition, words: int) -> np.ndarray:
    """Return how often each number occurs in the training rows of clients that train, (words + 1,).

    Args:
        numbers: (n,) or (n, length), of all rows.
    """
    trained = [rows for k, rows in enumerate(partition.train) if k not in partition.unseen]
    return np.bincount(numbers[np.concatenate(trained)].ravel(), minlength=words + 1)


def token_table(counts: np.ndarray, limit: int) -> tuple[np.ndarray, int]:
    """Return the token of every word number, (words + 1,), and the number of tokens.

    The `limit` most frequent words have tokens from 2, the most frequent first and equally frequent ones in
    alphabetical order. All other words are unknown.

    Args:
        counts: how often each number occurs in training rows, (words + 1,); that of padding is ignored.
    """
    counts = np.concatenate([[0], counts[1:]])
    kept = np.argsort(-counts, kind="stable")[: min(limit, int((counts > 0).sum()))]
    tokens = np.full(len(counts), UNKNOWN, np.int32)
    tokens[PADDING] = PADDING
    tokens[kept] = FIRST + np.arange(len(kept))
    return tokens, FIRST + len(kept)


@dataclass(frozen=True)
class Vocabulary:
    """The `Fit` for rows of word numbers: frequent words in the training rows of training clients."""

    words: int
    limit: int

    def __call__(self, data: Dataset, partition: Partition) -> Dataset:
        x = data.rows(np.arange(len(data)))
        tokens, vocabulary = token_table(count_words(x, partition, self.words), self.limit)
        return replace(data, store=MemoryRows(tokens[x]), vocabulary=vocabulary)
