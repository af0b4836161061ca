"""A run folder that is moved, replaced, or reached by a link that is repointed during the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.storage.lock import ReplacedError
from support.files import path_digest
from support.launcher import (
    SMALL_RUN,
    Result,
    checkpoint_digest,
    read_events,
    read_metrics,
    running_job,
    wait_for_end,
    wait_for_file,
)

LONG = (
    *SMALL_RUN,
    "--rounds",
    "4",
    "--train.epochs",
    "60",
    "--run.checkpoint_every",
    "1",
    "--run.dir",
    "link",
)


def test_link_that_is_repointed_does_not_divert_a_run(run: Path, tmp_path: Path) -> None:
    """The other run keeps its files, and this one ends in the folder where it began."""
    link, own, before = tmp_path / "link", tmp_path / "own", path_digest(run)
    own.mkdir()
    link.symlink_to(own)
    with running_job(2, *LONG, "--run.keep", "1", cwd=tmp_path) as job:
        wait_for_file(own / "metrics.jsonl", job)
        link.unlink()
        link.symlink_to(run)
        result = wait_for_end(job, 90)
    assert result.code == 0 and not result.err, result.err
    assert path_digest(run) == before
    assert [row["round"] for row in read_metrics(own)] == [1, 2, 3, 4]
    assert read_events(own)[-1]["event"] == "finish" and checkpoint_digest(own, 4)


def test_link_to_the_checkpoints_is_followed_once(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    """Checkpoints on another disk: the newest is still the run's own, and another run's are not deleted."""
    shutil.copytree(run, tmp_path / "other")
    disk = (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(disk)
    run_command("restart", run / "checkpoints" / "round-000003.h5", "--rounds", "4")
    assert checkpoint_digest(run, 4)
    with RunFolder(run) as folder:
        folder.lock()
        written = folder.checkpoints / "round-000004.h5"
        (run / "checkpoints").unlink()
        (run / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
        before = path_digest(tmp_path / "other")
        folder.keep_newest(1, written)
    assert path_digest(tmp_path / "other") == before
    assert [path.name for path in disk.glob("round-*")] == ["round-000004.h5"]


def test_folder_that_is_replaced_is_left_alone(run: Path, tmp_path: Path) -> None:
    link, before = tmp_path / "link", path_digest(run)
    with running_job(2, *LONG, cwd=tmp_path) as job:
        wait_for_file(link / "metrics.jsonl", job)
        link.rename(tmp_path / "moved")
        run.rename(link)
        result = wait_for_end(job, 90)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    assert f"{link} is another folder now: that of this run was moved or replaced" in result.err
    assert "move the folder back to this path" in result.err
    assert path_digest(link) == before
    assert checkpoint_digest(tmp_path / "moved", 1), "what was written before is whole"


def test_every_write_and_deletion_checks_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(False, "rounds = 1\n")
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "run")
    (folder.checkpoints / "round-000001.h5").touch()
    before = path_digest(tmp_path / "run")
    written = folder.checkpoints / "round-000001.h5"
    for work in (
        lambda: folder.event("start"),
        lambda: folder.append_metrics({}),
        lambda: folder.rewrite_metrics([]),
        lambda: folder.keep_newest(0, written),
        lambda: folder.mark_best(written),
    ):
        with pytest.raises(ReplacedError):
            work()
    assert path_digest(tmp_path / "run") == before
    folder.unlock()
