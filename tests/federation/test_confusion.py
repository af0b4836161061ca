"""Macro-F1, balanced accuracy, the worst tenth of the clients, and confusion matrices in checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.checkpoint.confusion import NAMES, Confusion, read
from pfedmoe_mpi.federation.confusion import balanced_accuracy, macro_f1, matrix
from pfedmoe_mpi.federation.metrics import MOST_COUNTS, EvaluationSum, worst_tenth
from pfedmoe_mpi.storage.untrusted_json import UnusableError
from support.launcher import SMALL_RUN, Session, checkpoint_digest, read_metrics, run_to_end


def test_metrics_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    for classes in (2, 3, 10):
        for rows in (1, 2, 5, 40):
            labels, answers = draw.integers(0, classes, (2, rows))
            assert macro_f1(labels, answers) == pytest.approx(f1_score(labels, answers, average="macro"))
            recalls = [np.mean(answers[labels == c] == c) for c in np.unique(labels)]
            assert balanced_accuracy(labels, answers) == pytest.approx(np.mean(recalls))
            if set(answers) <= set(labels) and len(set(labels)) > 1:
                assert balanced_accuracy(labels, answers) == balanced_accuracy_score(labels, answers)
            expected = confusion_matrix(labels, answers, labels=range(classes))
            assert np.array_equal(matrix(labels, answers, classes), expected)
    nothing = np.empty(0, np.int64)
    assert np.isnan(macro_f1(nothing, nothing)) and np.isnan(balanced_accuracy(nothing, nothing))


def test_worst_tenth_is_at_least_one_client() -> None:
    assert worst_tenth(np.array([0.5, np.nan, 0.25])) == 0.25
    assert worst_tenth(np.arange(20) / 100) == pytest.approx(0.005)
    assert worst_tenth(np.empty(0)) is None and worst_tenth(np.array([np.nan])) is None


def test_matrices_are_left_out_where_nobody_is_measured_or_there_are_too_many() -> None:
    assert EvaluationSum(4, 2, 10).confusion is not None
    assert EvaluationSum(4, 2, 10, np.array([1, 3])).confusion.shape == (2, 10, 10)
    assert EvaluationSum(4, 2, 10, np.empty(0, np.int64)).confusion is None
    assert EvaluationSum(MOST_COUNTS // 100 + 1, 2, 10).confusion is None


def test_checkpoints_hold_the_matrices_of_the_last_evaluation(session: Session, tmp_path: Path) -> None:
    """Through a restart after a round without an evaluation, on any number of ranks."""
    flags = (*SMALL_RUN, "--rounds", "4", "--eval.every", "2", "--run.checkpoint_every", "1")
    kept = ("--run.keep", "4", "--partition.validation", "0.2")
    run_to_end(2, *flags, *kept, "--run.dir", "two", cwd=tmp_path)
    files = [tmp_path / "two" / "checkpoints" / f"round-00000{n}.h5" for n in (1, 2, 3, 4)]
    first, *others = (matrices(file) for file in files)
    assert first is None and [found.round for found in others if found] == [2, 2, 4]
    restarted = session("restart", str(files[2]), "--run.dir", "one", cwd=tmp_path)
    assert restarted.code == 0, restarted.err
    for n in (3, 4):
        one, two = matrices(tmp_path / "one" / "checkpoints" / f"round-00000{n}.h5"), others[n - 2]
        assert one and two and one.round == two.round
        assert np.array_equal(one.place, two.place) and np.array_equal(one.count, two.count)
    assert checkpoint_digest(tmp_path / "one", 4) == checkpoint_digest(tmp_path / "two", 4)
    clients = read_metrics(tmp_path / "one")[-1]["clients"]
    for client, accuracy in enumerate(clients["accuracy"]):
        counts = one.client(client)
        assert counts.sum() == clients["test_samples"][client]
        assert np.trace(counts) / counts.sum() == pytest.approx(accuracy)


def matrices(path: Path) -> Confusion | None:
    with Checkpoint(path) as loaded:
        return loaded.confusion


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("confusion/shape", [1, 3, 2]),
        ("confusion/shape", [9, 2, 2]),
        ("confusion/shape", [1, 2, 0]),
        ("confusion/shape", [1, 2, 1 << 40]),
        ("confusion/shape", [1, 2]),
        ("confusion/place", [0, 8]),
        ("confusion/place", [-1, 3]),
        ("confusion/place", [3, 3]),
        ("confusion/count", [5, 0]),
        ("confusion/count", [5]),
    ],
)
def test_impossible_matrices_are_refused(name: str, values: list[int]) -> None:
    good = Confusion(1, 2, 2, np.array([0, 7]), np.array([5, 1])).datasets()
    assert read(lambda key: good[key], 2, 1).client(1).tolist() == [[0, 0], [0, 1]]
    bad = {**good, name: np.array(values)}
    assert set(bad) == set(NAMES)
    with pytest.raises(UnusableError):
        read(lambda key: bad[key], 2, 1)
