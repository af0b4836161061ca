"""Masked sums: the same bits as without masks, the protocol's parts, and what a rank sends."""

from __future__ import annotations

import json
import signal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.algorithms.base import Algorithm, Block
from pfedmoe_mpi.bench import privacy
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.conformance.checks import Case
from pfedmoe_mpi.conformance.traffic import traffic_errors
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import masked_round, metrics
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.federation.masked_round import MaskedRound
from pfedmoe_mpi.federation.round_sum import RoundSum
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.privacy import graph, secret_sharing, stream
from pfedmoe_mpi.privacy.masked_sum import Member, Server
from pfedmoe_mpi.report.load import load_run
from pfedmoe_mpi.report.run_report import _costs
from pfedmoe_mpi.run import console, restart
from support.launcher import SMALL_RUN, Session, read_metrics
from support.masked_job import digest, make_loop
from support.mpi_job import run_module

REFUSED = {"fd", "fedgh", "fedtgp"}
SUMMED = [name for name in methods.names() if name not in {*REFUSED, "standalone"}]
LOSSY = {"faults__dropout": 0.15, "rounds": 3, "clients": 8, "seed": 2}
SPARSE = {"privacy__neighbours": 4}
# Half of the clients in a cohort: on three ranks some are lent.
DRIFT = {"stream__kind": "recurring", "stream__round": 1, "join__share": 0.4, "join__round": 2, "rounds": 2}
DRIFT |= {"participation": 0.5, "clients": 10}
NOISE = {"algorithm": "fedavg", "privacy__clip": 1.0, "privacy__noise": 0.5}

SAMPLES = {"algorithm": "fedavg", "privacy__unit": "sample", "privacy__clip": 1.0, "privacy__noise": 0.5}
LATE = {"join__share": 0.3, "join__round": 2}
UNSEEN = {"unseen__clients": 2, "unseen__by": "client", "unseen__tune": 1}
COMBINED = {
    "samples, late and lost": {**SAMPLES, **LATE, **LOSSY, "privacy__sampling": "poisson"},
    "samples, drift": {**SAMPLES, "stream__kind": "gradual", "stream__round": 1, "rounds": 2},
    "averaged private parts, late and lost": {**UNSEEN, **LATE, **LOSSY, "unseen__private": "average"},
    "unseen, server, drift": {**UNSEEN, **DRIFT, "algorithm": "fedprox", "server__optimiser": "adam"},
    "clients, unseen, server": {**UNSEEN, **NOISE, "clients": 8, "server__optimiser": "momentum"},
}

world = cache(launch.start)


def trained(folder: Path | None = None, **changes: Any) -> Loop:
    loop = make_loop(world(), folder, **changes)
    assert loop.run()
    return loop


# Bits


def test_masks_change_no_bit(tmp_path: Path) -> None:
    """Every method that sums, with dropouts, on a sparse graph and after a stop, on 1 and on 3 ranks."""
    runs: dict[str, dict[str, Any]] = {name: {"algorithm": name} for name in SUMMED}
    runs |= {"lossy": LOSSY, "sparse": {"clients": 8}, "drift": DRIFT, "noise": NOISE}
    plain = {name: digest(trained(**changes)) for name, changes in runs.items()}
    masked = {name: {**changes, "privacy__masked": True} for name, changes in runs.items()}
    masked["sparse"] |= SPARSE
    loops = {name: trained(**changes) for name, changes in masked.items()}
    assert {name: digest(loop) for name, loop in loops.items()} == plain
    rows = loops["lossy"].history
    assert any(row["lost"] for row in rows) and all(row["masks"]["opened"] for row in rows)
    counted, found = privacy.measure(6, 0, 1), loops["fedavg"].history[0]["masks"]["bytes"]
    assert (counted.sent, counted.received) == (found["up"], found["down"]), "bench counts as a run does"
    few, all_others = (loops[name].history[0]["masks"]["bytes"] for name in ("sparse", "lossy"))
    assert few["up"] < all_others["up"] and few["down"] < all_others["down"]

    whole = stopped_after_two(tmp_path / "partial")
    (tmp_path / "runs.json").write_text(json.dumps(masked))
    partial = tmp_path / "partial" / "round-000001-partial.h5"
    job = run_module("masked_job", str(tmp_path / "runs.json"), str(partial), ranks=3)
    assert job.code == 0, job.output
    found = json.loads(job.output.splitlines()[-1])
    sent, resumed = found.pop("sent"), found.pop("resumed")
    assert found == plain and resumed == whole
    check_wire(sent)


