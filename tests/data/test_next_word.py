"""Next words of text files: windows, classes, test rows, and bad files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.data.dataset import Dataset
from pfedmoe_mpi.errors import PartitionError
from pfedmoe_mpi.federation import build
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from support.data_files import all_rows, data_error, open_data
from support.launcher import Result
from support.small_federation import shared_comm
from support.text_files import assert_restart_keeps_bits, write_stories

SMALL = {"rounds": 2, "data.length": 4, "data.vocabulary": 9, "train.device": "cpu"}
FLAGS = (
    "--data.source",
    "words",
    *(word for name, value in SMALL.items() for word in (f"--{name}", str(value))),
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("stories"))


def loop_of(path: Path, **changes: Any) -> Loop:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    given = {"data.source": "words", "data.path": str(path), "train.threads": 1}
    return Loop(
        shared_comm(),
        build.build(shared_comm(), config.build({**given, **SMALL, **dotted})),
        SilentObserver(),
        None,
    )


@pytest.mark.parametrize("limit", [9, 5])
def test_windows_tokens_and_classes_equal_a_plain_reading(stories: Path, limit: int) -> None:
    """Every word after four others is a row, and the last fifth of a file is for testing."""
    federation = loop_of(stories, data__vocabulary=limit).federation
    data, partition = federation.dataset, federation.partition
    texts = [
        re.findall(r"\w+", (stories / f"{name}.txt").read_text().lower()) for name in ("one", "three", "two")
    ]
    windows = [[text[i : i + 5] for i in range(len(text) - 4)] for text in texts]
    cuts = [len(own) - round(len(own) / 5) for own in windows]
    counts = Counter(window[-1] for own, cut in zip(windows, cuts, strict=True) for window in own[:cut])
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:limit]
    assert (
        data.class_names == ("unknown", *kept) and data.classes == limit + 1 and data.vocabulary == limit + 2
    )
    token = {word: place for place, word in enumerate(kept, 2)}
    rows = [[token.get(word, 1) for word in window] for own in windows for window in own]
    assert all_rows(data).tolist() == [row[:-1] for row in rows]
    assert data.labels.tolist() == [row[-1] - 1 for row in rows]
    start = 0
    for k, (own, cut) in enumerate(zip(windows, cuts, strict=True)):
        assert partition.train[k].tolist() == list(range(start, start + cut))
        assert partition.test[k].tolist() == list(range(start + cut, start + len(own)))
        start += len(own)


def test_training_rows_hide_later_answers(stories: Path) -> None:
    """Windows overlap, so a client's test rows follow its training rows, validation between."""
    made = loop_of(stories, partition__validation=0.25).federation
    last = {row for own, cut in _files(made.dataset) for row in own[cut:]}
    for train, validation, test in zip(
        made.partition.train, made.partition.validation, made.partition.test, strict=True
    ):
        assert set(test.tolist()) <= last and not last & {*train.tolist(), *validation.tolist()}
        assert train.max() < validation.min()
        assert len(validation) == int(0.25 * (len(train) + len(validation)) + 0.5)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "quantity"])
def test_partition_that_would_divide_a_file_is_refused(stories: Path, kind: str) -> None:
    pattern = rf"partition.kind = {kind} would divide windows that overlap(.|\n)*--partition.kind natural"
    with pytest.raises(PartitionError, match=pattern):
        loop_of(stories, partition__kind=kind, clients=3)


@pytest.mark.parametrize("pool", ["official", "all"])
def test_no_training_window_contains_a_test_answer(stories: Path, pool: str) -> None:
    """Window r predicts the word that windows r + 1 to r + length of the same file contain."""
    federation = loop_of(stories, partition__pool=pool).federation
    file, length = federation.dataset.client, federation.dataset.shape[0]
    assert file is not None
    trained = np.zeros(len(file) + length, bool)
    trained[np.concatenate(federation.partition.train)] = True
    for row in np.concatenate(federation.partition.test):
        later = np.arange(row + 1, row + length + 1)
        later = later[later < len(file)]
        assert not trained[later[file[later] == file[row]]].any()


def _files(data: Dataset) -> Iterator[tuple[list[int], int]]:
    """Return each file's rows, and how many of them are before its last fifth."""
    assert data.client is not None
    for file in range(3):
        own = np.flatnonzero(data.client == file).tolist()
        yield own, len(own) - round(len(own) / 5)


def test_rows_for_the_server_are_refused(stories: Path) -> None:
    with pytest.raises(
        PartitionError, match=r"overlap the windows that clients are tested on(.|\n)*fedjets.common FILE"
    ):
        loop_of(stories, algorithm="fedjets")


def test_files_are_clients_with_lstms_of_different_width(stories: Path) -> None:
    """Of four words two follow from those before, and two are one of three each."""
    loop = loop_of(stories, rounds=12, data__vocabulary=20)
    made = loop.federation
    assert (made.config.partition.kind, made.config.clients) == ("natural", 3)
    assert made.task.pool == ("lstm1", "lstm2", "lstm3") and made.task.shared == "lstm3"
    assert loop.run()
    assert loop.history[-1]["accuracy"]["mean"] > 0.5


def test_method_of_equal_models_trains_on_next_words(stories: Path) -> None:
    loop = loop_of(stories, algorithm="fedavg", rounds=1)
    assert loop.federation.task.pool == ("lstm3",) and loop.run()


def test_ranks_and_restart_keep_the_bits_on_next_words(
    run_command: Callable[..., Result], stories: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--data.path", str(stories))
    assert_restart_keeps_bits(run_command, flags, tmp_path)


def test_bad_next_word_folder_is_reported(tmp_path: Path) -> None:
    data_error(r"has no file \*.txt", "words", tmp_path)
    (tmp_path / "a.txt").write_text("one two three four five six\n" * 9)
    (tmp_path / "b.txt").write_text("")
    data_error("b.txt is empty", "words", tmp_path)
    (tmp_path / "b.txt").write_text("one two three four five six")
    data_error("b.txt has 6 words(.|\n)*lower --data.length to 4", "words", tmp_path, length=5)
    open_data("words", tmp_path, length=4)
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff three")
    data_error("b.txt, line 2: byte 0xff is not UTF-8(.|\n)*-f LATIN1", "words", tmp_path)
    (tmp_path / "b.txt").write_text("one two three", encoding="utf-16")
    data_error("b.txt, line 1: byte 0xff is not UTF-8(.|\n)*-f UTF-16", "words", tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "a.txt").write_text("one " * 40)
    data_error("hold one class only", "words", tmp_path, length=4)


def test_characters_are_tokens(tmp_path: Path) -> None:
    """Capital letters, spaces and line ends are tokens; an accent and its letter are one."""
    (tmp_path / "10.txt").write_text("Ab a\nbé")
    (tmp_path / "9.txt").write_text("a b A be\u0301")
    data = open_data("words", tmp_path, length=3, tokens="char")
    characters = sorted({*"Ab a\nbé"})
    rows = ["".join(characters[n - 1] for n in row) for row in all_rows(data)]
    texts = ["a b A bé", "Ab a\nbé"]
    assert rows == [text[k : k + 3] for text in texts for k in range(len(text) - 3)]
    assert [data.class_names[y] for y in data.labels] == [c for text in texts for c in text[3:]]
    assert data.client_names == ("9", "10"), "names that are numbers sort as numbers"
    data_error(
        "has 8 characters, but two windows with data.length = 9 need 11",
        "words",
        tmp_path,
        length=9,
        tokens="char",
    )
