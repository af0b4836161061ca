"""Texts from CSV: whose words the vocabulary has, the models for tokens, what the gate sees, bad files."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoe_mpi import config
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import build, plan
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.models import names, registry
from pfedmoe_mpi.models.cost import multiply_adds
from support.data_files import (
    all_rows,
    data_error,
    open_data,
    random_images,
    shared_data,
    write_h5,
    write_image_folder,
)
from support.launcher import Result, Session, error_message, read_metrics
from support.limited_memory import read_messages
from support.small_federation import shared_comm, weights_of
from support.text_files import TOPICS, assert_restart_keeps_bits, write_hospitals, write_news

SMALL = {"clients": 4, "rounds": 2, "data.length": 12, "data.vocabulary": 30, "train.device": "cpu"}
FLAGS = (
    "--data.source",
    "text",
    *(word for name, value in SMALL.items() for word in (f"--{name}", str(value))),
)


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_news(tmp_path_factory.mktemp("news") / "news.csv")


def settings(path: Path, **changes: Any) -> config.Config:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    given = {"data.source": "text", "data.path": str(path), "train.threads": 1}
    return config.build({**given, **SMALL, **dotted})


def loop_of(path: Path, **changes: Any) -> Loop:
    return Loop(shared_comm(), build.build(shared_comm(), settings(path, **changes)), SilentObserver(), None)


def written(path: Path) -> list[list[str]]:
    """Every row's words, read by other means."""
    with open(path, encoding="utf-8", newline="") as file:
        return [re.findall(r"\w+", " ".join(row[1:]).lower()) for row in csv.reader(file)]


# Tokens


@pytest.mark.parametrize("unseen", [0, 1])
def test_vocabulary_comes_from_training_rows(news: Path, unseen: int) -> None:
    """The 30 most frequent words of the first 12 of every training row, in their order; 1 for all others."""
    kind = {"partition__kind": "pathological"} if unseen else {}
    chosen = settings(news, unseen__clients=unseen, clients=3, **kind)
    data = open_data("text", news, length=12, vocabulary=30)
    partition = plan.draw_partition(chosen, data)
    texts = [words[:12] for words in written(news)]
    clients = [k for k in range(3) if k not in partition.unseen]
    assert len(clients) == 3 - unseen
    counts = Counter(word for k in clients for row in partition.train[k] for word in texts[row])
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:30]
    token = {word: place for place, word in enumerate(kept, 2)}
    ready = data.fitted(partition)
    assert (ready.vocabulary, ready.shape, ready.dtype, ready.tokens) == (32, (12,), np.int32, True)
    for row, words in zip(all_rows(ready), texts, strict=True):
        expected = [token.get(word, 1) for word in words]
        assert row.tolist() == expected + [0] * (12 - len(expected))


def test_small_vocabulary_has_no_gaps(news: Path) -> None:
    data = open_data("text", news, vocabulary=10_000)
    ready = data.fitted(plan.draw_partition(settings(news), data))
    assert set(np.unique(all_rows(ready))) >= set(range(2, ready.vocabulary)) and ready.vocabulary < 60


