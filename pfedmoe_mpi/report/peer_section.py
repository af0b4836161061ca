"""Results of PFLlib and HtFLlib beside runs of this program."""

from __future__ import annotations

from collections.abc import Sequence

from pfedmoe_mpi.report.compare import STD_OVER_SEEDS, Comparison, Group, mean_std, values_of
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.tables import SPREAD, Column, Table, number, spread, word
from pfedmoe_mpi.storage.peer_results import PeerResult

OURS = "pfedmoe_mpi"


def sections(comparison: Comparison, peers: Sequence[PeerResult]) -> list[Section]:
    """Return the section on other programs' results, none without one."""
    if not peers:
        return []
    columns = [Column(title, words=True) for title in ("program", "run")]
    columns += [Column("runs"), Column("last, %", SPREAD), Column("best, %", SPREAD)]
    rows = []
    for name in dict.fromkeys(peer.name for peer in peers):
        same = [peer for peer in peers if peer.name == name]
        values = [[peer.last for peer in same], [peer.best for peer in same]]
        cells = [spread(*mean_std(each), len(each)) for each in values]
        rows.append([word("PFLlib or HtFLlib"), word(name), number(len(same)), *cells])
    for group in comparison.groups:
        values = [values_of(group.finished, _last), values_of(group.finished, _best)]
        cells = [spread(*mean_std(each), len(each)) for each in values]
        rows.append([word(OURS), word(_name(group)), number(len(group.finished)), *cells])
    notes = [
        f"share of all clients' test samples that are right, as those programs measure it; {STD_OVER_SEEDS}",
        "best: of the rounds measured, chosen on these test samples by both",
        "their files do not hold the settings: `translate` prints this program's command for theirs",
    ]
    return [Section("Other programs", [Table("peers", "Results of other programs", columns, rows, notes)])]


def _name(group: Group) -> str:
    return f"{group.method}, {group.setting}"


def _last(run: Run) -> float | None:
    share = run.last["accuracy"]["weighted"]
    return None if share is None else float(share)


def _best(run: Run) -> float | None:
    shares = (row["accuracy"]["weighted"] for row in run.history)
    return max((float(share) for share in shares if share is not None), default=None)
