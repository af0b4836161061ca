"""Names of clients and classes, from the data and the split to everything that a user reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi import load_client, load_run
from pfedmoe_mpi.errors import CheckpointError, DataError
from support.data_files import write_h5
from support.launcher import Session, read_events
from support.report_runs import read_table

CLIENTS = ("[red]north", "south", "Österreich")
CLASSES = ("cat", "dog", "ship")
MODELS = ("--model.pool", "mlp4,mlp5", "--model.shared", "mlp5", "--train.device", "cpu")


@pytest.fixture(scope="module")
def run(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of named clients and classes, with what its commands printed."""
    folder = tmp_path_factory.mktemp("named")
    draw = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = (draw.random((120, 3, 8, 8)) * 150 + y[:, None, None, None] * 50).astype(np.uint8)
    write_h5(folder / "d.h5", x=x, y=y, class_names=[name.encode() for name in CLASSES])
    split = {name: list(range(40 * k, 40 * k + 40)) for k, name in enumerate(CLIENTS)}
    (folder / "s.json").write_text(json.dumps(split), encoding="utf-8")
    data = ("--data.source", "hdf5", "--data.path", "d.h5", "--partition.file", "s.json")
    commands = {
        "map": ("data", "partition", "map.h5", *data),
        "picture": ("data", "partition", "map.png", *data),
        "end": (*data, *MODELS, "--rounds", "2", "--run.dir", "run"),
        "evaluate": ("evaluate", "run/checkpoints/round-000002.h5"),
        "export": ("export", "run/checkpoints/round-000002.h5", "south.h5", "--client", "1"),
        "report": ("report", "run", "--models", "false"),
        "fedavg": (*data, "--algorithm", "fedavg", *MODELS[2:], "--rounds", "1", "--run.dir", "fedavg"),
    }
    for name, words in commands.items():
        result = session(*words, cwd=folder)
        assert result.code == 0, result.err
        (folder / f"{name}.txt").write_text(result.out, encoding="utf-8")
    return folder / "run"


def printed(run: Path, command: str) -> str:
    return (run.parent / f"{command}.txt").read_text(encoding="utf-8")


def test_names_are_printed(run: Path) -> None:
    lines = printed(run, "map").splitlines()
    assert [line.rpartition("|  ")[2] for line in lines[1:4]] == list(CLIENTS)
    assert lines[4] == "classes: 0 cat, 1 dog, 2 ship"
    table = printed(run, "end")
    assert all(name in table for name in CLIENTS), "brackets are not markup"
    assert "macro-F1" in table and "worst tenth of the clients" in table and "24 test samples" in table
    assert [line.rpartition("  ")[2] for line in printed(run, "evaluate").splitlines()[1:4]] == list(CLIENTS)


def test_names_are_recorded(run: Path) -> None:
    start = read_events(run)[0]
    assert start["class_names"] == list(CLASSES) and start["client_names"] == list(CLIENTS)
    found = load_run(run)
    assert [row["name"] for row in found.client_rows[:3]] == list(CLIENTS)
    assert found.names.class_of(1) == "dog" and found.names.client(2) == "Österreich"
    assert found.model(0).classes == CLASSES and load_client(run.parent / "south.h5").classes == CLASSES


def test_names_are_in_reports(run: Path) -> None:
    report = run / "report"
    page = (report / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("[red]north", *CLASSES))
    assert [row["class"] for row in read_table(report, "alpha_class")] == ["0", "1", "2"]
    assert [row["name"] for row in read_table(report, "alpha_class")] == list(CLASSES)
    assert {"cat", "dog", "ship"} <= set(read_table(report, "partition")[0])
    assert [row["name"] for row in read_table(report, "client_metrics")] == list(CLIENTS)


def test_mistakes_are_those_of_the_last_evaluation(run: Path) -> None:
    found = load_run(run)
    assert found.confusion and found.confusion.round == 2
    mistakes = read_table(run / "report", "mistakes")
    assert mistakes
    for row in mistakes:
        client = int(row["client"])
        counts = found.confusion.client(client)
        wrong = counts - np.diag(np.diag(counts))
        place = CLASSES.index(row["class"]), CLASSES.index(row["taken for"])
        assert wrong[place] == wrong.max() == int(row["rows"]) and counts[place[0]].sum() == int(
            row["of the class"]
        )
        assert float(row["accuracy"]) == found.last["clients"]["accuracy"][client]


def test_test_rows_and_gate_weights_are_those_of_the_evaluation(run: Path) -> None:
    found = load_run(run)
    for client in range(3):
        rows, model = found.test_rows(client), found.model(client)
        assert set(rows.rows) <= set(range(40 * client, 40 * client + 40)) and len(rows.rows) == 8
        right = model.predict(rows.x).argmax(1).numpy() == rows.y
        assert right.mean() == found.last["clients"]["accuracy"][client]
        weights = model.weights(rows.x)
        assert weights.shape == (8, 2) and np.allclose(weights.sum(1), 1)
        assert float(weights[:, 0].mean()) == pytest.approx(found.last["clients"]["alpha"][client], rel=1e-5)
    with pytest.raises(CheckpointError, match="no client 3"):
        found.test_rows(3)
    without = load_run(run.parent / "fedavg").model(0)
    with pytest.raises(DataError, match="fedavg has no gate"):
        without.weights(rows.x)
