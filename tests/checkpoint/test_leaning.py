"""Checkpoints that rely on earlier files: read, verified, packed, and refused if what they need is gone."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, Content, opened, pack
from pfedmoe_mpi.checkpoint.places import FILES, ROWS
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation.written import Vectors
from pfedmoe_mpi.run import old_checkpoints
from pfedmoe_mpi.run.folder import RunFolder
from support.checkpoint_checks import sample_content
from support.checkpoint_files import reseal, single_rank
from support.files import flip_bit

SIZES = (5000, 3000, 4000)
CLIENTS = 40


class Writer:
    """A folder of checkpoints, each of which holds what changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = sample_content(clients=CLIENTS, sizes=SIZES, state=10)
        sizes = np.array([4 * layout.size for layout in self.content.client_layouts])
        self.known = Vectors(sizes)
        self.vectors: dict[int, np.ndarray] = {}

    def write(self, round: int, changed: list[int]) -> Path:
        for client in changed:
            size = self.content.client_layouts[client].size
            self.vectors[client] = np.full(size, round + client / 100, np.float32)
        self.known.change(changed)
        path = self.folder / checkpoint.name(round, partial=False)
        rows = [{**self.content.history[0], "round": n + 1} for n in range(round)]
        content = replace(self.content, round=round, history=rows)

        def divide(content: Content) -> Content:
            return self.known.divided(path, content)

        home = [0] * CLIENTS
        written = checkpoint.write(
            single_rank(), path, content, self.vectors.__getitem__, home, divide=divide
        )
        self.known.written(written)
        return path

    def check(self, path: Path) -> None:
        """Check that a checkpoint verifies, and has the vectors of now."""
        for rank in range(3):
            checkpoint.verify(path, rank, 3)
        with Checkpoint(path) as loaded:
            assert loaded.trained == sorted(self.vectors)
            for client, vector in self.vectors.items():
                assert np.array_equal(loaded.vector(client), vector)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """A folder with a complete checkpoint of round 1, and two that rely on it."""
    made = Writer(tmp_path)
    for round, changed in ((1, [*range(0, 30)]), (2, [3, 31]), (3, [4, 3])):
        made.check(made.write(round, changed))
    return made


def test_checkpoint_holds_what_changed(writer: Writer) -> None:
    path = writer.folder / "round-000003.h5"
    assert checkpoint.files_needed(path) == {"round-000001.h5", "round-000002.h5"}
    with Checkpoint(path) as loaded:
        assert sorted(loaded._file["clients"]) == ["000003", "000004"]
        assert not loaded.has_trained(35) and loaded.layout(35).size == SIZES[35 % 3]
    changed = sum(writer.vectors[client].nbytes for client in (3, 4))
    assert path.stat().st_size < changed + 3 * 4096 + 20_000
    complete = writer.write(4, [*range(20)])
    assert checkpoint.files_needed(complete) == set(), "most changed"
    writer.check(complete)


def test_files_that_a_kept_checkpoint_needs_are_not_removed(writer: Writer) -> None:
    """`run.keep` = 1 leaves the newest and the two files that it relies on, until one is complete."""
    newest, best = writer.folder / "round-000003.h5", writer.folder / "best.h5"
    old_checkpoints.remove(writer.folder, best, 1, newest)
    assert len([*writer.folder.glob("round-*.h5")]) == 3
    writer.check(newest)
    complete = writer.write(4, [*range(20)])
    os.link(newest, best)
    old_checkpoints.remove(writer.folder, best, 1, complete)
    assert {path.name for path in writer.folder.glob("round-*.h5")} == {
        *("round-000001.h5", "round-000002.h5", "round-000004.h5"),
    }, "best.h5 relies on the first two"
    checkpoint.verify(best)
    best.unlink()
    old_checkpoints.remove(writer.folder, best, 1, complete)
    assert [*writer.folder.glob("round-*.h5")] == [complete]


def test_nothing_is_removed_while_it_is_unknown_what_is_needed(writer: Writer) -> None:
    best = writer.folder / "best.h5"
    best.symlink_to(best)  # an error of the system, not a missing or damaged file
    complete = writer.write(4, [*range(20)])
    with pytest.raises(OSError, match="symbolic links"):
        old_checkpoints.remove(writer.folder, best, 1, complete)
    assert len([*writer.folder.glob("round-*.h5")]) == 4
    assert len(checkpoint.restart_points(writer.folder)) == 4
    best.unlink()
    best.write_bytes(b"damaged")
    old_checkpoints.remove(writer.folder, best, 1, complete)
    assert [*writer.folder.glob("round-*.h5")] == [complete]