def test_labels_may_be_numbers_or_names(news: Path, tmp_path: Path) -> None:
    data = open_data("text", news)
    assert data.class_names == tuple(TOPICS) and data.labels[:4].tolist() == [0, 1, 2, 0]
    lines = ['b,"one, two"', "a,three", "b,", "a,five six"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = open_data("text", tmp_path / "t.csv")
    assert data.class_names == ("a", "b") and data.labels.tolist() == [1, 0, 1, 0]
    assert (all_rows(data)[:, :3] > 0).sum(axis=1).tolist() == [2, 1, 0, 2]
    (tmp_path / "t.csv").write_text("10,x\n9,y\n")
    assert open_data("text", tmp_path / "t.csv").class_names == ("9", "10")
    (tmp_path / "t.csv").write_text("1,x\n-1,y\n0,z\n")
    assert open_data("text", tmp_path / "t.csv").class_names == ("-1", "0", "1")
    (tmp_path / "classes.txt").write_text("b\na\n")
    (tmp_path / "t.csv").write_text("a,x\n1,y\n")
    assert open_data("text", tmp_path / "t.csv").labels.tolist() == [1, 0]


def test_text_may_span_many_lines(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('1,"' + "one\n" * 40_000 + '"\n2,two\n')
    assert all_rows(open_data("text", tmp_path / "t.csv", length=70))[:, -1].tolist() == [1, 0]


# Models


@pytest.mark.parametrize("name", [*names.TEXT, *names.LSTM])
def test_text_models_ignore_padding_and_use_word_order(name: str) -> None:
    """Padding and what stands in it change nothing; the order of words does, but for fastText."""
    torch.manual_seed(0)
    model = registry.build_extractor(name, (9,), 5, "small", 20).eval()
    x = torch.tensor([[2, 3, 4, 5, 0, 0, 0, 0, 0], [7, 1, 1, 8, 9, 2, 3, 4, 5], [0] * 9], dtype=torch.int32)
    found = model(x)
    assert found.shape == (3, 5) and bool(found.isfinite().all())
    alone = registry.build_extractor(name, (9,), 5, "small", 20).eval()
    alone.load_state_dict(model.state_dict())
    with torch.no_grad():
        alone.embedding.weight[0] = 7.0  # type: ignore[union-attr]
    torch.testing.assert_close(alone(x)[:2], found[:2])
    mixed = x.clone()
    mixed[:, :4] = x[:, :4].flip(1)
    assert torch.allclose(model(mixed)[0], found[0], atol=1e-6) == (name == "fasttext")


def test_auto_chooses_text_models() -> None:
    assert names.auto_pool((9,), tokens=True, shared="fasttext") == (
        "fasttext",
        "lstm",
        "gru",
        "transformer",
    )
    assert names.auto_pool((9,), tokens=True, shared="lstm3") == ("lstm1", "lstm2", "lstm3")
    assert names.auto_shared((9,), tokens=True) == "fasttext"
    assert names.auto_shared((9,), ("lstm1", "lstm2"), tokens=True) == "lstm3"
    assert {names.native_dim(name) for name in (*names.TEXT, *names.LSTM)} == {64}


def test_models_refuse_other_kinds_of_samples(news: Path, tmp_path: Path) -> None:
    for name in ("cnn5", "mlp1", "resnet18"):
        with pytest.raises(ConfigError, match=f"model {name} takes numbers(.|\n)*use fasttext"):
            loop_of(news, model__pool=name, model__dim=8)
    with pytest.raises(ConfigError, match=r"model gru takes texts(.|\n)*use mlp1"):
        loop_of(
            write_hospitals(tmp_path / "h"), data__source="heart", clients=3, model__pool="gru", model__dim=8
        )
    with pytest.raises(ConfigError, match=r"train\.augment = flip needs images"):
        loop_of(news, train__augment="flip")
    with pytest.raises(ConfigError, match=r"gate\.input = pooled needs images"):
        loop_of(news, gate__input="pooled")


def test_cost_counts_recurrent_steps() -> None:
    gru, lstm = (registry.build_extractor(name, (10,), 5, "small", 20) for name in ("gru", "lstm"))
    per_step = 64 * 64 * 2
    difference = multiply_adds(lstm, (10,), True) - multiply_adds(gru, (10,), True)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (lstm, gru)]
    assert difference == pytest.approx(10 * per_step + 8 * (parameters[0] - parameters[1]) / 64)


def test_gate_sends_no_gradient_to_the_shared_embedding(news: Path) -> None:
    loop = loop_of(news, gate__hidden=8, gate__start="paper")
    federation = loop.federation
    client, method = federation.clients[1], federation.method
    parts = federation.workbench.parts((method.state(), loop.state), (client.spec, client.vector))
    for module in parts.modules().values():
        module.train().requires_grad_(True)
    x = client.splits["train"].x[:16]
    alpha = weights_of(method, parts, x)
    assert alpha.shape == (16, 2)
    alpha[:, 0].square().sum().backward()
    assert all(p.grad is None for name in ("shared", "model") for p in getattr(parts, name).parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in parts.gate.parameters())
    with torch.no_grad():
        parts.model.extractor.embedding.weight.mul_(-2)
    torch.testing.assert_close(weights_of(method, parts, x), alpha)
    with torch.no_grad():
        parts.shared.embedding.weight[2:9].neg_()
    assert not torch.allclose(weights_of(method, parts, x), alpha)


# Methods, ranks, commands


@pytest.mark.parametrize("method", methods.names())
def test_every_method_trains_on_texts(news: Path, method: str) -> None:
    loop = loop_of(news, algorithm=method, rounds=1, partition__kind="iid")
    assert loop.run()
    assert loop.history[-1]["accuracy"]["mean"] is not None and not loop.history[-1]["dropped"]


def test_every_client_learns_texts(news: Path) -> None:
    """All four models, five rounds: every client beats the majority of its test rows by 20 points."""
    loop = loop_of(news, rounds=5, partition__kind="iid", data__vocabulary=100)
    assert loop.run()
    federation = loop.federation
    assert federation.task.pool == names.TEXT and federation.task.shared == "fasttext"
    for k, accuracy in enumerate(loop.history[-1]["clients"]["accuracy"]):
        labels = federation.dataset.labels[federation.partition.test[k]]
        assert accuracy > np.bincount(labels).max() / len(labels) + 0.2


def test_ranks_and_restart_keep_the_bits_on_texts(
    run_command: Callable[..., Result], session: Session, news: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--data.path", str(news))
    newest = assert_restart_keeps_bits(run_command, flags, tmp_path)
    again = run_command("evaluate", newest, "--json", "true").out
    assert f'"accuracy": {read_metrics(tmp_path / "half")[-1]["clients"]["accuracy"]}' in again
    (tmp_path / "other").mkdir()
    other = write_news(tmp_path / "other" / "news.csv", rows=120)
    error_message(
        session("evaluate", newest, "--data.path", str(other), cwd=tmp_path), "not the texts of the training"
    )
    run_command("export", newest, "--client", "0", "client.h5")
    error_message(session("data", "prepare", "x.h5", *flags, cwd=tmp_path), "cannot be prepared before")


def test_ag_news_is_read() -> None:
    data = open_data("text", shared_data("ag-news") / "test.csv")
    assert len(data) == 7600 and data.class_names == ("World", "Sports", "Business", "Sci/Tech")
    assert np.bincount(data.labels).tolist() == [1900] * 4 and data.labels[0] == 2


# Bad files


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", "t.csv is empty"),
        ("1,a\n\n2\n", "line 3: one column, expected a label and a text"),
        ("Class,Title\n1,a\n2,b\n", "line 1: unknown label 'Class'(.|\n)*remove a header line"),
        ('1,a\n2,"b" c\n', "line 2 is not CSV"),
        ('1,a\n2,"b\nc', "line 2 is not CSV"),
        ('1,"a\nb"\n2\n', "line 3: one column, expected a label and a text"),
        ("v1,v2\nham,a\nspam,b\nham,c\nspam,d\n", "no other row has the first row's label 'v1'(.|\n)*header"),
        ("1,a\n1,b\n", "hold one class only"),
        (b"1,a\n2,caf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_bad_text_file_is_reported_with_its_line(tmp_path: Path, content: str | bytes, pattern: str) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    data_error(pattern, "text", tmp_path / "t.csv")


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
def test_other_separators_than_commas_are_named(tmp_path: Path, mark: str, name: str) -> None:
    """Also where the texts have commas, so that there are columns; all labels with such a mark are labels."""
    for text in ("red", "red, green"):
        rows = [f"{label}{mark}{text} {number}\n" for number, label in enumerate("1122")]
        (tmp_path / "t.csv").write_text("".join(rows), encoding="utf-8")
        data_error(f"columns are separated by {name}, and commas are", "text", tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text(f"a{mark}b,x\nc,x\nc,y\na{mark}b,y\n", encoding="utf-8")
    assert open_data("text", tmp_path / "t.csv").class_names == (f"a{mark}b", "c")


def test_column_of_row_numbers_is_refused(assert_refused: Callable[..., str], tmp_path: Path) -> None:
    """It is what pandas writes before the label, with a header that begins with a comma."""
    rows = "".join(f"{number},{number % 2},text\n" for number in range(40))
    flags = ("--data.source", "text", "--data.path", "t.csv", "--clients", "2")
    (tmp_path / "t.csv").write_text(",label,text\n" + rows, encoding="utf-8")
    assert "a column of row numbers" in assert_refused("no label in line 1", *flags)
    (tmp_path / "t.csv").write_text(rows, encoding="utf-8")
    assert_refused("t: every row has a class of its own", *flags)
    h5 = write_h5(tmp_path / "d.h5", x=random_images(40, 1, 4, 4), y=np.arange(40))
    assert_refused("every row has a class of", "--data.source", "hdf5", "--data.path", h5, "--clients", "2")


def test_rows_without_a_label_are_refused_with_their_lines(
    assert_refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = ['a,"x\ny"', ",x", "b,x", " ,x", "a,x", "b,x"] + [",x"] * 12
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    flags = ("--data.source", "text", "--data.path", "t.csv")
    assert_refused(r"t\.csv: no label in line 3, 5, 8, 9, 10, 11, 12, 13, 14, 15 and 4 more", *flags)
    (tmp_path / "classes.txt").write_text("a\nb\n", encoding="utf-8")
    assert_refused("no label in line 3, 5", *flags)


def test_similar_labels_are_reported_once(session: Session, tmp_path: Path) -> None:
    """The two stay two classes; so do those of image folders and HDF5 files."""
    labels = ["SPORT", "sport", "news", "Sport "]
    (tmp_path / "t.csv").write_text("".join(f"{label},x\n" for label in labels * 20), encoding="utf-8")
    flags = ("--data.source", "text", "--data.path", "t.csv", "--clients", "2", "--dry")
    result = session("run", *flags, cwd=tmp_path)
    assert result.code == 0 and "4 classes" in result.out
    assert re.findall("warning: .*: ('.*) are two", result.err) == [
        "'SPORT' and 'Sport'",
        "'SPORT' and 'sport'",
    ]
    (tmp_path / "t.csv").write_text("01,x\n1,x\n2,x\n", encoding="utf-8")
    assert "'01' and '1' are two" in open_data("text", tmp_path / "t.csv").warnings[0]
    (tmp_path / "t.csv").write_text("good,x\nNaN,x\ngood,x\n", encoding="utf-8")
    assert "'NaN' is a class" in open_data("text", tmp_path / "t.csv").warnings[0]
    images = write_image_folder(tmp_path / "images", {"Cat": 2, "cat": 2, "dog": 2})
    assert ["'Cat' and 'cat'" in text for text in open_data("folder", images).warnings] == [True]
    h5 = write_h5(tmp_path / "d.h5", x=random_images(4, 1, 4, 4), y=[0, 1, 0, 1], class_names=["Cat", "cat "])
    assert ["'Cat' and 'cat '" in text for text in open_data("hdf5", h5).warnings] == [True]


def test_names_of_classes_are_unambiguous(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,a\n2,b\n", encoding="utf-8")
    for content, pattern in (("one\n\ntwo\n", "no name"), ("one\none\n", "the name 'one' again")):
        (tmp_path / "classes.txt").write_text(content, encoding="utf-8")
        data_error(rf"classes\.txt, line 2: {pattern}", "text", tmp_path / "t.csv")
    (tmp_path / "classes.txt").write_text(
        "0\n1\n2\n\n", encoding="utf-8"
    )  # 2 is the third name, not the second
    (tmp_path / "t.csv").write_text("2,a\n1,b\n0,b\n", encoding="utf-8")
    assert open_data("text", tmp_path / "t.csv").labels.tolist() == [2, 1, 0]
    (tmp_path / "t.csv").write_text("3,a\n1,b\n0,b\n", encoding="utf-8")
    data_error("line 1: unknown label '3'", "text", tmp_path / "t.csv")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "t.csv").write_text(f"{'9' * 5000},a\nb,b\n{'9' * 5000},b\n", encoding="utf-8")
    assert open_data("text", tmp_path / "t.csv").classes == 2


def test_long_rows_take_little_memory(tmp_path: Path) -> None:
    """A row of 300 MB and one with an open quote are refused after their first 16 million characters."""
    book, line, quote = (tmp_path / name for name in ("book.csv", "line.csv", "quote.csv"))
    book.write_text(f'1,"{"word, " * 1_500_000}"\n2,two\n', encoding="utf-8")
    line.write_text("1,a\n2,", encoding="utf-8")
    os.truncate(line, 300 << 20)
    quote.write_text('1,"a\n' + "2,b\n" * 5_000_000, encoding="utf-8")
    messages = read_messages("text", [book, line, quote])
    assert messages[book] == ""
    for path, number in ((line, 2), (quote, 1)):
        assert f"line {number}: this row has more than 16,777,216 characters" in messages[path]
        assert "remedy: close a quote" in messages[path]


def test_labels_must_fit_their_names(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,a\n2,b\n4,c\n")
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    data_error("line 3: unknown label '4'(.|\n)*one, two, three", "text", tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("1,a\n2,b\n")
    message = data_error("no row has the class 'three' of .*classes.txt", "text", tmp_path / "t.csv")
    assert "label all rows by names" in message
    (tmp_path / "t.csv").write_text("1,a\n3,b\n")
    data_error("no row has the class 'two'", "text", tmp_path / "t.csv")
    data_error("cannot be read", "text", tmp_path)


def test_characters_are_tokens(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,Ab\n2,b a\n" * 2)
    assert all_rows(open_data("text", tmp_path / "t.csv", length=4, tokens="char")).tolist()[:2] == [
        [2, 4, 0, 0],
        [4, 1, 3, 0],
    ]
