"""Words of all scripts: marks stay with their letters; without spaces, characters are words."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest

from pfedmoe_mpi.data.sources.tokens import split_words
from support.data_files import all_rows, open_data, shared_data
from support.launcher import Session

LATIN = (
    "Nai\u0308ve, l'\xc9T\xc9; 3_a \xb2 don\u2019t co-op\n\tSTRASSE stra\xdfe e-mail\u200b@x.org",
    "1\ufe0f\u20e3 \u2764\ufe0f x\u200d y\u200c ma\xf1ana",
    "ανήρ ΟΔΟΣ, Война и мир 한국어",
)


def simple_words(text: str) -> list[str]:
    """Return the words of a text without combining marks."""
    return re.findall(r"\w+", normalize("NFC", text.lower()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("नमस्ते दुनिया, हिन्दी।", ["नमस्ते", "दुनिया", "हिन्दी"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("مُحَمَّدٌ رَسُولُ", ["مُحَمَّدٌ", "رَسُولُ"]),
        ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
        ("می‌خواهم بروم", ["می\u200cخواهم", "بروم"]),  # a joiner inside of a word
        ("র‍্যাব দল", ["র\u200d্যাব", "দল"]),
        ("q\u0303a İstanbul", ["q\u0303a", "i\u0307stanbul"]),  # no composed letter exists
        ("\u0303a b\u200d", ["a", "b"]),  # neither a mark without a letter nor a joiner at the end
    ],
)
def test_marks_stay_with_their_letters(text: str, words: list[str]) -> None:
    assert list(split_words(text)) == [normalize("NFC", word) for word in words]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我喜欢iPhone手机2020年。", ["我", "喜", "欢", "iphone", "手", "机", "2020", "年"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
        ("カタカナ・ひらがな", list("カタカナひらがな")),
        ("か\u3099", ["が"]),
        ("ไทยง่าย", ["ไ", "ท", "ย", "ง่", "า", "ย"]),
        ("មែន ລາວ", ["មែ", "ន", "ລ", "າ", "ວ"]),
        ("한국어 문장", ["한국어", "문장"]),  # Korean has spaces
    ],
)
def test_scripts_without_spaces_are_read_by_characters(text: str, words: list[str]) -> None:
    assert list(split_words(text)) == words


@pytest.mark.parametrize("text", LATIN)
def test_words_without_marks_are_as_before(text: str) -> None:
    assert list(split_words(text)) == simple_words(text)


def test_ag_news_keeps_its_words() -> None:
    with open(shared_data("ag-news") / "test.csv", encoding="utf-8", newline="") as file:
        texts = [" ".join(row[1:]) for row in csv.reader(file)]
    assert [list(split_words(text)) for text in texts] == [simple_words(text) for text in texts]


def test_characters_as_words_are_announced_once(session: Session, tmp_path: Path) -> None:
    """Row by row the numbers of characters, in both sources; a warning names the file and a character."""
    (tmp_path / "t.csv").write_text("1,好 a\n2,坏 a\n" * 20, encoding="utf-8")
    data = open_data("text", tmp_path / "t.csv", length=4)
    assert np.array_equal(all_rows(data)[:2], [[3, 1, 0, 0], [2, 1, 0, 0]])
    assert len(data.warnings) == 1 and "'坏'" in data.warnings[0]
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("ไทย" * 20, encoding="utf-8")
    assert len(open_data("words", tmp_path / "words", length=4).warnings) == 1
    flags = ("--data.source", "text", "--data.path", "t.csv", "--clients", "2")
    result = session("run", *flags, "--dry", cwd=tmp_path)
    assert result.code == 0 and result.err.count("warning: ") == 1
    assert "t.csv: every character of a script without spaces" in result.err
    (tmp_path / "t.csv").write_text("1,good\n2,bad é\n" * 20, encoding="utf-8")
    assert "warning" not in session("run", *flags, "--dry", cwd=tmp_path).err
