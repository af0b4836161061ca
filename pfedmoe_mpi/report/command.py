"""The command `report`: read the runs, then print, or write the page, figures and tables."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from pfedmoe_mpi import environment
from pfedmoe_mpi.errors import EXIT_DONE, UserError
from pfedmoe_mpi.report import comparison_report, drawing, page, run_report, terminal
from pfedmoe_mpi.report.compare import CompareError
from pfedmoe_mpi.report.document import Report
from pfedmoe_mpi.report.load import Run, load_runs
from pfedmoe_mpi.report.model_views import Looked
from pfedmoe_mpi.report.tables import to_csv, to_latex

FIGURES, TABLES = {".png", ".pdf"}, {".csv", ".tex"}
UNFINISHED = f".{page.NAME}.tmp"
NEEDED = ("matplotlib", "jinja2")


class ReportError(UserError):
    """A report that cannot be written as asked."""


def run(folders: Sequence[str], out: str, text: bool, baseline: str, target: str, models: bool) -> int:
    """Report on one run, or on several side by side; `models`: look into those of one run.

    Raises:
        UserError: folders that are no runs, runs that cannot be compared, an output that is in the way, a
            missing package; nothing was written.
    """
    wanted = _share(target)
    runs, left_out = load_runs([Path(folder) for folder in folders])
    if len(runs) == 1 and baseline:
        raise CompareError("one run has nothing to compare with a baseline", "name the baseline's runs too")
    if text:
        wide = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        print(terminal.text(_made(runs, baseline, wanted, left_out), wide))
        return EXIT_DONE
    missing = [name for name in NEEDED if not find_spec(name)]
    if missing:
        remedy = "pip install 'pfedmoe_mpi[report]', or --text true, which needs neither"
        raise ReportError(f"a report with figures needs {' and '.join(missing)}", remedy)
    folder = Path(out or (runs[0].path / "report" if len(runs) == 1 else "report"))
    _refuse_foreign(folder)
    report = _made(runs, baseline, wanted, left_out, models)
    for note in report.notes:
        print(f"note: {note}")
    _write(report, folder)
    print(f"wrote {folder / page.NAME}, {len(report.figures)} figures and {len(report.tables)} tables")
    return EXIT_DONE


def _made(
    runs: Sequence[Run], baseline: str, target: float | None, notes: Sequence[str], models: bool = False
) -> Report:
    if len(runs) == 1:
        made = run_report.report(runs[0], target, _look(runs[0]) if models else "")
    else:
        made = comparison_report.report(runs, baseline, target)
    return replace(made, notes=[*made.notes, *notes])


def _look(run: Run) -> Looked | str:
    """What is in its models, or why that cannot be seen."""
    if not find_spec("torch"):
        return "Nobody looked into the models: torch is not installed here."
    if environment.launched_size(os.environ) > 1:  # MPI would wait for ranks that have ended
        return "Nobody looked into the models: a report is the work of one rank, start it without mpirun."
    from pfedmoe_mpi.report import probe

    print("looking into the models; --models false leaves them out", file=sys.stderr, flush=True)
    try:
        return probe.look(run)
    except UserError as error:
        return f"Nobody looked into the models: {error.problem}."


def _share(target: str) -> float | None:
    if not target:
        return None
    try:
        value = float(target)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise ReportError(f"--target {target}: an accuracy is above 0 and at most 1", "--target 0.9 for 90 %")
    return value


def _refuse_foreign(folder: Path) -> None:
    """An earlier report is replaced, anything else is left alone."""
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"{folder} is a file", "--out takes a folder")
    ours = any((folder / name).is_file() for name in (page.NAME, UNFINISHED))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ReportError(f"{folder} holds something else than a report", "choose another --out")


def _write(report: Report, folder: Path) -> None:
    """Page, figures and tables. The page gets its name last, so that a folder with a page is a whole report;
    until then the folder is known by the page's other name.
    """
    shown = page.html(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).write_text(shown, encoding="utf-8")
        (folder / page.NAME).unlink(missing_ok=True)
        for below in ("figures", "tables"):
            (folder / below).mkdir(exist_ok=True)
        for figure in report.figures:
            drawing.save(figure, folder / "figures")
        for table in report.tables:
            (folder / "tables" / f"{table.name}.csv").write_text(to_csv(table), encoding="utf-8")
            (folder / "tables" / f"{table.name}.tex").write_text(to_latex(table), encoding="utf-8")
        _drop_stale(folder, report)
        os.replace(folder / UNFINISHED, folder / page.NAME)
    except OSError as error:
        raise ReportError(f"the report cannot be written: {error}", "choose another --out") from error


def _drop_stale(folder: Path, report: Report) -> None:
    """An earlier report's figures and tables that this one does not have."""
    kept: Mapping[str, tuple[set[str], set[str]]] = {
        "figures": ({figure.name for figure in report.figures}, FIGURES),
        "tables": ({table.name for table in report.tables}, TABLES),
    }
    for below, (names, endings) in kept.items():
        for path in (folder / below).iterdir():
            if path.suffix in endings and path.stem not in names:
                path.unlink()
