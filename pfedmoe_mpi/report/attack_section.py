"""What attacks on the run's checkpoints reached, from the files that the command `attack` left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.drawing import WIDTH, Figure, Paint, is_narrow
from pfedmoe_mpi.report.load import Run, RunFolderError
from pfedmoe_mpi.report.tables import Cell, Column, Table, number, percent, word
from pfedmoe_mpi.storage import untrusted_json

FOLDER = "attacks"
MOST_FIGURES = 8
REMEDY = "remove this file, or repeat the command attack"


def sections(run: Run) -> list[Section]:
    """Return the section on attacks, none without their files.

    Raises:
        RunFolderError: a file is damaged.
    """
    files = sorted((run.path / FOLDER).glob("*.json"))
    results = [_read(path) for path in files]
    if not results:
        return []
    tables, figures = [], []
    try:
        by_kind = [[r for r in results if r["kind"] == kind] for kind in ("membership", "reconstruction")]
        tables = [make(found) for make, found in zip((_members, _images), by_kind, strict=True) if found]
        shown = [result for result in by_kind[1] if result["images"]][:MOST_FIGURES]
        figures = [_figure(result, place) for place, result in enumerate(shown)]
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{run.path / FOLDER} has a file that is not the result of an attack"
        raise RunFolderError(problem, REMEDY) from error
    return [Section("Attacks", tables, figures)]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        result = untrusted_json.parse(path.read_text(encoding="utf-8"), "it")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}", REMEDY) from error
    if not isinstance(result, dict):
        raise RunFolderError(f"{path} is not the result of an attack", REMEDY)
    return result


def _members(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return what membership attacks reached on all clients' models together, and on the shared part."""
    columns = [Column("round"), Column("models", words=True), Column("members"), Column("others")]
    columns += [Column("AUC"), Column("95 % interval", ("low", "high")), Column("balanced accuracy, %")]
    columns += [Column("found at 0.1 % FPR, %"), Column("found at 1 % FPR, %")]
    rows = []
    for result in results:
        clients, shared = result["clients"], result["shared"]
        found = {"of the clients": clients["pooled"]}
        found |= _ratio("of the clients", clients)
        if "reason" not in shared:
            name = f"shared: {shared['part']}"
            found |= {name: shared, **_ratio(name, shared)}
        for name, row in found.items():
            if "reason" in row:
                continue
            low, high = row["auc_interval"] or (None, None)
            text = "–" if low is None else f"{low:.3f} to {high:.3f}"
            tpr = [row["tpr"][rate] for rate in ("0.001", "0.01")]
            rows.append(
                [
                    *(number(result["round"]), word(name), number(row["members"]), number(row["others"])),
                    *(number(row["auc"], "{:.3f}"), Cell(text, (low, high))),
                    percent(row["balanced_accuracy"]),
                    *(percent(each and each["rate"]) for each in tpr),
                ]
            )
    notes = [
        "members: training rows, others: test rows; AUC 0.5, balanced accuracy 50 %: no better than guessing",
        "found: share of the members that score above all but this share of the others; dash: too few others",
    ]
    rows = [row for place, row in enumerate(rows) if row not in rows[:place]]  # by loss, with all shadow runs
    return Table("attacks_membership", "Which rows were trained on", columns, rows, notes)


def _ratio(name: str, found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the likelihood ratio beside an attack by loss, if there is one."""
    ratio = found.get("likelihood_ratio")
    return {f"{name}, likelihood ratio of {ratio['shadows']} shadow runs": ratio} if ratio else {}


def _images(results: Sequence[Mapping[str, Any]]) -> Table:
    columns = [Column("round"), Column("client"), Column("part", words=True), Column("samples")]
    columns += [Column("contributions"), Column("steps")]
    columns += [Column("protection", words=True), Column("guess", words=True)]
    columns += [Column("MSE"), Column("PSNR, dB"), Column("SSIM")]
    rows = []
    for result in results:
        names = {"attack": "reconstruction", "mean": "mean of test rows", "guess": "drawn test rows"}
        for key, name in names.items():
            row = result[key]
            rows.append(
                [
                    *(number(result["round"]), number(result["client"]), word(result["part"])),
                    *(number(result[each]) for each in ("samples", "trials", "steps")),
                    *(word(result["protection"]), word(name)),
                    *(number(row["mse"], "{:.5f}"), number(row["psnr"], "{:.1f}")),
                    number(row["ssim"], "{:.3f}"),
                ]
            )
    notes = [
        "values in 0 to 1; means over the contributions attacked, each of one step with so many samples; "
        "steps: of the descent that rebuilds them"
    ]
    return Table("attacks_reconstruction", "Samples rebuilt from a contribution", columns, rows, notes)


def _figure(result: Mapping[str, Any], place: int) -> Figure:
    """Draw true images above the reconstructed ones."""
    pairs = [(_picture(pair["true"]), _picture(pair["found"])) for pair in result["images"]]

    def draw(canvas: Any, paint: Paint) -> None:
        most = 4 if is_narrow(canvas) else 8
        grid = canvas.subplots(2, max(4, min(most, len(pairs))), squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for column, pair in zip(grid.T, pairs, strict=False):
            for axes, picture, name in zip(column, pair, ("true", "rebuilt"), strict=True):
                axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="none")
                axes.set_title(name, fontsize=7, loc="left")

    caption = (
        f"True images (above) and what was rebuilt from a contribution of client {result['client']} after "
        f"round {result['round']}, {result['samples']} sample(s) in the step; protection: "
        f"{result['protection']}."
    )
    title = f"Rebuilt images, protection: {result['protection']}"
    return Figure(f"attack_{place}", title, caption, draw, (WIDTH, 2.4))


def _picture(image: Any) -> np.ndarray:
    """Return an image (H, W) or (H, W, 3) of 0 to 255."""
    table = np.array(image, np.uint8)
    return table.transpose(1, 2, 0) if len(table) == 3 else table[0]
