"""Words as numbers: first every word of the data, then the tokens of a vocabulary from training rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from unicodedata import category, name, normalize

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import Dataset, MemoryRows
from pfedmoe_mpi.data.partition import Partition

PADDING, UNKNOWN = 0, 1  # tokens that do not stand for one word
FIRST = 2  # token of the most frequent word

# Blocks of scripts without spaces between words: Thai and Lao, Burmese, Khmer, kana and Chinese characters.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_ASCII = re.compile(r"\w+")
_JOINERS = "\u200c\u200d"
_MARK_BLOCKS = range(0x300, 0x20000)  # above, the only marks are variation selectors


def split_words(text: str) -> Iterator[str]:
    """Yield the words of a text in lower case: runs of letters, digits and underscores.

    Combining marks (the vowel signs of Hindi, the vowels of Arabic or Hebrew, accents) and joiners belong to
    the letter before them; letters are composed with their accents first (NFC). In scripts without spaces
    between words every letter with its marks is a word.
    """
    text = normalize("NFC", text.lower())
    pattern = _ASCII if text.isascii() else _pattern()  # equal words, in an eighth of the time
    return (match[0] for match in pattern.finditer(text))


@cache
def _pattern() -> re.Pattern[str]:
    marks = "".join(character for character in map(chr, _MARK_BLOCKS) if _is_mark(character))
    letter = rf"[^\W{_UNSPACED}]"
    spaced = rf"{letter}+(?:[{_JOINERS}]*(?:[{marks}]|{letter}+))*"
    return re.compile(rf"{spaced}|(?=\w)[{_UNSPACED}][{marks}]*")


def _is_mark(character: str) -> bool:
    """Return whether a character changes the letter before it; variation selectors change its look only."""
    return category(character) in {"Mn", "Mc"} and not name(character, "").startswith("VARIATION SELECTOR")


def unspaced(words: Sequence[str], where: str, settings: Data) -> tuple[str, ...]:
    """Return a warning if `words`, not characters, are letters of a script without spaces between words."""
    letter = next((word for word in words if re.match(f"[{_UNSPACED}]", word)), None)
    if letter is None or settings.tokens == "char":
        return ()
    return (
        f"{where}: every character of a script without spaces between words (Chinese, Japanese, Thai, Lao, "
        f"Khmer, Burmese) is a word of its own, such as '{letter}'; data.length counts these characters",
    )


def number_words(texts: Iterable[Iterable[str]]) -> tuple[list[np.ndarray], list[str]]:
    """Return every text as word numbers (words,) int32, and all words in alphabetical order.

    Number k is the k-th word, counted from 1.
    """
    met: dict[str, int] = {}  # every word's place in order of appearance
    rows = [np.fromiter((met.setdefault(word, len(met)) for word in text), np.int32) for text in texts]
    words = sorted(met)
    number = np.empty(len(words), np.int32)
    number[[met[word] for word in words]] = np.arange(1, len(words) + 1)
    return [number[row] for row in rows], words


def read_texts(
    texts: Iterable[str], settings: Data, where: str
) -> tuple[np.ndarray, Vocabulary, tuple[str, ...]]:
    """Return the numbers of the first `data.length` tokens of every text (n, length), fit and warnings."""
    rows, words = number_words(islice(split(text, settings.tokens), settings.length) for text in texts)
    fit = Vocabulary(len(words), settings.vocabulary)
    return pad(rows, settings.length), fit, unspaced(words, where, settings)


def split(text: str, tokens: str) -> Iterator[str]:
    """Yield the tokens of a text: its characters as they are, or else its words."""
    return iter(normalize("NFC", text)) if tokens == "char" else split_words(text)


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
