"""Whether the tables of a run folder, which reports read, say what its last checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pfedmoe_mpi.federation import metrics
from pfedmoe_mpi.run.folder import RunFolder
from pfedmoe_mpi.storage import measured, untrusted_json
from pfedmoe_mpi.storage.columns import ClientColumns, has_columns, without_columns
from pfedmoe_mpi.storage.untrusted_json import UnusableError

Rows = Sequence[Mapping[str, Any]]
MOST = 10  # differences that are named


def differences(folder: RunFolder, history: Rows) -> list[str]:
    """Return what differs in metrics.jsonl and the clients' numbers from a history, at most `MOST` texts.

    Times, memory and what MPI moved are not compared. A run that has not finished may lack its last row.
    """
    try:
        rows = [row for row in untrusted_json.read_lines(folder.metrics) if isinstance(row, dict)]
        numbers = measured.read(folder.measured, [row["round"] for row in history if has_columns(row)])
    except (UnusableError, OSError) as error:
        return [f"a file that cannot be read: {error}"]
    found = []
    for recorded in history:
        round = recorded["round"]
        same = [row for row in rows if row.get("round") == round]
        if not same and (folder.finished or round < len(history)):
            found.append(f"round {round}, which is missing")
        elif same:
            names = [name for row in same for name in _unlike_row(recorded, row)]
            names += _unlike_columns(recorded, numbers.get(round))
            found += [f"round {round}: {', '.join(dict.fromkeys(names))}"] if names else []
    return [*found[:MOST], "…"] if len(found) > MOST else found


def _unlike_row(recorded: Mapping[str, Any], row: dict[str, Any]) -> list[str]:
    """Return the names whose values differ in a row of metrics.jsonl."""
    before, now = metrics.learning(dict(without_columns(recorded))), metrics.learning(row)
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def _unlike_columns(recorded: Mapping[str, Any], numbers: ClientColumns | None) -> list[str]:
    """Return the names whose values differ in the clients' numbers of a round."""
    if not has_columns(recorded):
        return []
    known: ClientColumns = recorded["clients"]
    nothing = np.full(known.clients, np.nan)

    def values(columns: ClientColumns | None, name: str) -> np.ndarray:
        return columns.array(name) if columns is not None and name in columns else nothing

    return [
        f"{name} by client"
        for name in sorted({*known, *(numbers or ())})
        if not np.array_equal(values(known, name), values(numbers, name), equal_nan=True)
    ]
