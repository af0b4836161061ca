"""Streams whose classes drift, and clients that join late."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoe_mpi.config.sections import StreamSettings
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.federation import drift, metrics
from pfedmoe_mpi.federation.stream import Stream
from support.launcher import (
    SMALL_RUN,
    Session,
    checkpoint_digest,
    read_metrics,
    reproducible_rows,
    run_to_end,
)
from support.small_federation import CLASSES, build_loop, write_data_files

LABELS = [np.repeat([0, 1, 2, 3], 25), np.repeat([1, 3], 50), np.zeros(10, int)]


def stream(kind: str, at: int = 10) -> Stream:
    return Stream(StreamSettings(kind=kind, round=at), 0, LABELS, 4)  # type: ignore[arg-type]


def of(it: Stream, k: int, round: int) -> list[int]:
    """Return the labels that a client trains on."""
    labels = torch.from_numpy(LABELS[k])
    split = Split(torch.arange(len(labels))[:, None], labels)
    client = Client(k, {}, torch.empty(0), {"train": split, "test": split})
    rows = it.of(client, round).splits["train"]
    assert torch.equal(labels[rows.x[:, 0]], rows.y)
    return rows.y.tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("stream"))


def test_share_of_the_second_concept_follows_the_drift() -> None:
    abrupt, gradual, recurring = (stream(kind) for kind in ("abrupt", "gradual", "recurring"))
    assert [abrupt.share(t) for t in (1, 9, 10, 99)] == [0, 0, 1, 1]
    assert [gradual.share(t) for t in (1, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]
    assert [recurring.share(t) for t in (1, 10, 11, 20, 21, 30, 31)] == [0, 0, 1, 1, 0, 0, 1]


def test_client_trains_on_one_half_of_its_classes_at_a_time() -> None:
    it = stream("abrupt")
    for k in (0, 1):
        before, after = set(of(it, k, 9)), set(of(it, k, 10))
        assert len(before) == len(after) == len(set(LABELS[k])) // 2
        assert before | after == set(LABELS[k]) and not before & after
    assert of(it, 2, 9) == of(it, 2, 10) == LABELS[2].tolist(), "one class cannot drift"


def test_gradual_drift_replaces_rows_one_by_one() -> None:
    it = stream("gradual", 50)
    last = set(of(it, 0, 50))
    kept = [np.isin(of(it, 0, t), list(last)).sum() for t in range(50, 101)]
    assert kept[0] == 50 and kept[-1] == 0 and all(a >= b for a, b in pairwise(kept))
    assert 15 < kept[25] < 35 and abs(len(of(it, 0, 75)) - 50) < 15
    assert of(it, 0, 75) == of(stream("gradual", 50), 0, 75)


def test_counts_are_those_of_the_current_rows() -> None:
    it = stream("recurring", 1)
    for t in (1, 2):
        counts = it.counts(t)
        for k in range(3):
            assert counts[k].tolist() == np.bincount(of(it, k, t), minlength=4).tolist()


def test_test_rows_are_divided_by_concept() -> None:
    it = stream("abrupt")
    labels = torch.from_numpy(LABELS[0])
    client = Client(0, {}, torch.empty(0), {"test": Split(labels[:, None], labels)})
    first, second = it.concepts(client)
    assert set(first.y.tolist()) == set(of(it, 0, 1)) and set(second.y.tolist()) == set(of(it, 0, 99))


# Through the round loop


def test_contributions_are_weighted_by_current_samples(data: dict[str, Path]) -> None:
    """The sum uses the round's n_k: here the mean of two clients whose halves differ in size."""
    changes: dict[str, Any] = {"stream__kind": "recurring", "stream__round": 1, "participation": 1.0}
    loop = build_loop(data["small"], "fedavg", model__pool="mlp5", rounds=2, **changes)
    assert loop.federation.stream
    loop.run()
    for row in loop.history:
        counts = loop.federation.stream.counts(row["round"]).sum(1)
        assert row["clients"]["samples"] == counts.tolist()
    assert loop.history[0]["clients"]["samples"] != loop.history[1]["clients"]["samples"]
    still = build_loop(data["small"], "fedavg", model__pool="mlp5", rounds=2, participation=1.0)
    still.run()
    assert not torch.equal(loop.state, still.state)
    assert still.history[0]["accuracy_concepts"] == {"first": None, "second": None, "share": None}


