"""Clients that never train, clients that join late, and their evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from oracles import nets
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.data.set_apart import choose_unseen
from pfedmoe_mpi.federation import federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch
from support import launcher
from support.launcher import error_message, read_metrics
from support.mpi_job import run_conformance
from support.small_federation import TrainedFederation, train_federation, write_data_files
from support.unseen_clients import FLAGS, build_federation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data_files(tmp_path_factory.mktemp("unseen"))


def combination(federation: federation.Federation, k: int) -> frozenset[int]:
    return frozenset(federation.dataset.labels[federation.partition.train[k]].tolist())


# Who is unseen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("wanted", "number"), [(4, 4), (0.25, 3), (1, 1)])
def test_unseen_clients_never_train_and_differ_in_classes(seed: int, wanted: float, number: int) -> None:
    federation = build_federation(algorithm="fedavg", unseen__clients=wanted, seed=seed, participation=0.5)
    task = federation.task
    assert len(task.unseen) == number and sorted(task.unseen | set(task.training)) == list(range(12))
    theirs = {combination(federation, k) for k in task.unseen}
    assert not theirs & {combination(federation, k) for k in task.training}
    drawn = {k for t in range(1, 40) for k, _ in federation.method.cohort(t)}
    assert drawn == set(task.training)
    assert all(len(federation.method.cohort(t)) == federation.config.cohort_size for t in range(1, 5))


def test_seed_changes_the_unseen_clients() -> None:
    assert len({build_federation(algorithm="fedavg", seed=seed).task.unseen for seed in range(4)}) > 1


def test_clients_of_equal_classes_stay_together() -> None:
    labels = np.repeat(np.arange(5), 4)
    train = tuple(
        np.flatnonzero(np.isin(labels, held))[k % 2 :: 2]
        for k, held in enumerate([[0, 1], [0, 1], [2], [3, 4]])
    )
    partition = Partition(train, (), ())
    assert choose_unseen(partition, labels, 2, 0).unseen in ({0, 1}, {2, 3})
    assert choose_unseen(partition, labels, 3, 0).unseen in ({0, 1, 2}, {0, 1, 3})
    assert choose_unseen(partition, labels, 1, 0).unseen in ({2}, {3})


def test_impossible_number_of_unseen_clients_is_refused(assert_refused: Callable[..., str]) -> None:
    flags = ("--partition.kind", "iid", "--unseen.clients", "4")
    message = assert_refused("unseen.clients = 4: no choice of clients has label combinations", *flags)
    assert "--partition.kind pathological" in message
    flags = ("--unseen.clients", "4", "--partition.alpha", "1000")
    assert "20 clients have 1 combinations" in assert_refused("unseen.clients = 4", *flags)
    assert_refused("leaves no client to train", "--unseen.clients", "20")


def test_written_partition_is_that_of_the_run(tmp_path: Path, session: launcher.Session) -> None:
    flags = [*FLAGS, "--algorithm", "fedjets"]
    said = session("data", "partition", "p.h5", *flags, cwd=tmp_path)
    assert said.code == 0 and said.out.count("|  unseen\n") == 4, said.err
    assert "80 rows are reserved for the server" in said.out
    partition = build_federation(algorithm="fedjets").partition
    with h5py.File(tmp_path / "p.h5") as file:
        assert file.attrs["digest"] == partition.digest()
        assert set(file["unseen"][()]) == partition.unseen
        assert np.array_equal(file["reserved"][()], partition.reserved)


# What is reported of them


def test_unseen_accuracy_is_that_of_the_global_model() -> None:
    loop = Loop(launch.start(), build_federation(algorithm="fedavg"), SilentObserver(), None)
    assert loop.run()
    federation, row = loop.federation, loop.history[-1]
    accuracy = row["clients"]["accuracy"]
    for name, who in (
        ("accuracy_unseen", sorted(federation.task.unseen)),
        ("accuracy", federation.task.training),
    ):
        n = [len(federation.partition.test[k]) for k in who]
        assert row[name]["mean"] == pytest.approx(np.mean([accuracy[k] for k in who]))
        assert row[name]["weighted"] == pytest.approx(np.average([accuracy[k] for k in who], weights=n))
    it = TrainedFederation(loop, loop.state, {})
    model = nets.model(it.of_state("model", start=False)).eval()
    for k in federation.task.unseen:
        x, y = it._pairs(federation.partition.test[k])
        with torch.no_grad():
            assert accuracy[k] == float((model(x).argmax(1) == y).double().mean())
    assert loop.evaluation()["accuracy_unseen"] == row["accuracy_unseen"]


@pytest.mark.parametrize("method", ["fedavg", "pfedmoe"])
def test_evaluate_treats_late_clients_like_the_run(method: str) -> None:
    """`evaluate` of a round before the join treats late clients as untrained."""
    own = {"unseen__clients": 0, "join__share": 0.5, "join__round": 3, "rounds": 4}
    loop = Loop(launch.start(), build_federation(algorithm=method, **own), SilentObserver(), None)
    for _ in range(3):
        assert loop.begin() and loop.run_round()
        found, row = loop.evaluation(), loop.history[-1]
        assert found["clients"]["accuracy"] == row["clients"]["accuracy"]
        for name in ("accuracy", "accuracy_unseen", "alpha_class"):
            assert found[name] == row[name], name


def test_scaffold_control_ignores_unseen_clients() -> None:
    """SCAFFOLD's c is the mean of the c_i of the N clients that train; the unseen have no part in N."""
    loop = Loop(launch.start(), build_federation(algorithm="scaffold"), SilentObserver(), None)
    assert loop.run()
    federation = loop.federation
    control = loop.state[federation.state_layout.parts["control"]]
    own = torch.stack([federation.clients[k].vector for k in federation.task.training])
    torch.testing.assert_close(control, own.mean(0), rtol=1e-4, atol=1e-6)
    assert len(own) == 8 and control.any()


