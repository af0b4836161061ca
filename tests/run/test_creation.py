"""Run folders that are created at once, or killed while they are created: all commands agree on them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.run import place
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.storage.lock import Lock
from support.launcher import (
    SMALL_RUN,
    Result,
    Session,
    checkpoint_digest,
    clean_environment,
    error_message,
    read_events,
    read_metrics,
)
from support.paths import with_support


def killed_folders(work: Path, *arguments: str) -> list[Path]:
    """Return a run folder for every step of its creation, killed before that step."""
    work.mkdir()
    subprocess.run(
        [sys.executable, "-m", "support.killed_creation", *arguments],
        cwd=work,
        env=with_support(clean_environment("mpich", {})),
        check=True,
        timeout=240,
        capture_output=True,
    )
    return [work / str(number) / "new" for number in range(1, 1 + len(list(work.iterdir())))]


def contents(path: Path) -> list[str]:
    return sorted(str(below.relative_to(path)) for below in path.rglob("*"))


@pytest.mark.parametrize("start", ["run", "restart"])
def test_killed_creation_leaves_one_way_to_continue(
    session: Session, run: Path, tmp_path: Path, start: str
) -> None:
    """Either the same command works again, or `restart` does, to the bits of an undisturbed run."""
    again = SMALL_RUN
    if start == "restart":
        older = str(run / "checkpoints" / "round-000002.h5")
        again = ("restart", older, "--train.lr", "0.01", "--rounds", "3")
    rounds = 1 if start == "run" else 3
    assert session(*again, "--run.dir", "whole", cwd=tmp_path).code == 0
    expected = checkpoint_digest(tmp_path / "whole", rounds)
    seen: set[bool] = set()
    states: set[tuple[str, ...]] = set()
    for path in killed_folders(tmp_path / "killed", *again):
        state = tuple(contents(path))
        if state in states:
            continue
        states.add(state)
        copy = path.with_name("copy")
        if path.exists():
            shutil.copytree(path, copy)
            report = session("report", "new", "--text", "true", cwd=path.parent)
            rows = path / "metrics.jsonl"
            if (path / "config.toml").exists() and rows.exists() and rows.stat().st_size:
                assert report.code == 0 and "unfinished: 2 of 3 rounds" in report.out
            else:
                error_message(report, "new is not a run folder|the run new has no finished round")
            error_message(session("inspect", "new", cwd=path.parent), "is a folder")
        restarted = session("restart", "new", cwd=path.parent)
        repeated = session(*again, "--run.dir", "copy", cwd=path.parent)
        assert (restarted.code == 0) != (repeated.code == 0), (state, restarted.err, repeated.err)
        seen.add(restarted.code == 0)
        if restarted.code == 0:
            error_message(repeated, "exists already(.|\n)*`restart ")
            forced = session(*SMALL_RUN, "--run.dir", "copy", "--run.force", "true", cwd=path.parent)
            assert forced.code == 0 and "the earlier run folder is now" in forced.out, (state, forced.err)
        elif path.exists() and state:
            error_message(restarted, "not a run folder yet(.|\n)*repeat the command that started it")
        result = path if restarted.code == 0 else copy
        assert checkpoint_digest(result, rounds) == expected, state
        assert [row["round"] for row in read_metrics(result)] == list(range(1, rounds + 1))
    assert seen == {True, False} and len(states) > 5, states


def test_force_uses_a_folder_whose_start_was_killed(session: Session, tmp_path: Path) -> None:
    half = tmp_path / "half"
    for name in ("log", "checkpoints"):
        (half / name).mkdir(parents=True)
    for name in (".lock", ".config.toml.tmp", "log/rank-0000.txt", "checkpoints/.round-000002.h5.tmp"):
        (half / name).write_text("")
    assert session(*SMALL_RUN, "--run.dir", "half", "--run.force", "true", cwd=tmp_path).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["half"], "there was nothing to rename"
    assert not (half / ".config.toml.tmp").exists()


def test_fork_may_use_a_folder_that_it_left_before_its_first_checkpoint(tmp_path: Path) -> None:
    """It has no config.toml then; its frozen tensors are written before, and a wide job logs by host."""
    left = tmp_path / "left"
    for name in ("log/rank-0000.txt", "log/node-0000.txt", "frozen/12ab.h5", "frozen/.12ab.h5.7.tmp"):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_text("")
        assert not place.holds_anything(left), name
    (left / "log" / "notes.txt").write_text("")
    assert place.holds_anything(left)


def test_rest_of_a_run_is_neither_resumed_nor_overwritten(
    assert_refused: Callable[..., str], session: Session, run: Path, tmp_path: Path
) -> None:
    """Without its configuration and checkpoints a run is lost, but its metrics are still there."""
    (run / "config.toml").unlink()
    shutil.rmtree(run / "checkpoints")
    assert_refused("neither checkpoints nor config.toml", "restart", "run")
    message = assert_refused("neither checkpoints nor config.toml", *SMALL_RUN, "--run.dir", "run")
    assert "`restart" not in message and "--run.force true renames it" in message
    assert session(*SMALL_RUN, "--run.dir", "run", "--run.force", "true", cwd=tmp_path).code == 0
    assert len(read_metrics(tmp_path / "run.old")) == 3


# Started together


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both choose the same name before either has created it."""
    monkeypatch.chdir(tmp_path)
    names = [place.default("pfedmoe")] * 3
    made = []
    for name in names:
        with RunFolder(name) as new:
            made.append(new.create(False, "rounds = 1\n", numbered=True))
            assert new.path == made[-1] and (new.path / "config.toml").exists()
    assert [path.name for path in made] == [names[0].name + end for end in ("", "-2", "-3")]