def test_run_killed_before_best_was_complete_is_completed(writer: Writer, tmp_path: Path) -> None:
    """And the files that only best.h5 needed are removed."""
    folder = RunFolder(tmp_path / "run")
    complete = writer.write(4, [*range(20)])
    os.link(writer.folder / "round-000003.h5", writer.folder / "best.h5")
    folder.path.mkdir()
    folder.checkpoints.mkdir()
    for path in writer.folder.glob("*.h5"):
        path.rename(folder.checkpoints / path.name)
    folder.complete([], 1, folder.checkpoints / complete.name)
    assert {path.name for path in folder.checkpoints.iterdir()} == {"best.h5", complete.name}
    checkpoint.verify(folder.best)
    assert folder.best_round() == 3 and folder.finished


def test_dead_bytes_beyond_half_are_compacted(writer: Writer) -> None:
    lengths = []
    for round in range(4, 24):
        path = writer.write(round, [round % 8, 8 + round % 8])
        writer.check(path)
        needed = [writer.folder / name for name in checkpoint.files_needed(path)]
        lengths.append(sum(file.stat().st_size for file in needed))
    whole = sum(vector.nbytes for vector in writer.vectors.values())
    assert 0 in lengths, "a complete one"
    assert max(lengths) < 2.2 * whole


def test_vectors_in_a_file_that_is_replaced_or_gone_are_written_again(writer: Writer) -> None:
    writer.check(writer.write(3, [5]))
    assert checkpoint.files_needed(writer.folder / "round-000003.h5") == {
        "round-000001.h5",
        "round-000002.h5",
    }
    (writer.folder / "round-000002.h5").unlink()
    path = writer.write(4, [6])
    writer.check(path)
    assert "round-000002.h5" not in checkpoint.files_needed(path)


def test_damage_in_a_file_that_is_needed_is_found_by_one_rank(writer: Writer) -> None:
    path = writer.folder / "round-000003.h5"
    with Checkpoint(path) as loaded:
        row = loaded.elsewhere.find(7)
    flip_bit(writer.folder / "round-000001.h5", int(row["offset"]) + 9)
    found = []
    for rank in range(3):
        try:
            checkpoint.verify(path, rank, 3)
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) == 1 and "round-000001.h5, where the bytes of clients/000007 have changed" in found[0]


def test_missing_file_is_named_with_what_helps(writer: Writer, tmp_path: Path) -> None:
    lonely = tmp_path / "elsewhere" / "round-000003.h5"
    lonely.parent.mkdir()
    shutil.copy(writer.folder / "round-000003.h5", lonely)
    with pytest.raises(CheckpointError, match=r"relies on round-00000[12].h5.*cannot be read") as caught:
        checkpoint.verify(lonely)
    assert f"pack {lonely} OUT.h5" in caught.value.remedy
    assert checkpoint.restart_points(lonely.parent) == [] != checkpoint.newest_first(lonely.parent)
    shutil.copytree(writer.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("elsewhere"))
    writer.check(tmp_path / "moved" / "round-000003.h5")


def test_packed_checkpoint_stands_alone(writer: Writer, tmp_path: Path) -> None:
    path, alone = writer.folder / "round-000003.h5", tmp_path / "alone" / "packed.h5"
    alone.parent.mkdir()
    with checkpoint.open_verified(path) as loaded:
        pack.write(loaded, alone)
    writer.check(alone)
    with Checkpoint(path) as before, Checkpoint(alone) as after:
        assert (before.config, before.history, before.identity) == (
            after.config,
            after.history,
            after.identity,
        )
    with pytest.raises(CheckpointError, match="exists already"):
        pack.write(loaded, alone)
    os.link(path, writer.folder / "best.h5")
    pack.replace(writer.folder / "best.h5")
    writer.check(writer.folder / "best.h5")
    assert checkpoint.files_needed(writer.folder / "best.h5") == set() != checkpoint.files_needed(path)


