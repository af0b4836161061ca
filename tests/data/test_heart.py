"""Hospitals as clients: missing values, natural clients, AUC, and bad files."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.data.sources.heart import ATTRIBUTES
from pfedmoe_mpi.federation import build, effective, plan
from pfedmoe_mpi.federation.evaluation import auc
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.federation.metrics import learning
from support.data_files import all_rows, data_error, open_data, shared_data
from support.launcher import Result, Session, error_message, read_metrics
from support.small_federation import shared_comm
from support.text_files import HEADER, HOSPITALS, assert_restart_keeps_bits, write_hospitals

FLAGS = ("--data.source", "heart", "--rounds", "2", "--model.dim", "16", "--train.device", "cpu")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hospitals(tmp_path_factory.mktemp("hospitals"))


def settings(folder: Path, **changes: Any) -> config.Config:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    small = {"data.source": "heart", "data.path": str(folder), "rounds": 2, "model.dim": 16}
    return config.build({**small, "train.device": "cpu", "train.threads": 1, **dotted})


def loop_of(folder: Path, **changes: Any) -> Loop:
    return Loop(
        shared_comm(), build.build(shared_comm(), settings(folder, **changes)), SilentObserver(), None
    )


# What a client sees


def test_columns_are_numeric_or_one_hot(hospitals: Path) -> None:
    data = open_data("heart", hospitals)
    x = all_rows(data)
    assert data.shape == (22,) and data.class_names == ("healthy", "sick")
    assert data.client is not None and np.bincount(data.client).tolist() == list(HOSPITALS.values())
    alpha = np.loadtxt(hospitals / "processed.alpha.data", delimiter=",", skiprows=1)
    assert np.array_equal(data.labels[:48], alpha[:, -1] > 0)
    columns = []
    for values, codes in zip(alpha.T, ATTRIBUTES.values(), strict=False):
        columns += [values == code for code in codes] or [values]
    assert np.array_equal(x[:48], np.stack(columns, 1).astype(np.float32))


@pytest.mark.parametrize("missing", ["-9", "-9.0", ""])
def test_missing_values_have_four_spellings(hospitals: Path, tmp_path: Path, missing: str) -> None:
    for path in hospitals.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("?", missing))
    first, second = all_rows(open_data("heart", hospitals)), all_rows(open_data("heart", tmp_path))
    assert np.isnan(first).any() and np.array_equal(first, second, equal_nan=True)


def test_imputation_and_scale_use_own_training_rows(hospitals: Path) -> None:
    """Computed anew for every client and column, from its training rows and nothing else."""
    data = open_data("heart", hospitals)
    raw = all_rows(data).astype(float)
    partition = plan.draw_partition(effective.apply_proposals(settings(hospitals), data), data)
    x = all_rows(data.fitted(partition))
    assert np.isnan(raw).any() and not np.isnan(x).any()
    starts = np.cumsum([0, *(max(1, len(codes)) for codes in ATTRIBUTES.values())])
    for k in range(3):
        train, test = partition.train[k], partition.test[k]
        for start, codes in zip(starts, ATTRIBUTES.values(), strict=False):
            held = raw[train, start][~np.isnan(raw[train, start])]
            known = raw[train][~np.isnan(raw[train, start])]
            for place in range(max(1, len(codes))):
                column, fill = raw[:, start + place].copy(), 0.0
                if not len(held):
                    assert not x[np.r_[train, test], start + place].any()
                    continue
                if codes:
                    fill = float(known[:, start : start + len(codes)].sum(axis=0).argmax() == place)
                else:
                    fill = float(np.median(held))
                column[np.isnan(column)] = fill
                spread = column[train].std()
                expected = (column - column[train].mean()) / spread if spread else 0 * column
                np.testing.assert_allclose(
                    x[np.r_[train, test], start + place], expected[np.r_[train, test]], 1e-5, 1e-6
                )


def test_imputation_ignores_test_rows_and_other_clients(hospitals: Path, tmp_path: Path) -> None:
    """One test patient and one other hospital changed: all other samples stay the same, bit for bit."""
    data = open_data("heart", hospitals)
    partition = plan.draw_partition(effective.apply_proposals(settings(hospitals), data), data)
    before = all_rows(data.fitted(partition))
    other = write_hospitals(tmp_path / "other")
    path = other / "processed.alpha.data"
    lines = path.read_text().splitlines()
    changed = int(partition.test[0][0])
    lines[1 + changed] = "99," + lines[1 + changed].partition(",")[2]
    path.write_text("\n".join(lines))
    path = other / "processed.beta.data"
    path.write_text(
        "\n".join("9" + line if line[0] != "?" else line for line in path.read_text().splitlines())
    )
    after = all_rows(open_data("heart", other).fitted(partition))
    same = np.r_[0:changed, changed + 1 : 48, 88:124]
    assert np.array_equal(before[same], after[same])
    assert not np.array_equal(before[changed], after[changed]) and not np.array_equal(
        before[48:88], after[48:88]
    )


# Who is a client


def test_hospitals_are_the_default_clients(hospitals: Path) -> None:
    made = loop_of(hospitals).federation.config
    assert (made.partition.kind, made.clients, made.train.lr) == ("natural", 3, 0.005)
    made = loop_of(hospitals, partition__kind="iid", clients=5, train__lr=0.05).federation.config
    assert (made.partition.kind, made.clients, made.train.lr) == ("iid", 5, 0.05)


def test_plan_names_the_hospitals(run_command: Callable[..., Result], hospitals: Path) -> None:
    said = run_command(*FLAGS, "--data.path", hospitals, "--dry", "true").out
    assert "0 alpha, 1 beta, 2 gamma" in said
    assert "proposed by the data: partition.kind = natural, clients = 3, train.lr = 0.005" in said
    dealt = run_command(*FLAGS, "--data.path", hospitals, "--dry", "true", "--partition.kind", "iid").out
    assert "0 alpha" not in dealt, "no client is a hospital"


def test_wrong_number_of_clients_is_refused(assert_refused: Callable[..., str], hospitals: Path) -> None:
    assert_refused(
        "clients = 7, but the data have 3 natural clients", *FLAGS, "--data.path", hospitals, "--clients", "7"
    )
    assert_refused("unseen.clients = 3 leaves", *FLAGS, "--data.path", hospitals, "--unseen.clients", "3")


# AUC


def test_auc_is_the_share_of_ordered_pairs() -> None:
    draw = np.random.default_rng(1)
    for size in (2, 7, 40):
        labels = np.r_[0, 1, draw.integers(0, 2, size - 2)]
        scores = draw.integers(0, 5, size).astype(np.float32)  # with ties
        pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
        assert auc(scores, labels) == sum(pairs) / len(pairs)
        order = draw.permutation(size)
        assert auc(scores[order], labels[order]) == auc(scores, labels)
    assert np.isnan(auc(np.ones(3), np.ones(3))) and np.isnan(auc(np.array([np.nan, 1]), np.array([0, 1])))


def test_auc_of_every_client_equals_scikit_learn(hospitals: Path) -> None:
    """AUC equals scikit-learn's, from the logits of the client's own predictions."""
    metrics = pytest.importorskip("sklearn.metrics")
    loop = loop_of(hospitals, eval__batch=3)
    loop.run()
    federation, row = loop.federation, loop.history[-1]
    for k, client in federation.clients.items():
        parts = federation.workbench.parts(
            (federation.method.state(), loop.state), (client.spec, client.vector)
        )
        for module in parts.modules().values():
            module.eval()
        test = client.splits["test"]
        scores = [
            federation.method.predict(parts, test.x[i : i + 3]).detach() for i in range(0, len(test), 3)
        ]
        scores = np.concatenate([(s[:, 1] - s[:, 0]).numpy() for s in scores])
        assert row["clients"]["auc"][k] == pytest.approx(metrics.roc_auc_score(test.y.numpy(), scores))
    assert row["auc"]["mean"] == pytest.approx(np.mean(row["clients"]["auc"]))
    assert row["auc"]["worst"] == min(row["clients"]["auc"])


def test_auc_needs_two_classes(trained: Path) -> None:
    for row in read_metrics(trained):
        assert row["auc"] == dict.fromkeys(("mean", "weighted", "std", "worst"))
        assert row["clients"]["auc"] == [None] * 4


# Methods, ranks, commands


@pytest.mark.parametrize("method", methods.names())
def test_every_method_trains_on_hospitals(hospitals: Path, method: str) -> None:
    loop = loop_of(hospitals, algorithm=method, rounds=1)
    assert loop.run()
    row = learning(loop.history[-1])
    assert not row["dropped"] and None not in row["clients"]["auc"]


def test_ranks_and_restart_keep_the_bits_on_hospitals(
    run_command: Callable[..., Result], session: Session, hospitals: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--data.path", str(hospitals))
    newest = assert_restart_keeps_bits(run_command, flags, tmp_path)
    evaluated = run_command("evaluate", newest, "--json", "true").out
    assert f'"auc": {read_metrics(tmp_path / "half")[-1]["clients"]["auc"]}' in evaluated
    run_command("export", newest, "--client", "1", "beta.h5")
    with h5py.File(tmp_path / "beta.h5") as file:
        assert file["model/extractor.fc1.weight"].shape[1] == 22
    error_message(
        session("data", "prepare", "x.h5", *flags[:2], *flags[-2:], cwd=tmp_path), "cannot be prepared before"
    )
    assert not (tmp_path / "x.h5").exists()
    assert "  " in run_command("data", "partition", "p.h5", *flags[:2], *flags[-2:]).out


def test_report_shows_the_auc(session: Session, tmp_path: Path, hospitals: Path) -> None:
    pytest.importorskip("jinja2")
    flags = (*FLAGS, "--data.path", str(hospitals), "--run.dir", "run")
    assert session(*flags, cwd=tmp_path).code == 0
    assert session("report", "run", "--models", "false", cwd=tmp_path).code == 0
    with open(tmp_path / "run" / "report" / "tables" / "clients.csv", encoding="utf-8", newline="") as file:
        shown = {int(row["client"]): (row["name"], float(row["AUC"])) for row in csv.DictReader(file)}
    auc = read_metrics(tmp_path / "run")[-1]["clients"]["auc"]
    names = [path.name.split(".")[1] for path in sorted(hospitals.glob("*.data"))]
    assert shown == dict(enumerate(zip(names, auc, strict=True)))
    assert session(*flags[:-1], "alone", "--algorithm", "standalone", cwd=tmp_path).code == 0
    assert session("report", "run", "alone", "--out", "both", cwd=tmp_path).code == 0
    with open(tmp_path / "both" / "tables" / "accuracies.csv", encoding="utf-8", newline="") as file:
        compared = {row["method"]: float(row["AUC mean"]) for row in csv.DictReader(file)}
    for method, folder in (("pfedmoe", "run"), ("standalone", "alone")):
        assert compared[method] == pytest.approx(read_metrics(tmp_path / folder)[-1]["auc"]["mean"])


def test_four_real_hospitals_are_read(run_command: Callable[..., Result]) -> None:
    data = open_data("heart", shared_data("heart-disease"))
    assert data.client_names == ("cleveland", "hungarian", "switzerland", "va")
    assert data.client is not None and np.bincount(data.client).tolist() == [303, 294, 123, 200]
    assert np.bincount(data.client[data.labels == 0]).tolist() == [164, 188, 8, 51]


# Bad files

GOOD = "63,1,1,145,233,1,2,150,0,2.3,3,0,6,0"


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", "processed.a.data is empty"),
        (HEADER + "\n", "no patient"),
        (f"{GOOD}\n{GOOD},1\n", "line 2 has 15 values, expected 14"),
        (f"{GOOD}\n{',' * 10_000_000}", "line 2 has 4098 values, expected 14"),
        (f"{HEADER}\n{GOOD}\n\nold{GOOD}\n", "line 4: age 'old63' is not a number"),
        (f"{GOOD}\n{GOOD.replace('145', 'nan')}\n", "line 2: trestbps 'nan' is not a number"),
        (GOOD[:-1] + "5\n", "line 1: target '5' is not a label"),
        (GOOD[:-1] + "?\n", r"line 1: target '\?' is not a label"),
        (GOOD.replace("1,1,145", "1,9,145"), "line 1: cp = 9 is not a code(.|\n)*one of 1, 2, 3, 4"),
        (f"{GOOD}\n{GOOD}\n", "hold one class only"),
        (f"{GOOD}\n".encode() + b"63,\xe9", "line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_bad_heart_file_is_reported_with_its_line(tmp_path: Path, content: str | bytes, pattern: str) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / "processed.a.data").write_bytes(raw)
    data_error(pattern, "heart", tmp_path)


def test_two_files_of_one_hospital_are_refused(hospitals: Path, tmp_path: Path) -> None:
    """Two copies would be two clients that share every patient."""
    shutil.copytree(hospitals, tmp_path / "copy")
    shutil.copy(hospitals / "processed.alpha.data", tmp_path / "copy" / "processed.alpha.old.data")
    pattern = "processed.alpha.data and processed.alpha.old.data in .* are both hospital alpha\n"
    data_error(pattern, "heart", tmp_path / "copy")


def test_folder_without_hospitals_is_refused(
    tmp_path: Path, hospitals: Path, assert_refused: Callable[..., str]
) -> None:
    assert_refused("has no file processed.HOSPITAL.data", *FLAGS, "--data.path", tmp_path)
    assert_refused("data.source = heart .* data.path is empty", *FLAGS)
    assert_refused(
        "data.mean and data.std do not apply",
        *FLAGS,
        "--data.path",
        hospitals,
        "--data.mean",
        "1",
        "--data.std",
        "1",
    )