def test_classwise_methods_weigh_the_current_classes(data: dict[str, Path]) -> None:
    """FedProto under an abrupt change: a class that is gone keeps its prototype, and no client is dropped."""
    loop = build_loop(
        data["small"],
        "fedproto",
        model__pool="mlp5",
        rounds=1,
        participation=1.0,
        stream__kind="abrupt",
        stream__round=5,
    )
    loop.run()
    assert loop.federation.stream
    held = loop.federation.stream.counts(1).sum(0) > 0
    defined = ~loop.state.view(len(held), -1).isnan().any(1)
    assert loop.history[0]["dropped"] == [] and defined.tolist() == held.tolist()
    assert set(np.flatnonzero(held)) <= set().union(*map(set, CLASSES))


def row(round: int, first: float | None, second: float | None, share: float | None) -> metrics.Row:
    return {"round": round, "accuracy_concepts": {"first": first, "second": second, "share": share}}


def test_forgetting_and_recovery_follow_their_definitions() -> None:
    before = [row(1, 0.5, 0.1, 0.0), row(2, 0.9, 0.1, 0.0), row(3, 0.8, 0.1, 0.0)]
    assert drift.cost(before) is None and drift.cost([row(1, None, 0.0, None)]) is None
    alone = [row(1, 0.5, None, 0.0), row(2, 0.4, None, 1.0)]
    assert drift.cost(alone) is None, "nobody who has joined has test rows of the second concept"
    fallen = [*before, row(4, 0.6, 0.4, 1.0), row(5, 0.3, 0.7, 1.0)]
    assert drift.cost(fallen) == {"forgetting": pytest.approx(0.6), "recovery": None}
    back = [*fallen, row(6, 0.4, 0.85, 1.0), row(7, 0.2, 0.7, 1.0)]
    assert drift.cost(back) == {"forgetting": pytest.approx(0.7), "recovery": 2}
    again = [*back, row(8, 0.5, 0.6, 0.0)]
    assert drift.cost(again) == {"forgetting": pytest.approx(0.25), "recovery": None}
    unmeasured = [row(n, None, None, float(n >= 4)) for n in (4, 5)]
    assert drift.cost([*before, *unmeasured]) is None
    late = [*before, *unmeasured, row(6, 0.4, 0.85, 1.0), row(7, None, None, 0.0)]
    assert drift.cost(late) == {"forgetting": pytest.approx(0.5), "recovery": 2}, "from round 4 to 6"


DRIFT = (
    *("--stream.kind", "recurring", "--stream.round", "2"),
    *("--join.share", "0.5", "--join.round", "3"),
)


def test_drift_and_late_clients_repeat_and_are_reported(session: Session, tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 3):
        output = run_to_end(ranks, *SMALL_RUN, *DRIFT, "--rounds", "4", "--run.dir", str(ranks), cwd=tmp_path)
        found[ranks] = checkpoint_digest(tmp_path / str(ranks), 4)
    assert "drift: accuracy " in output and "on the new concept" in output
    run_to_end(2, *SMALL_RUN, *DRIFT, "--rounds", "2", "--run.dir", "again", cwd=tmp_path)
    assert session("restart", "again", "--rounds", "4", cwd=tmp_path).code == 0
    found[2] = checkpoint_digest(tmp_path / "again", 4)
    assert len(set(found.values())) == 1 and reproducible_rows(tmp_path / "again") == reproducible_rows(
        tmp_path / "1"
    )
    refused = session("restart", "again", "--rounds", "5", "--stream.round", "3", cwd=tmp_path)
    assert refused.code == 2 and "cannot be changed now" in refused.err
    history = read_metrics(tmp_path / "1")
    assert [len(r["cohort"]) for r in history] == [2, 2, 4, 4]
    late = set(range(4)) - set(history[0]["cohort"])
    for r in history[:2]:
        assert {k for k in range(4) if r["clients"]["accuracy"][k] is None} == late
    assert None not in history[2]["clients"]["accuracy"]
    assert [r["accuracy_concepts"]["share"] for r in history] == [0, 0, 1, 1]
    assert history[1]["drift"] is None and history[3]["drift"]["forgetting"] is not None