def test_rounds_before_the_join_may_have_no_clients(tmp_path: Path, session: launcher.Session) -> None:
    """A share of 0.9 of two clients rounds to both of them."""
    own = ("--unseen.clients", "0", "--clients", "2", "--join.share", "0.9", "--join.round", "2")
    flags = (*FLAGS, *own, "--run.checkpoint_every", "1", "--run.dir", "run")
    said = session(*flags, cwd=tmp_path)
    assert said.code == 0, said.err
    assert [row["cohort"] for row in read_metrics(tmp_path / "run")] == [[], [0, 1]]
    before = session("evaluate", str(tmp_path / "run" / "checkpoints" / "round-000001.h5"), cwd=tmp_path)
    assert before.code == 0 and "mean -  weighted -  population std -  worst -" in before.out, before.err


@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_unseen_accuracy_or_a_reason(method: str) -> None:
    loop = Loop(launch.start(), build_federation(algorithm=method, rounds=1), SilentObserver(), None)
    assert loop.begin()
    before = {k: client.vector.clone() for k, client in loop.federation.clients.items()}
    assert loop.run()
    row, reason = loop.history[-1], loop.federation.method.no_answer_reason
    assert (row["accuracy_unseen"]["mean"] is None) == bool(reason)
    assert row["accuracy"]["mean"] is not None and len(row["clients"]["accuracy"]) == 12
    for k in loop.federation.task.unseen:
        assert torch.equal(loop.federation.clients[k].vector, before[k]), "an unseen client changed"
        assert (row["clients"]["accuracy"][k] is None) == bool(reason)


def test_reason_without_unseen_accuracy_is_printed(tmp_path: Path, session: launcher.Session) -> None:
    for method, why in (
        ("pfedmoe", "a client that never trained has no model and no gate"),
        ("standalone", "a client that never trained has no model"),
    ):
        said = session(*FLAGS, "--algorithm", method, "--run.dir", method, cwd=tmp_path)
        assert f"; no accuracy, because {why}\n" in said.out, said.err
        assert read_metrics(tmp_path / method)[-1]["accuracy_unseen"]["mean"] is None
        newest = tmp_path / method / "checkpoints" / "round-000002.h5"
        again = session("evaluate", str(newest), cwd=tmp_path)
        assert again.code == 0 and "accuracy -" in again.out, again.err
    said = session(*FLAGS, "--algorithm", "fedavg", "--run.dir", "fedavg", cwd=tmp_path)
    assert "unseen clients: " in said.out and "no accuracy" not in said.out
    assert "  unseen " in said.out, "the line of a round has their accuracy"
    newest = tmp_path / "fedavg" / "checkpoints" / "round-000002.h5"
    assert "unseen clients: mean" in session("evaluate", str(newest), cwd=tmp_path).out


@pytest.mark.parametrize(
    ("methods", "own"),
    [(("fedavg", "fedjets"), "--fedjets.anchors=clusters"), (("pfedmoe",), "--unseen.private=average")],
)
def test_unseen_clients_keep_the_bits_on_any_ranks_and_restart(methods: tuple[str, ...], own: str) -> None:
    given = ("--clients=12", "--unseen.clients=4", "--partition.kind=pathological", "--participation=0.5")
    given = (*given, "--data.samples=400", "--data.classes=6", own)
    code, output = run_conformance(*methods, "--check=ranks,restart", *given, timeout=200)
    assert code == 0 and output.count(": pass\n") == 2 * len(methods), output


