"""Reports on streams: accuracy on the new concept, forgetting and recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfedmoe_mpi.report import compare, drift_section
from pfedmoe_mpi.report.load import Run, load_run


def test_drift_is_compared(trained: Path) -> None:
    """One seed of two recovered; a run without a stream has no such table."""
    run, drifted = load_run(trained), []
    for seed, (lost, rounds, now) in enumerate([(0.25, 4, 0.5), (0.75, None, 0.75)]):
        concepts = {"first": now, "second": 0.125, "share": 0.0}
        drifted.append(streamed(run, seed, {"forgetting": lost, "recovery": rounds}, concepts))
    assert not drift_section.sections(compare.compare([run]), None) and not drift_section.facts(run)
    assert [fact[1] for fact in drift_section.facts(drifted[0])] == ["50.00 %", "25.00 %", "after 4 rounds"]
    assert drift_section.facts(drifted[1])[2] == ("recovered", "not yet")
    ((table,),) = (
        section.tables for section in drift_section.sections(compare.compare([run, *drifted]), None)
    )
    assert [column.title for column in table.columns[3:5]] == ["new concept, %", "old concept, %"]
    texts = ["2", "62.50 ± 17.68", "12.50 ± 0.00", "50.00 ± 35.36", "1 of 2", "4"]
    assert [cell.text for cell in table.rows[0][2:]] == texts
    assert len(table.rows) == 1 and "sample standard deviation" in table.notes[0]


def streamed(run: Run, seed: int, drift: dict[str, Any], concepts: dict[str, float], **settings: Any) -> Run:
    """Return the same run with another seed, as if a concept had changed before its last round."""
    last = {**run.history[-1], "drift": drift, "accuracy_concepts": concepts}
    config = {**run.config, "stream.kind": "abrupt", "seed": seed, **settings}
    return Run(Path(f"{config['algorithm']}-{seed}"), config, [*run.history[:-1], last], run.events)


def test_drift_is_compared_with_the_baseline_on_the_new_concept(trained: Path) -> None:
    """The second concept is the new one from half of the rows on, and accuracy over both decides nothing."""
    run, runs = load_run(trained), []
    for seed in range(5):
        for method, ahead in (("pfedmoe", 0.02 + 0.01 * seed), ("standalone", 0.0)):
            concepts = {"first": 0.25, "second": 0.5 + ahead, "share": 0.5}
            drift = {"forgetting": 0.5, "recovery": None}
            runs.append(streamed(run, seed, drift, concepts, algorithm=method))
    ((table,),) = (section.tables for section in drift_section.sections(compare.compare(runs), "standalone"))
    rows = {row[0].text: [cell.text for cell in row[3:]] for row in table.rows}
    half = 100 * 2.7764451 * 0.0158114 / 5**0.5  # t of 0.975 with 4 degrees of freedom, sample deviation
    interval = f"+{4 - half:.2f} to +{4 + half:.2f}"
    ends = ["25.00 ± 0.00", "50.00 ± 0.00", "0 of 5", "–"]
    assert rows["pfedmoe"] == ["54.00 ± 1.58", "+4.00", interval, *ends]
    assert rows["standalone"] == ["50.00 ± 0.00", "–", "–", *ends]
    assert "standalone with the same seed" in table.notes[1]
