"""The command `report`: read runs, then print the report or write its page, figures and tables."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from pfedmoe_mpi import environment
from pfedmoe_mpi.errors import EXIT_DONE, UserError
from pfedmoe_mpi.names import check_reachable
from pfedmoe_mpi.report import comparison_report, drawing, page, run_report, selection_section, terminal
from pfedmoe_mpi.report.compare import CompareError
from pfedmoe_mpi.report.document import Report
from pfedmoe_mpi.report.load import Run, load_runs, selection
from pfedmoe_mpi.report.model_views import ModelViews
from pfedmoe_mpi.report.tables import to_csv, to_latex
from pfedmoe_mpi.storage import peer_results
from pfedmoe_mpi.storage.peer_results import PeerResult

FIGURES, TABLES = {".png", ".pdf"}, {".csv", ".tex"}  # suffixes of the files
UNFINISHED = f".{page.NAME}.tmp"  # name of the page while its report is being written
REQUIRED = ("matplotlib", "jinja2")  # packages of a report with figures


class ReportError(UserError):
    """A report that cannot be written with these flags."""


def run(
    folders: Sequence[str], out: str, text: bool, baseline: str, target: str, models: bool, select: str = ""
) -> int:
    """Report on one run, or on several side by side.

    Args:
        models: evaluate the models of a single run too.
        select: the round whose accuracies are reported, one of `load.SELECT`; default: the best on validation
            rows if all runs have some, else the last.

    Raises:
        UserError: a folder is not a run folder, a file is not another program's result, the runs cannot be
            compared, `out` holds something else, or a package is missing; nothing was written.
    """
    target_share = _share(target)
    files = [Path(path) for path in folders if path.endswith(".h5") and Path(path).is_file()]
    peers = _peers(files)
    if len(files) == len(folders):
        problem = f"{files[0]} is a result of another program, and no run of this one is named"
        raise ReportError(problem, f"name a run to show beside it: report runs/NAME {files[0]}")
    paths = [Path(folder) for folder in folders if Path(folder) not in files]
    runs, notes = load_runs(paths)
    runs = [replace(run, select=_selection(runs, select)) for run in runs]
    if len(runs) == 1 and baseline:
        raise CompareError(
            f"--baseline = {baseline} needs at least two runs to compare, not one",
            "name the baseline's run folders too, or remove --baseline",
        )
    if text:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        report = selection_section.with_choices(_report(runs, peers, baseline, target_share, notes), paths)
        print(terminal.text(report, width))
        return EXIT_DONE
    missing = [name for name in REQUIRED if not find_spec(name)]
    if missing:
        remedy = "pip install 'pfedmoe_mpi[report]', or print the report with --text true"
        raise ReportError(f"a report with figures needs {' and '.join(missing)}", remedy)
    folder = Path(out or (runs[0].path / "report" if len(runs) == 1 and not peers else "report"))
    _check_folder(folder)
    report = _report(runs, peers, baseline, target_share, notes, models)
    report = selection_section.with_choices(report, paths)
    for note in report.notes:
        print(f"note: {note}")
    _write(report, folder)
    print(f"wrote {folder / page.NAME}, {len(report.figures)} figures and {len(report.tables)} tables")
    return EXIT_DONE


def _peers(files: Sequence[Path]) -> list[PeerResult]:
    """Read other programs' results.

    Raises:
        ReportError: a file is named twice.
        PeerResultError: a file is not one of them.
    """
    resolved = [path.resolve() for path in files]
    for number, path in enumerate(files):
        if resolved[number] in resolved[:number]:
            raise ReportError(f"{path} is named twice", "name each result once")
    return [peer_results.read(path) for path in files]


def _report(
    runs: Sequence[Run],
    peers: Sequence[PeerResult],
    baseline: str,
    target: float | None,
    notes: Sequence[str],
    models: bool = False,
) -> Report:
    if len(runs) == 1 and not peers:
        report = run_report.report(runs[0], target, _model_views(runs[0]) if models else "")
    else:
        report = comparison_report.report(runs, baseline, target, peers)
    return replace(report, notes=[*report.notes, *notes])


def _model_views(run: Run) -> ModelViews | str:
    """Return the run's evaluated models, or the sentence that says why they were not evaluated."""
    if not find_spec("torch"):
        return "The models were not evaluated: torch is not installed."
    if environment.launched_size(os.environ) > 1:  # MPI would wait for ranks that have ended
        return "The models were not evaluated: report runs on one rank; start it without mpirun."
    from pfedmoe_mpi.report import probe

    print("evaluating the models; --models false skips this", file=sys.stderr, flush=True)
    try:
        return probe.view_models(run)
    except UserError as error:
        return f"The models were not evaluated: {error.problem}."


