"""Results of PFLlib and HtFLlib beside runs: which files are read, what the table shows, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from support.launcher import Result
from support.report_runs import read_table, same_number


def write_result(path: Path, accuracy: object, **others: object) -> Path:
    """Write a file as `save_results` of both programs does; HtFLlib leaves the training losses empty."""
    with h5py.File(path, "w") as file:
        file.create_dataset("rs_test_acc", data=accuracy)
        for name, values in {"rs_test_auc": accuracy, "rs_train_loss": [], **others}.items():
            file.create_dataset(name, data=values)
    return path


def test_results_of_equal_name_are_runs_of_one_setting(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    files = [
        write_result(tmp_path / f"Cifar10_FedProto_test_{n}.h5", [0.1, 0.5 + n / 10, 0.4]) for n in range(2)
    ]
    run_command("report", "run", *files, "--out", "both")
    theirs, ours = read_table(tmp_path / "both", "peers")
    assert (theirs["run"], theirs["runs"]) == ("Cifar10_FedProto_test", "2")
    assert same_number(theirs["last mean"], 0.4) and same_number(theirs["last std"], 0)
    assert same_number(theirs["best mean"], 0.55)
    assert same_number(theirs["best std"], float(np.std([0.5, 0.6], ddof=1)))
    assert ours["program"] == "pfedmoe_mpi" and ours["run"].startswith("pfedmoe")
    last = run_command("evaluate", "run/checkpoints/round-000003.h5").out.splitlines()[-1]
    assert f"weighted {float(ours['last mean']):.4f}" in last
    assert "Results of other programs" not in run_command("report", "run", "--text").out


def test_only_results_of_one_folder_and_length_are_pooled(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    name = "Cifar10_FedProto_test"
    values = {"one/{}_0": [0.1, 0.5], "one/{}_1": [0.1, 0.7], "one/{}_2": [0.1], "two/{}_0": [0.1, 0.9]}
    files = [write_result(tmp_path / f"{path.format(name)}.h5", each) for path, each in values.items()]
    run_command("report", "run", *(file.relative_to(tmp_path) for file in files), "--out", "both")
    *theirs, ours = read_table(tmp_path / "both", "peers")
    found = [(row["run"], row["runs"], row["measurements"], float(row["last mean"])) for row in theirs]
    one, two = f"one/{name}", f"two/{name}"
    assert found == [(one, "2", "2", pytest.approx(0.6)), (one, "1", "1", 0.1), (two, "1", "2", 0.9)]
    assert ours["measurements"] == "2", "the run was measured in rounds 2 and 3"


def test_result_named_twice_is_refused(assert_refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    file = write_result(tmp_path / "Cifar10_FedProto_test_0.h5", [0.5])
    (tmp_path / "link.h5").symlink_to(file)
    for again in (file, file.name, "link.h5"):
        assert_refused(f"{again} is named twice", "report", "run", file, again, "--text")


@pytest.mark.parametrize(
    ("accuracy", "pattern"),
    [
        ([1, 2], "rs_test_acc is int64"),
        ([], "of shape \\(0,\\)"),
        ([0.5, 1.5], "other numbers than shares"),
        ([0.5, float("nan")], "other numbers than shares"),
        ([[0.5]], "of shape \\(1, 1\\)"),
    ],
)
def test_unusable_results_are_refused(
    assert_refused: Callable[..., str], run: Path, tmp_path: Path, accuracy: list[float], pattern: str
) -> None:
    file = write_result(tmp_path / "Cifar10_FedProto_test_0.h5", accuracy)
    assert_refused(pattern, "report", "run", file)


def test_other_files_are_refused(assert_refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    assert_refused("it has no rs_test_acc", "report", "run", "run/checkpoints/best.h5")
    file = write_result(tmp_path / "result.h5", [0.5])
    assert_refused("no run of this one is named", "report", file)
    file.write_bytes(file.read_bytes()[:100])
    assert_refused("not a result file of PFLlib or HtFLlib", "report", "run", file)