@pytest.mark.parametrize("most", [9, 1])
def test_open_checkpoint_outlives_its_files(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Of those beyond the limit of open files only the open ones do."""
    monkeypatch.setattr(opened, "_most_open", lambda wanted: most)
    path = writer.folder / "round-000003.h5"
    with checkpoint.open_verified(path) as loaded:
        files = [*loaded.elsewhere.files]
        for name in (path.name, *files[:most]):
            (writer.folder / name).unlink()
    for client, vector in writer.vectors.items():
        assert np.array_equal(loaded.vector(client), vector)
    for name in files[most:]:
        (writer.folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"relies on {name} in its folder, which cannot be read"):
            [loaded.vector(client) for client in writer.vectors]


def test_checkpoint_that_is_replaced_while_it_is_opened_is_opened_again(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`best.h5` becomes another name of a newer file, and what the older one needed is removed."""
    best, newer, open_all = (
        writer.folder / "best.h5",
        writer.write(4, [*range(20)]),
        opened.Opened.open_others,
    )
    os.link(writer.folder / "round-000003.h5", best)

    def replaced_meanwhile(files: opened.Opened) -> None:
        if newer.exists():
            newer.rename(best)
            old_checkpoints.remove(writer.folder, best, 0, newer)
        open_all(files)

    monkeypatch.setattr(opened.Opened, "open_others", replaced_meanwhile)
    with checkpoint.open_verified(best) as loaded:
        assert loaded.round == 4 and [*writer.folder.iterdir()] == [best]


def test_what_a_run_has_removed_leads_to_its_newest_checkpoint(writer: Writer) -> None:
    complete = writer.write(4, [*range(20)])
    (writer.folder / "round-000001.h5").unlink()
    with pytest.raises(CheckpointError, match=r"relies on round-000001.h5") as caught:
        checkpoint.verify(writer.folder / "round-000003.h5")
    assert caught.value.remedy == f"use {complete}, with which its run has gone on"
    with pytest.raises(CheckpointError, match="there is no checkpoint") as caught:
        checkpoint.verify(writer.folder / "round-000001.h5")
    assert caught.value.remedy == "check the path; the newest checkpoint there is round-000004.h5"


def test_ranks_read_the_same_file(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has opened `best.h5` after it was replaced, the first time; or always."""
    best, comm, others = writer.folder / "best.h5", single_rank(), [b"newer"]
    os.link(writer.folder / "round-000003.h5", best)
    monkeypatch.setattr(comm, "gather", lambda value, purpose: [value, others.pop() if others else value])
    with checkpoint.open_everywhere(comm, best) as loaded:
        assert loaded.round == 3 and not others
    others = [b"newer"] * 99
    with pytest.raises(CheckpointError, match="is not the same file on all ranks"):
        checkpoint.open_files_everywhere(comm, best)


@pytest.mark.parametrize(
    ("limits", "wanted", "most", "after"),
    [
        ((resource.RLIM_INFINITY,) * 2, 10**6, 10**6, (resource.RLIM_INFINITY,) * 2),
        ((64, 100), 30, 30, (80, 100)),
        ((64, 100), 300, 40, (100, 100)),
        ((64, resource.RLIM_INFINITY), 300, 300, (620, resource.RLIM_INFINITY)),
        ((4, 4), 300, 0, (4, 4)),
    ],
)
def test_half_of_the_files_that_may_be_open_are_left(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: int, most: int, after: tuple[int, int]
) -> None:
    """Of 10 that are open."""
    known = [limits]
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: known.append(pair))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: known[-1])
    monkeypatch.setattr(opened, "_open_now", lambda: 10)
    assert opened._most_open(wanted) == most and known[-1] == after


def changed_rows(**columns: int) -> Callable[[Any], None]:
    """Return an edit that changes fields of the first place."""

    def edit(file: Any) -> None:
        rows = file[ROWS][()]
        for name, value in columns.items():
            rows[name][0] = value
        file[ROWS][...] = rows

    return edit


def names(text: str) -> Callable[[Any], None]:
    """Return an edit that replaces the files' names by as many bytes."""

    def edit(file: Any) -> None:
        file[FILES][()] = text.encode().ljust(file[FILES].dtype.itemsize, b"5")

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        changed_rows(file=2),
        changed_rows(file=-1),
        changed_rows(offset=-4096),
        changed_rows(client=3),
        changed_rows(client=CLIENTS),
        changed_rows(length=4),
        changed_rows(length=1 << 60),
        names("../round-01.h5\nround-000002.h5"),
        names("/etc/passwd"),
        lambda file: file.pop(ROWS),
        lambda file: file.pop(FILES),
    ],
)
def test_crafted_places_are_refused(writer: Writer, edit: Callable[[Any], Any]) -> None:
    path = reseal(writer.folder / "round-000003.h5", edit)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this program|have changed"):
        checkpoint.verify(path)


def test_places_are_plain_hdf5(writer: Writer) -> None:
    """What the format says, read with h5py alone."""
    with h5py.File(writer.folder / "round-000003.h5") as file:
        files = file[FILES][()].decode().split("\n")
        row = next(row for row in file[ROWS] if row["client"] == 31)
    with open(writer.folder / files[row["file"]], "rb") as plain:
        plain.seek(row["offset"])
        assert plain.read(row["length"]) == writer.vectors[31].tobytes()