def _selection(runs: Sequence[Run], select: str) -> str:
    """Return which round is reported: that of `select`, else by what all runs have.

    Raises:
        ReportError: validation rows are to choose, and a run has none.
    """
    without = next((run for run in runs if not run.chosen), None)
    if select == "validation" and without:
        problem = f"--select = validation, but {without.path} has no accuracy on validation rows"
        raise ReportError(problem, "report the last round of all runs: --select last")
    return select or selection(runs)


def _share(target: str) -> float | None:
    """Return the target accuracy as a number in (0, 1], None without one."""
    if not target:
        return None
    try:
        value = float(target)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise ReportError(
            f"--target = {target}: an accuracy is above 0 and at most 1", "--target 0.9 for 90 %"
        )
    return value


def _check_folder(folder: Path) -> None:
    """Accept a new or empty folder, or one with an earlier report, which is replaced.

    Raises:
        ReportError: the path is a file or cannot be reached or written, or the folder holds other files.
    """
    check_reachable(folder, ReportError)
    if folder.exists() and not folder.is_dir():
        raise ReportError(f"--out = {folder} is a file", "name a folder: --out FOLDER")
    has_report = any((folder / name).is_file() for name in (page.NAME, UNFINISHED))
    if folder.is_dir() and any(folder.iterdir()) and not has_report:
        problem = f"--out = {folder} holds files that are not a report"
        raise ReportError(problem, "name another folder: --out FOLDER")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        TemporaryFile(dir=existing).close()  # before the models are evaluated; the run may be another user's
    except OSError as error:
        problem = f"{existing} cannot be written: {error.strerror}"
        raise ReportError(problem, "name another folder: --out FOLDER") from error


def _write(report: Report, folder: Path) -> None:
    """Write page, figures and tables.

    The page gets its final name last, so a folder that has it holds a complete report. Until then the page is
    called UNFINISHED, which marks the folder as a report's.
    """
    html = page.html(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).write_text(html, encoding="utf-8")
        (folder / page.NAME).unlink(missing_ok=True)
        for name in ("figures", "tables"):
            (folder / name).mkdir(exist_ok=True)
        for figure in report.figures:
            drawing.save(figure, folder / "figures")
        for table in report.tables:
            (folder / "tables" / f"{table.name}.csv").write_text(to_csv(table), encoding="utf-8")
            (folder / "tables" / f"{table.name}.tex").write_text(to_latex(table), encoding="utf-8")
        _remove_stale(folder, report)
        os.replace(folder / UNFINISHED, folder / page.NAME)
    except OSError as error:
        raise ReportError(f"cannot write the report: {error}", "name another folder: --out FOLDER") from error


def _remove_stale(folder: Path, report: Report) -> None:
    """Remove figures and tables of an earlier report that this one does not have."""
    kept: Mapping[str, tuple[set[str], set[str]]] = {
        "figures": ({figure.name for figure in report.figures}, FIGURES),
        "tables": ({table.name for table in report.tables}, TABLES),
    }
    for subfolder, (names, suffixes) in kept.items():
        for path in (folder / subfolder).iterdir():
            if path.suffix in suffixes and path.stem not in names:
                path.unlink()
