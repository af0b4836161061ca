"""Short runs of several methods, settings and seeds, and readers of the reports on them."""

from __future__ import annotations

import csv
import html
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.report.load import Run
from support.launcher import SMALL_RUN, Session, read_events, read_metrics

SEEDS = (0, 1, 2, 3, 4)
TWO_SEEDS = (0, 1)
# (method, Dirichlet's concentration, seeds)
RUNS = (
    *(("pfedmoe", 1.0, SEEDS), ("standalone", 1.0, SEEDS), ("fedavg", 1.0, TWO_SEEDS)),
    *(("pfedmoe", 0.3, TWO_SEEDS), ("standalone", 0.3, TWO_SEEDS)),
)
FLAGS = (*SMALL_RUN, "--rounds", "4", "--participation", "0.75", "--faults.dropout", "0.25")


def make_runs(session: Session, folder: Path) -> Path:
    """Train each of RUNS in folder/runs/METHOD-CONCENTRATION-SEED and return folder/runs."""
    for method, alpha, seeds in RUNS:
        pool = "mlp5" if method == "fedavg" else "mlp5,mlp4"
        for seed in seeds:
            name = f"runs/{method}-{alpha}-{seed}"
            which = ("--algorithm", method, "--partition.alpha", str(alpha), "--seed", str(seed))
            result = session(*FLAGS, *which, "--model.pool", pool, "--run.dir", name, cwd=folder)
            assert result.code == 0, result.err
            add_class_counts(folder / name)
    return folder / "runs"


def add_class_counts(run: Path) -> None:
    """Add class counts to the start event where the run did not record them."""
    lines = read_events(run)
    if "class_counts" not in lines[0]:
        counts = class_counts(run)
        lines[0] |= {"class_counts": counts.tolist()}
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def class_counts(run: Path) -> np.ndarray:
    """Return training rows by client and class, (N, classes), from a checkpoint and the data's labels."""
    from pfedmoe_mpi import config
    from pfedmoe_mpi.data.sources.open import open_dataset

    settings = config.build(config.read_toml(run / "config.toml"))
    labels = open_dataset(settings.data, settings.seed, clients=settings.clients).labels
    with h5py.File(sorted((run / "checkpoints").glob("round-*.h5"))[-1]) as file:
        rows, offsets = file["partition/train"][()], file["partition/train_offsets"][()]
    parts = [labels[rows[a:b]] for a, b in pairwise(offsets)]
    return np.array([np.bincount(part, minlength=10) for part in parts])


def like(run: Run, path: str, **changes: Any) -> Run:
    """Return the same run under other settings; `__` stands for the dot."""
    config = {**run.config, **{name.replace("__", "."): value for name, value in changes.items()}}
    return Run(Path(path), config, run.history, run.events)


def read_table(report: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV table by heading."""
    with open(report / "tables" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def page_table(report: Path, name: str) -> list[list[tuple[str, str]]]:
    """Return (text, CSS classes) of each cell of a table on the page."""
    page = (report / "report.html").read_text(encoding="utf-8")
    body = page.partition(f'<table id="table-{name}">')[2].partition("</table>")[0].partition("<tbody>")[2]
    cell = re.compile(r'<td class="([^"]*)"><span>(.*?)</span></td>', re.S)
    return [
        [(html.unescape(text), kind) for kind, text in cell.findall(row)] for row in body.split("<tr>")[1:]
    ]


def same_number(text: str, value: float | None) -> bool:
    """Return whether a CSV cell equals a number to the last digits; an empty cell equals None."""
    if value is None or not text:
        return value is None and not text
    return bool(np.isclose(float(text), value, rtol=1e-12, atol=1e-15))


def metrics_by_seed(runs: Path, method: str, alpha: float) -> dict[int, list[dict[str, Any]]]:
    """Return {seed: rows} of a group."""
    found = {}
    for path in runs.glob(f"{method}-{alpha}-*"):
        found[int(path.name.rpartition("-")[2])] = read_metrics(path)
    return dict(sorted(found.items()))


def traffic(history: list[dict[str, Any]]) -> np.ndarray:
    """Return (rounds, 3): bytes up, down and once of all cohort members."""
    found, met = [], set()
    for row in history:
        members = len(row["cohort"])
        summed = members - len(row["dropped"]) - len(row["lost"]) - len(row["late"])
        new = set(row["cohort"]) - met
        met |= new
        sent = row["bytes"]
        found.append(((sent["up"] or 0) * summed, (sent["down"] or 0) * members, sent["once"] * len(new)))
    return np.array(found, float)


def operations(run: Path) -> np.ndarray:
    """Return the floating-point operations of each round's training."""
    recorded = read_events(run)[0]["operations"]
    each = [recorded["kinds"][kind]["epoch"] for kind in recorded["clients"]]
    assert min(each) > 1e4, "one epoch a round, and nothing besides"
    return np.array(
        [sum(each[k] * row["clients"]["samples"][k] for k in row["cohort"]) for row in read_metrics(run)]
    )


def reached(history: list[dict[str, Any]], target: float) -> int | None:
    """Return the index of the first row that reaches the target."""
    there = np.flatnonzero([row["accuracy"]["mean"] >= target for row in history])
    return int(there[0]) if len(there) else None