@pytest.mark.parametrize("settings", COMBINED.values(), ids=COMBINED)
def test_masks_change_no_bit_of_what_is_combined(settings: dict[str, Any]) -> None:
    plain, masked = (trained(**settings, privacy__masked=on) for on in (False, True))
    assert digest(masked) == digest(plain)
    rows = [[metrics.learning(row) for row in loop.history] for loop in (plain, masked)]
    np.testing.assert_equal(*rows)
    assert all(row["masks"]["opened"] for row in masked.history)
    assert "faults__dropout" not in settings or any(row["lost"] for row in masked.history)


def stopped_after_two(folder: Path) -> str:
    """Stop a masked run within round 1; return the digest of the same run without masks and stops."""
    folder.mkdir()
    loop = make_loop(world().split(0), folder, privacy__masked=True)

    def stop(round: int, done: int, members: int) -> None:
        loop.comm.signal_received = signal.SIGUSR1 if done == 2 else 0

    loop._observer.client_trained = stop  # type: ignore[method-assign]
    assert not loop.run()
    with checkpoint.Checkpoint(folder / "round-000001-partial.h5") as loaded:
        assert len(loaded.finished) == 2 and loaded.partial is not None
        blocks = loaded.partial[1 + 6 * 5 :]
        for name, change in {"masked": (True, False), "neighbours": (0, 4)}.items():
            with pytest.raises(ConfigError, match=f"remove --privacy.{name} until the round is done"):
                restart._check_progress(world(), loaded, loop.federation.config, {f"privacy.{name}": change})
    assert chi_square(blocks.tobytes()) < UNIFORM, "the sum in a checkpoint is masked"
    raw = b"".join(path.read_bytes() for path in folder.iterdir())
    secrets = [
        secret
        for client in range(6)
        for secret in vars(Member(0, 1, client, {client: []})).values()
        if isinstance(secret, bytes)
    ]
    assert len(secrets) == 24 and not any(secret in raw for secret in secrets)
    return digest(trained())


def test_sum_in_a_checkpoint_stays_masked_after_it_was_opened(tmp_path: Path) -> None:
    """A stop in the evaluation keeps the masked sum, and the restart opens it once."""
    loop = make_loop(world().split(0), tmp_path, privacy__masked=True)

    def stop(round: int, clients: object) -> None:
        loop.comm.signal_received = signal.SIGUSR1

    loop._observer.dropped = stop  # type: ignore[method-assign]
    assert not loop.run()
    again = make_loop(world(), privacy__masked=True)
    with checkpoint.Checkpoint(tmp_path / "round-000001-partial.h5") as loaded:
        assert len(loaded.finished) == 6 and loaded.partial is not None
        assert chi_square(loaded.partial[1 + 6 * 5 :].tobytes()) < UNIFORM
        again.resume(loaded)
    assert again.run() and digest(again) == digest(trained())


# The wire

UNIFORM = 400.0  # of chi-square with 255 degrees of freedom: more has a probability of 1e-8


def chi_square(raw: bytes) -> float:
    counts = np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    expected = len(raw) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def check_wire(sent: list[dict[str, Any]]) -> None:
    """Each of three ranks sent one contribution, which looks random, and nothing else shows it."""
    for rank in sent:
        masked, plain = bytes.fromhex(rank["masked"]), bytes.fromhex(rank["plain"])
        assert len(masked) == len(plain) > 20_000
        assert chi_square(masked) < UNIFORM < chi_square(plain)
        assert not rank["shown"]


