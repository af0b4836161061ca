"""Clients' numbers by round, packed into columns, and their files in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi.storage import columns, measured
from pfedmoe_mpi.storage.columns import ClientColumns, Column
from pfedmoe_mpi.storage.untrusted_json import UnusableError

MANY = 3  # clients: a round of them fills a file here


def row(number: int, accuracy: list[float], samples: list[int]) -> dict[str, Any]:
    """Return a round's row with two columns; NaN is a client that was not measured."""
    found = {"accuracy": Column.of(np.array(accuracy, float)), "samples": Column(None, np.array(samples))}
    return {"round": number, "clients": ClientColumns(len(accuracy), found)}


def test_only_what_was_measured_is_stored() -> None:
    nan = float("nan")
    rows = [row(1, [nan] * 3, [5, 6, 7]), row(2, [0.5, nan, 0.25], [5, 6, 7]), row(3, [1, 0, 1], [5, 6, 8])]
    packed = columns.pack(rows)
    assert packed and packed.columns == [("accuracy", False), ("samples", True)]
    assert packed.entries.tolist() == [[1, 1, 3], [2, 0, 2], [3, 0, 3], [3, 1, 3]], "samples of round 1"
    assert packed.clients.tolist() == [0, 2] and len(packed.values) == 11
    found = packed.by_round(3, [1, 2, 3])
    assert [found[r["round"]] for r in rows] == [r["clients"] for r in rows]
    assert found[1]["accuracy"] == [None] * 3 and found[2]["accuracy"] == [0.5, None, 0.25]
    assert found[2]["samples"] == [5, 6, 7] and type(found[3]["samples"][0]) is int
    assert np.array_equal(found[2].array("accuracy"), [0.5, nan, 0.25], equal_nan=True)


def test_rounds_are_appended_and_full_files_followed_by_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file left by a kill, and a column of a round that has no row yet, change nothing."""
    monkeypatch.setattr(measured, "FULL", MANY)
    folder, history = tmp_path / "measured", []
    for number in range(1, 5):
        accuracy = np.full(MANY, np.nan if number == 3 else 0.5 / number).tolist()
        history.append(row(number, accuracy, [2] * MANY))
        measured.append(folder, history)
    assert sorted(path.name for path in folder.iterdir()) == ["000001.h5", "000002.h5", "000004.h5"]
    (folder / ".000004.h5.tmp").write_bytes(b"half")
    found = measured.read(folder, [1, 2, 3])
    assert [*found] == [1, 2, 3] and found[2].array("accuracy").tolist() == [0.25] * MANY
    assert not found[3].column("accuracy").values.size and found[3].array("samples").sum() == 2 * MANY
    assert measured.holds(folder, history)
    measured.rewrite(folder, history[:1])
    assert [path.name for path in folder.glob("*.h5")] == ["000001.h5"]
    assert [*measured.read(folder, [1])] == [1] and not measured.holds(folder, history[1:2])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    measured.append(tmp_path, [row(1, [0.5, 1.0], [3, 4])])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(UnusableError, match=r"000001\.h5"):
            measured.read(tmp_path, [1])
