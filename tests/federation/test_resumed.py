"""A restart copies no vectors: they stay in the checkpoints until their clients train."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.run import old_checkpoints
from pfedmoe_mpi.run.identity import run_identity
from support.files import flip_bit
from support.small_federation import shared_comm

CLIENTS = 20


class KeepsOne(SilentObserver):
    """An observer that keeps the newest checkpoint, and whether each one was complete."""

    def __init__(self) -> None:
        self.complete: list[bool] = []

    def written(self, path: Path, history: object, candidate: bool) -> None:
        old_checkpoints.remove(path.parent, path.parent / "best.h5", 1, path)
        self.complete.append(not checkpoint.files_needed(path))


def loop_of(folder: Path, rounds: int, memory: float | str = "auto") -> Loop:
    """Return a federation of which one client trains per round, with a checkpoint of every round."""
    chosen = {
        **{"clients": CLIENTS, "participation": 0.05, "rounds": rounds, "run.checkpoint_every": 1},
        "eval.every": rounds,
        **{"data.source": "synthetic", "data.samples": 400, "data.size": 8, "train.epochs": 1},
        **{"model.pool": ["mlp5", "mlp4"], "model.shared": "mlp5", "model.dim": 12, "gate.hidden": 8},
        **{"run.checkpoint_minutes": 0.0, "train.device": "cpu", "train.threads": 1, "run.memory": memory},
    }
    federation = build(shared_comm(), config.build(chosen), warn=False)
    folder.mkdir(exist_ok=True)
    loop = Loop(shared_comm(), federation, KeepsOne(), folder)
    loop.saver.identity = run_identity(federation)
    return loop


def removed(file: Path) -> str:
    """Return the path of an open file that was removed, empty if it is still there."""
    try:
        target = os.readlink(file)
    except OSError:  # it was open while the folder was read
        return ""
    return target if target.endswith("(deleted)") and "round-" in target else ""


def newest(folder: Path) -> Path:
    path = checkpoint.newest_first(folder)[0]
    checkpoint.verify(path)
    return path


def test_vectors_stay_in_checkpoints_until_clients_train(tmp_path: Path) -> None:
    whole, first = loop_of(tmp_path / "whole", 24), loop_of(tmp_path / "run", 10)
    assert whole.run() and first.run()
    path = newest(tmp_path / "run")
    assert checkpoint.files_needed(path), "it relies on earlier files"
    again = loop_of(tmp_path / "run", 24, memory=0.0)
    store, observer = again.federation.store, again._observer
    with Checkpoint(path) as loaded:
        again.resume(loaded)
        assert store._bytes == store._file._end == 0 and sorted(store.relied) == loaded.trained
    left = [len(store.relied)]
    while not again.finished:
        assert again.run_round()
        left.append(len(store.relied))
    assert isinstance(observer, KeepsOne)
    assert {True, False} <= {*observer.complete}, "the earlier files were needed for a while, and removed"
    assert 0 < left[-1] < left[0] and not path.exists()
    assert not [file for file in Path("/dev/fd").iterdir() if str(tmp_path) in removed(file)], "closed"
    assert again.state.numpy().tobytes() == whole.state.numpy().tobytes()
    for client in range(CLIENTS):
        assert np.array_equal(store.values(client), whole.federation.store.values(client))


def test_fork_reads_one_vector_after_the_other_and_then_needs_its_run_no_more(tmp_path: Path) -> None:
    assert loop_of(tmp_path / "run", 10).run()
    fork = loop_of(tmp_path / "fork", 12, memory=0.0)
    store = fork.federation.store
    path = newest(tmp_path / "run")
    with Checkpoint(path) as loaded:
        fork.fork(loaded)
        assert store._bytes == store._file._end == 0 and sorted(store.relied) == loaded.trained
        fork.save()
        assert store._bytes == store._file._end == 0, "no vector is kept"
        first = newest(tmp_path / "fork")
        assert not checkpoint.files_needed(first) and checkpoint.files_needed(path)
        with Checkpoint(first) as own:
            assert own.trained == loaded.trained
            assert all(np.array_equal(own.vector(k), loaded.vector(k)) for k in own.trained)
    shutil.rmtree(tmp_path / "run")
    assert fork.run() and fork.round == 12


def test_vector_that_has_changed_since_the_restart_ends_the_job(tmp_path: Path) -> None:
    """In the checkpoint itself, and in a file on which it relies."""
    assert loop_of(tmp_path, 10).run()
    loop = loop_of(tmp_path, 10)
    with Checkpoint(newest(tmp_path)) as loaded:
        loop.resume(loaded)
        held = next(client for client in loaded.trained if client in loaded._held)
        other = next(client for client in loaded.trained if client not in loaded._held)
        places = loaded.places
        for client in (held, other):
            row = places.find(client)
            flip_bit(tmp_path / places.files[row["file"]], int(row["offset"]) + 9)
            with pytest.raises(OSError, match=f"the bytes of clients/{client:06d} have changed"):
                loop.federation.store.get(client)