def test_conformance_checks_that_contributions_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a round that opens, and one that does not."""
    given = {"privacy.masked": True, "train.device": "cpu"}
    settings = Case("pfedmoe", given).settings(rounds=2, faults__dropout=0.2, participation=1.0, seed=4)
    assert not traffic_errors(world().split(0), settings, tmp_path)

    add = MaskedRound.add
    monkeypatch.setattr(
        MaskedRound, "add", lambda self, k, numbers: None if k == 1 else add(self, k, numbers)
    )
    errors = traffic_errors(world().split(0), settings.model_copy(update={"rounds": 1}), tmp_path)
    assert any("block 'shared' of the sum: more than the method returned" in error for error in errors)

    class Talking(Member):
        def reveal(self, *arguments: Any) -> bytes:
            return 2 * super().reveal(*arguments)

    monkeypatch.setattr(MaskedRound, "add", add)
    monkeypatch.setattr(masked_round, "Member", Talking)
    errors = traffic_errors(world().split(0), settings.model_copy(update={"rounds": 1}), tmp_path)
    assert any("'shares of survivors' gathers more" in error for error in errors)


# Members that are missing


def test_member_that_diverges_does_not_spoil_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Algorithm.client_step

    def spoilt(self: Algorithm, turn: Any) -> Any:
        values = step(self, turn)
        return {name: value * float("nan") for name, value in values.items()} if turn.client == 1 else values

    monkeypatch.setattr(Algorithm, "client_step", spoilt)
    plain, masked = (trained(algorithm="fedavg", privacy__masked=on) for on in (False, True))
    assert masked.history[0]["dropped"] == [1] and digest(plain) == digest(masked)


def test_round_with_too_few_members_counts_as_empty() -> None:
    """The server's vector stays, and the clients keep what they trained."""
    loop = make_loop(world(), privacy__masked=True, faults__deadline=0.01, rounds=1)
    before = loop.state.clone()
    assert loop.run() and torch.equal(loop.state, before)
    assert not loop.history[0]["masks"]["opened"]
    lossy = trained(privacy__masked=True, faults__dropout=0.5, seed=3, rounds=1)
    row = lossy.history[0]
    assert 0 < len(row["lost"]) < 6 and not row["masks"]["opened"]
    assert "too few members were left to open: round 1" in console.table(lossy.federation, lossy.history)


def test_costs_stand_in_the_output_and_the_report(session: Session, tmp_path: Path) -> None:
    result = session(*SMALL_RUN, "--privacy.masked", "true", "--run.dir", "run", cwd=tmp_path)
    assert result.code == 0 and "masked sums, mean of a round: a member sends 0.5 kB" in result.out, (
        result.err
    )
    found = {row[0].text: row[1].values[0] for row in _costs(load_run(tmp_path / "run")).rows}
    counted = read_metrics(tmp_path / "run")[0]["masks"]
    assert found["masks, MB up by member"] == counted["bytes"]["up"] / 1e6
    assert found["masks, seconds of server"] == counted["seconds"]["server"]


# Refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"algorithm": name}, "each member's own") for name in sorted(REFUSED)),
        ({"algorithm": "standalone"}, "clients of standalone send nothing"),
        ({"participation": 0.1}, "has one member"),
        ({"privacy__neighbours": 3}, "--privacy.neighbours 4"),
    ],
)
def test_what_cannot_be_masked_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_loop(world(), privacy__masked=True, **changes)


def test_an_earlier_run_that_sends_nothing_goes_on_with_masks(tmp_path: Path) -> None:
    loop = trained(tmp_path, algorithm="standalone", rounds=1)
    masked = config.changed(loop.federation.config, {"privacy.masked": True})
    with checkpoint.Checkpoint(tmp_path / "round-000001.h5") as loaded:
        build(world(), masked, loaded=loaded, warn=False)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfedmoe_mpi.privacy.agreement.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pfedmoe_mpi\[privacy\]"):
        make_loop(world(), privacy__masked=True)


# The parts of the protocol


def test_shares_are_those_of_a_known_example() -> None:
    """Secret 1234 with 1234 + 166 x + 94 x^2 modulo 1613, the example of Wikipedia's article."""
    known = np.array([[1494], [329], [965], [176], [1188], [775]])
    coefficients = np.array([[1234], [166], [94]])
    assert secret_sharing.evaluate(coefficients, np.arange(1, 7), 1613).tolist() == known.tolist()
    assert secret_sharing.at_zero([2, 4, 5], known[[1, 3, 4]], 1613).tolist() == [1234]


