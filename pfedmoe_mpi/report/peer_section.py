"""Results of PFLlib and HtFLlib beside runs of this program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pfedmoe_mpi.report.compare import STD_OVER_SEEDS, Comparison, Group, mean_std, values_of
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import SPREAD, Cell, Column, Table, number, spread, word
from pfedmoe_mpi.storage.peer_results import PeerResult

OURS = "pfedmoe_mpi"


def sections(comparison: Comparison, peers: Sequence[PeerResult]) -> list[Section]:
    """Return the section on other programs' results, none without one."""
    if not peers:
        return []
    columns = [Column(title, words=True) for title in ("program", "run")]
    columns += [Column("runs"), Column("measurements"), Column("last, %", SPREAD), Column("best, %", SPREAD)]
    same: dict[tuple[Path, str, int], list[PeerResult]] = {}
    for peer in peers:
        same.setdefault((peer.path.parent.resolve(), peer.name, len(peer.accuracy)), []).append(peer)
    folders = {name: {folder for folder, other, _ in same if other == name} for _, name, _ in same}
    rows = []
    for (_, name, measured), found in same.items():
        shown = found[0].path.parent / name if len(folders[name]) > 1 else name
        values = [[peer.last for peer in found], [peer.best for peer in found]]
        rows.append([word("PFLlib or HtFLlib"), word(shown), *_cells([measured] * len(found), values)])
    for group in comparison.groups:
        values = [values_of(group.finished, _last), values_of(group.finished, _best)]
        counts = [len(_measured(run)) for run in group.finished]
        rows.append([word(OURS), word(_name(group)), *_cells(counts, values)])
    notes = [
        f"share of all clients' test samples that are right, as those programs measure it; {STD_OVER_SEEDS}",
        "runs: files of one folder, name and number of measurements, of which those programs' first is "
        "before round 1",
        "best: of the rounds measured, chosen on these test samples by both",
        "their files do not hold the settings: `translate` prints this program's command for theirs",
    ]
    return [Section("Other programs", [Table("peers", "Results of other programs", columns, rows, notes)])]


def _cells(measured: Sequence[int], values: Sequence[Sequence[float]]) -> list[Cell]:
    """Return the number of runs, that of their measurements, and the spread of each of `values`."""
    low, high = min(measured, default=0), max(measured, default=0)
    counts = number(low) if low == high else Cell(f"{low} to {high}", (f"{low} to {high}",))
    return [number(len(measured)), counts, *(spread(*mean_std(each), len(each)) for each in values)]


def _name(group: Group) -> str:
    return f"{group.method}, {group.setting}"


def _last(run: Run) -> float | None:
    share = run.last["accuracy"]["weighted"]
    return None if share is None else float(share)


def _best(run: Run) -> float | None:
    return max(_measured(run), default=None)


def _measured(run: Run) -> list[float]:
    """Return the accuracy of each round of its own that was measured."""
    shares = (row["accuracy"]["weighted"] for row in run.history if row["round"] > run.forked)
    return [float(share) for share in shares if share is not None]