def test_run_folder_that_was_taken_meanwhile_is_numbered(session: Session, tmp_path: Path) -> None:
    """The second run starts while the name is free; its clock stands still."""
    frozen = "import datetime as d; import pfedmoe_mpi.run.place as f; "
    frozen += "f.datetime = type('Clock', (), {'now': staticmethod(lambda: d.datetime(2026, 1, 2))}); "
    frozen += "import sys; from pfedmoe_mpi.cli import main; sys.exit(main(sys.argv[1:]))"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", frozen, *SMALL_RUN],
            cwd=tmp_path,
            env=clean_environment("mpich", {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, out + err
    runs = sorted((tmp_path / "runs").iterdir())
    assert [path.name for path in runs] == ["pfedmoe-20260102-000000", "pfedmoe-20260102-000000-2"]
    assert all(len(read_metrics(path)) == 1 for path in runs)


def test_lock_of_a_renamed_folder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One `--run.force true` has opened the lock when another renames the folder and locks a new one."""
    path, others = tmp_path / "run", []
    path.mkdir()

    def renamed_meanwhile(self: Lock) -> bool:
        monkeypatch.undo()
        path.rename(tmp_path / "run.old")
        path.mkdir()
        others.append(Lock(path / ".lock", 0.0))
        return self._try_lock()

    monkeypatch.setattr(Lock, "_try_lock", renamed_meanwhile)
    with pytest.raises(BlockingIOError):
        Lock(path / ".lock", 0.0)
    others[0].release()
    Lock(path / ".lock", 0.0).release()


def test_earlier_folder_is_locked_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "run", []
    path.mkdir()
    (path / "config.toml").write_text("rounds = 1\n")
    lock = RunFolder.lock

    def checked(self: RunFolder, patience: float | None = None) -> None:
        if (tmp_path / "run.old").exists() and not seen:
            with pytest.raises(BlockingIOError):
                Lock(tmp_path / "run.old" / ".lock", 0.0)
            seen.append(self.path)
        lock(self, patience)

    monkeypatch.setattr(RunFolder, "lock", checked)
    with RunFolder(path) as new:
        new.create(True, "rounds = 2\n")
        with pytest.raises(ConfigError, match="in use"):
            RunFolder(path).create(True, "rounds = 3\n")
    Lock(tmp_path / "run.old" / ".lock", 0.0).release()
    assert seen[0] == path and (path / "config.toml").read_text() == "rounds = 2\n"


# Folders that are missing at a restart


@pytest.mark.parametrize("missing", ["log", "checkpoints"])
def test_missing_subfolders_are_made_again(
    run_command: Callable[..., Result], run: Path, missing: str
) -> None:
    shutil.rmtree(run / missing)
    run_command("restart", "run", "--rounds", "4")
    assert len(read_metrics(run)) == 4 and (run / "log" / "rank-0000.txt").stat().st_size
    assert read_events(run)[-1]["event"] == "finish" and (run / "checkpoints" / "round-000004.h5").exists()