def test_restart_keeps_the_unseen_clients(tmp_path: Path, session: launcher.Session) -> None:
    assert session(*FLAGS, "--algorithm", "fedavg", "--run.dir", "run", cwd=tmp_path).code == 0
    again = session("restart", "run", "--rounds", "3", "--unseen.clients", "2", cwd=tmp_path)
    assert "unseen.clients: 4.0 → 2.0" in error_message(again, "cannot be changed now")


# pFedMoE's means


def test_mean_gate_and_head_match_the_reference(data: dict[str, Path]) -> None:
    """After a round of all clients: means of the private parts by n_k, and a prediction from them alone."""
    path = data["small"]
    it = train_federation(
        path, "pfedmoe", model__pool="mlp5,mlp4", rounds=1, participation=1.0, unseen__private="average"
    )
    n = [it.samples[k].n for k in range(3)]
    heads = [
        {x: it.of_client(k, "model", start=False)[f"head.{x}"] for x in ("weight", "bias")} for k in range(3)
    ]
    gates = [it.of_client(k, "gate", start=False) for k in range(3)]
    for part, held in (("mean_head", heads), ("mean_gate", gates)):
        found = it.of_state(part, start=False)
        for name, tensor in found.items():
            expected = sum(w * own[name].double() for w, own in zip(n, held, strict=True)) / sum(n)
            torch.testing.assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-6)
        assert set(found) == set(held[0])
    method, federation = it.loop.federation.method, it.loop.federation
    parts = federation.workbench.parts(
        (method.state(), it.loop.state), (federation.clients[0].spec, torch.zeros_like(it.private[0]))
    )
    x, _ = it.samples[0].test
    for module in parts.modules().values():
        module.eval()
    answer = method.predictor(parts, lambda: iter([x]), True)
    assert answer and not method.no_answer_reason
    gate, theta = (
        nets.gate(it.of_state("mean_gate", start=False)),
        nets.extractor(it.of_state("shared", start=False)),
    )
    head = it.of_state("mean_head", start=False)
    with torch.no_grad():
        r = 2 * gate.eval()(x)[:, :1] * theta(x)  # pfedmoe.mixture = sum, two experts
        torch.testing.assert_close(answer(x), r @ head["weight"].T + head["bias"], rtol=1e-5, atol=1e-5)


def test_means_are_declared_and_counted_in_bytes(data: dict[str, Path]) -> None:
    usual, means = (
        train_federation(data["small"], "pfedmoe", model__pool="mlp5", rounds=2, unseen__private=private)
        for private in ("none", "average")
    )
    size = {
        part: sum(t.numel() for t in means.of_state(part).values())
        for part in ("shared", "mean_gate", "mean_head")
    }
    assert usual.loop.history[0]["bytes"] == {"up": 4 * size["shared"], "down": 4 * size["shared"], "once": 0}
    assert means.loop.history[0]["bytes"] == {
        "up": 4 * sum(size.values()),
        "down": 4 * size["shared"],
        "once": 0,
    }
    for k in range(3):
        assert torch.equal(usual.loop.federation.clients[k].vector, means.loop.federation.clients[k].vector)
    agree = usual.of_state("shared", start=False), means.of_state("shared", start=False)
    assert all(torch.equal(agree[0][name], agree[1][name]) for name in agree[0]), "the training is another"


@pytest.mark.parametrize(
    "flags",
    [
        {"gate__weights": "equal"},
        {"gate__weights": "learned"},
        {"gate__input": "shared"},
        {"pfedmoe__extractors": 2},
        {"gate__routing": "top1"},
    ],
)
def test_means_work_with_other_gates(flags: dict[str, Any]) -> None:
    chosen = {"algorithm": "pfedmoe", "unseen__private": "average", "rounds": 1, **flags}
    loop = Loop(launch.start(), build_federation(**chosen), SilentObserver(), None)
    assert loop.run() and loop.history[-1]["accuracy_unseen"]["mean"] is not None
    alpha = loop.history[-1]["clients"]["alpha"]
    untrained = {k for k, a in enumerate(alpha) if a is None}
    assert untrained == loop.federation.task.unseen, "the weight of a gate that never trained"


def test_means_need_sharing() -> None:
    method = build_federation(algorithm="pfedmoe", unseen__private="average", pfedmoe__share=False).method
    assert method.no_answer_reason and not method.state()
