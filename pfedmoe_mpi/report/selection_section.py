"""How settings were chosen on validation rows, from the record in `selected.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pfedmoe_mpi.report.compare import STD_OVER_SEEDS, mean_std
from pfedmoe_mpi.report.document import Report, Section
from pfedmoe_mpi.report.load import CHOICE, RunFolderError
from pfedmoe_mpi.report.tables import BEST, SPREAD, Cell, Column, Table, spread, word


def with_choices(report: Report, folders: Sequence[Path]) -> Report:
    """Return a report with a section and a note on each folder whose runs have settings that were chosen.

    Raises:
        RunFolderError: a record is damaged.
    """
    files = [folder / CHOICE for folder in folders if (folder / CHOICE).is_file()]
    tables = [_table(file, number) for number, file in enumerate(files)]
    if not tables:
        return report
    notes = [
        f"settings were chosen on validation rows of other seeds; their runs are in {file.parent / 'grid'}"
        for file in files
    ]
    section = Section("Settings chosen on validation rows", tables)
    return replace(report, sections=[*report.sections, section], notes=[*report.notes, *notes])


def _table(file: Path, number: int) -> Table:
    """Return the candidates of every choice, the chosen one in bold."""
    columns = [Column("choice", words=True), Column("candidate", words=True), Column("seeds", words=True)]
    columns.append(Column("accuracy on validation rows, %", SPREAD))
    try:
        records = tomllib.loads(file.read_text(encoding="utf-8"))["chosen"]
        rows = [_row(record, candidate) for record in records for candidate in record["candidates"]]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}", _remedy(file)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{file} does not say how its settings were chosen", _remedy(file)) from error
    notes = [
        f"in the best round of each run on these rows; {STD_OVER_SEEDS}; chosen: in bold",
        "dash: a run diverged, so this candidate was not chosen",
    ]
    return Table(f"selection{number or ''}", "Settings chosen on validation rows", columns, rows, notes)


def _row(record: dict[str, Any], candidate: dict[str, Any]) -> list[Cell]:
    values, name = [float(value) for value in candidate["accuracies"]], str(candidate["candidate"])
    finite = [value for value in values if 0 <= value <= 1]
    mean, std = mean_std(values) if len(finite) == len(values) else (None, None)
    mark = BEST if name == record["candidate"] else ""
    seeds = ", ".join(str(seed) for seed in record["seeds"])
    return [word(record["choice"]), word(name), word(seeds), spread(mean, std, len(values), mark)]


def _remedy(file: Path) -> str:
    return f"repeat the command that wrote it, or name the runs: pfedmoe-mpi report {file.parent}/fresh"