def test_threshold_of_shares_gives_the_secret_and_fewer_do_not() -> None:
    draw = np.random.default_rng(0)
    secret, points = draw.bytes(32), [3, 1, 10**6, 7, 12]
    random = draw.integers(0, 2**64, (2, secret_sharing.DIGITS), np.uint64)
    shares = secret_sharing.split(secret, 3, points, random)
    for chosen in ([0, 1, 2], [4, 2, 3], [0, 1, 2, 3, 4]):
        assert secret_sharing.combine([points[n] for n in chosen], [shares[n] for n in chosen]) == secret
    with pytest.raises(ValueError, match="belong together"):
        secret_sharing.combine(points[:2], shares[:2])


def test_stream_is_that_of_rfc_8439() -> None:
    """Key 0, nonce 0, counter 0: appendix A.1, test vector 1."""
    assert stream.numbers(bytes(32), 8).tobytes()[:16].hex() == "76b8e0ada0f13d90405d6ae55386bd28"


@pytest.mark.parametrize(("members", "k"), [(9, 4), (9, 0), (5, 8), (2, 0), (40, 6)])
def test_graph_is_regular_and_symmetric(members: int, k: int) -> None:
    clients = list(range(3, 3 + 2 * members, 2))
    drawn = graph.draw(clients, k, np.random.default_rng(1))
    degree = k if 0 < k < members - 1 else members - 1
    assert list(drawn) == clients and {len(near) for near in drawn.values()} == {degree}
    assert all(a in drawn[b] and a != b for a in clients for b in drawn[a])


def test_threshold_is_that_of_the_paper() -> None:
    assert [graph.threshold(n) for n in (1, 2, 3, 4, 9, 10, 100)] == [2, 2, 3, 3, 7, 7, 67]
    complete = graph.draw(range(9), 0, np.random.default_rng(0))
    assert graph.can_open(complete, range(7)) and not graph.can_open(complete, range(6))
    assert not graph.can_open({4: []}, [4]), "the sum over one member is its contribution"


@pytest.mark.parametrize("k", [0, 6])
def test_largest_totals_fit_the_ring(k: int) -> None:
    """At the edge of what `encode` accepts, with a member missing; the next value is refused."""
    task: Any = make_loop(world(), clients=12, rounds=1).federation.task
    cohort = [(client, "client") for client in range(12)]
    largest = float(np.nextafter(np.float32(2**22), np.float32(0)))
    drawn = graph.draw(range(12), k, np.random.default_rng(2))
    members = {client: Member(5, 1, client, drawn) for client in range(12)}
    publics = {client: member.public for client, member in members.items()}
    sealed = {client: member.shares(publics) for client, member in members.items()}

    class Masks:
        costs: dict[str, Any] = {}  # noqa: RUF012

        def add(self, client: int, contribution: np.ndarray) -> None:
            members[client].mask(contribution, publics)

    sums: list[RoundSum] = []
    for masks in (None, Masks()):
        total = RoundSum(task, cohort, {"block": Block(4)})
        total.masks = masks
        for position in range(11):
            value = torch.tensor([largest, -largest, 0.0, 1.0])
            total.add(
                position, {"block": value}, dict.fromkeys(("train_loss", "accuracy_before", "bytes_down"), 0)
            )
        sums.append(total)
    plain, masked = sums
    assert abs(plain.blocks).max() > 0.9 * 2**62 * 11 / 12
    survivors = frozenset(range(11))
    revealed = {client: members[client].reveal(survivors, sealed, publics) for client in survivors}
    ring = masked.blocks.view(np.uint64).copy()
    assert not np.array_equal(ring.view(np.int64), plain.blocks)
    Server(drawn, 1, publics, survivors, revealed).take_off(ring, range(12))
    assert np.array_equal(ring.view(np.int64), plain.blocks)
    with pytest.raises(ValueError, match="too large"):
        plain.add(11, {"block": torch.full((4,), 2.0**22)}, {})
