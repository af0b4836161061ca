"""Differential privacy of whole clients: ε, cohorts, refusals, ranks and restarts."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.algorithms.base import Mean
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.conformance.checks import Case
from pfedmoe_mpi.conformance.traffic import traffic_errors
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import build, client_privacy
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.federation.privacy_account import check_fork
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.privacy import accountant
from pfedmoe_mpi.privacy.client_release import ClientRelease
from pfedmoe_mpi.report import run_report
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.run import console, restart
from support.mpi_job import run_conformance
from support.small_federation import plan_of

CLIP: dict[str, Any] = {
    "privacy.clip": 1.0,
    "gate.input_norm": "layer",
    "gate.batch_norm": False,
    "train.device": "cpu",
}
REFUSED = {
    "ensemble": "different parts, by their roles",
    "fd": "count clients' labels",
    "fedgh": "single contributions",
    "fedjets": "different parts, by their roles",
    "fedproto": "count clients' labels",
    "fedssa": "count clients' labels",
    "fedtgp": "single contributions",
    "standalone": "send nothing",
}


def built(algorithm: str = "fedavg", loaded: Checkpoint | None = None, **changes: Any) -> Federation:
    return build.build(launch.start(), Case(algorithm, CLIP).settings(**changes), warn=False, loaded=loaded)


def trained(federation: Federation, folder: Path | None = None) -> Loop:
    loop = Loop(launch.start(), federation, SilentObserver(), folder)
    assert loop.run()
    return loop


# ε


def by_hand(noise: float, probability: float, steps: int, delta: float) -> float:
    """Return ε by the Rényi divergences of Mironov et al. 2019, at whole orders."""
    best = math.inf
    for order in range(2, 300):
        if probability == 1:
            divergence = order / (2 * noise**2)
        else:
            log_terms = [
                math.lgamma(order + 1)
                - math.lgamma(k + 1)
                - math.lgamma(order - k + 1)
                + (order - k) * math.log1p(-probability)
                + k * math.log(probability)
                + (k * k - k) / (2 * noise**2)
                for k in range(order + 1)
            ]
            divergence = float(np.logaddexp.reduce(log_terms)) / (order - 1)
        epsilon = steps * divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        best = min(best, epsilon)
    return best


@pytest.mark.parametrize(("noise", "probability", "steps"), [(2.0, 1.0, 20), (1.0, 0.1, 100), (0.8, 0.4, 5)])
def test_epsilon_agrees_with_formula_and_with_loss_distributions(
    noise: float, probability: float, steps: int
) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld

    found = accountant.epsilon(noise, probability, steps, 1e-5)
    assert found == pytest.approx(by_hand(noise, probability, steps, 1e-5), rel=0.02)
    event = GaussianDpEvent(noise)
    exact = pld.PLDAccountant()
    exact.compose(PoissonSampledDpEvent(probability, event) if probability < 1 else event, steps)
    assert exact.get_epsilon(1e-5) <= found <= 1.15 * exact.get_epsilon(1e-5)


def test_fixed_cohorts_count_the_rounds_of_the_client_that_is_drawn_most_often() -> None:
    federation = built(privacy__noise=3.0, participation=0.4, clients=5, rounds=7)
    drawn = np.zeros(5, int)
    for round in range(1, 8):
        drawn[[client for client, _ in federation.method.cohort(round)]] += 1
        entry = client_privacy_of(federation).entry(round)
        assert entry["epsilon"] == pytest.approx(by_hand(3.0, 1.0, drawn.max(), 1e-5), rel=0.02)
    assert drawn.max() < 7


def client_privacy_of(federation: Federation) -> client_privacy.ClientPrivacy:
    assert federation.private
    return federation.private


def test_more_rounds_go_on_counting_with_the_noise_of_the_rounds_before(tmp_path: Path) -> None:
    chosen = {"privacy__epsilon": 3.0, "privacy__sampling": "poisson", "participation": 0.5}
    first = trained(built(rounds=3, **chosen), tmp_path)
    entries = [row["privacy"] for row in first.history]
    spent = [entry["epsilon"] for entry in entries]
    assert spent == sorted(spent) and 2.99 < spent[-1] <= 3.0
    noise = entries[0]["noise"]
    assert spent[1] == pytest.approx(by_hand(noise, 0.5, 2, 1e-5), rel=0.02)

    (path,) = checkpoint.newest_first(tmp_path)[:1]
    checkpoint.verify(path, 0, 1)
    with Checkpoint(path) as loaded:
        longer = built(rounds=5, loaded=loaded, **chosen)
        loop = Loop(launch.start(), longer, SilentObserver(), None)
        loop.resume(loaded)
        assert loop.run()
    rows = [row["privacy"] for row in loop.history]
    assert rows[:3] == entries and {row["noise"] for row in rows} == {noise}
    assert rows[-1]["epsilon"] == pytest.approx(by_hand(noise, 0.5, 5, 1e-5), rel=0.02)
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 3, but a fork") as error:
        check_fork(longer)
    assert "fork with --privacy.epsilon 0" in error.value.remedy
    with Checkpoint(path) as loaded:
        assert client_privacy_of(built(privacy__noise=0.5, loaded=loaded)).noise == 0.5, "a fork's own"
        stronger = client_privacy_of(built(rounds=3, loaded=loaded, **{**chosen, "privacy__epsilon": 1.0}))
    assert stronger.entry(3)["epsilon"] == pytest.approx(1.0, rel=0.01), "an attack's own"


def test_masks_are_refused_for_cohorts_that_nobody_may_know() -> None:
    """A cohort of one cannot open its masked sum, so an unchanged state would show who was drawn."""
    with pytest.raises(ConfigError, match=r"privacy\.sampling = poisson, and whether a masked sum opens"):
        built(privacy__noise=1.0, privacy__masked=True, privacy__sampling="poisson")
    built(privacy__noise=1.0, privacy__masked=True)


def test_a_clip_without_noise_has_no_epsilon() -> None:
    federation = built()
    assert client_privacy_of(federation).entry(1)["epsilon"] is None
    assert "privacy: one client: clips, without noise: no ε" in plan_of(federation)


@pytest.mark.parametrize(("epsilon", "text"), [(0.02, "which may hide all"), (1e300, "protects nothing")])
def test_the_plan_warns_of_an_epsilon_that_is_far_from_usual(epsilon: float, text: str) -> None:
    (warning,) = (line for line in plan_of(built(privacy__epsilon=epsilon)) if text in line)
    assert warning.startswith(f"warning: privacy.epsilon = {epsilon:g} ") and "--privacy.epsilon 8" in warning


def test_a_run_reports_epsilon_and_warns_of_a_large_delta() -> None:
    federation = built("pfedmoe", privacy__noise=1.5, rounds=2, privacy__delta=0.3)
    plan = plan_of(federation)
    (line,) = (line for line in plan if line.startswith("privacy: "))
    seed, delta = plan[plan.index(line) + 1 :][:2]
    assert "keep it secret" in seed and "not below 1 / clients = 0.2" in delta
    loop = trained(federation)
    assert "noise 1.5 times the clip" in line and line in console.table(federation, loop.history)
    run = Run(Path("run"), config.flatten(config.to_tree(federation.config)), loop.history, [])
    facts = run_report._facts(run)
    assert ("ε of a client at δ = 0.3", f"{loop.history[-1]['privacy']['epsilon']:.3g}") in facts
    assert ("noise, in multiples of the clip", "1.5") in facts
    quiet = plan_of(built(privacy__noise=1.5))
    assert not any("1 / clients" in line or "usual" in line for line in quiet)


# Cohorts


def test_poisson_cohorts_draw_each_client_independently() -> None:
    federation = built(privacy__sampling="poisson", participation=0.3, clients=8, data__samples=320)
    cohorts = [federation.method.cohort(round) for round in range(1, 801)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    assert abs(sizes.mean() - 2.4) < 5 * math.sqrt(8 * 0.21 / 800)
    assert abs(sizes.var() - 8 * 0.21) < 0.5
    drawn = np.zeros((800, 8))
    for round, cohort in enumerate(cohorts):
        drawn[round, [client for client, _ in cohort]] = 1
    assert np.abs(drawn.mean(0) - 0.3).max() < 5 * math.sqrt(0.21 / 800)
    assert client_privacy_of(federation).expected(1) == pytest.approx(2.4)


def test_the_weight_of_a_noised_mean_is_the_expected_cohort() -> None:
    """SCAFFOLD's control moves by |S|/N of its mean, in which the same |S| divided the sum."""
    federation = built("scaffold", privacy__sampling="poisson", participation=0.3)
    state = federation.workbench.initial(federation.method.state())
    release = client_privacy_of(federation).release(state, 1)
    rows = federation.state_layout.parts["control"]
    mean = release.mean("control", torch.zeros(1, rows.stop - rows.start, dtype=torch.int64))
    assert mean.weight.tolist() == pytest.approx([0.3 * federation.task.clients]) != [1, 2]
    total = {name: part.clone() for name, part in (("model", state[:1]), ("control", torch.zeros(3)))}
    means = {"model": Mean(torch.zeros(1, 1), mean.weight), "control": Mean(torch.ones(1, 3), mean.weight)}
    federation.method.server_update(total, means, 1)
    assert total["control"].tolist() == pytest.approx([0.3] * 3)


def test_an_empty_round_releases_noise_alone() -> None:
    chosen = {"privacy__sampling": "poisson", "participation": 0.001, "rounds": 2}
    loop = trained(built(privacy__noise=1.0, **chosen))
    assert [row["cohort"] for row in loop.history] == [[], []]
    plan = plan_of(loop.federation)
    assert "5 clients, cohort about 0.005, drawn by Poisson, 2 rounds" in plan[0]
    assert any("once about 0 of 5 clients have trained" in line for line in plan)
    initial = loop.federation.workbench.initial(loop.federation.method.state())
    moved = float((loop.state - initial).std())
    # Of two rounds, with m = 0.001 · 5.
    assert moved == pytest.approx(math.sqrt(2) / 0.005, rel=0.2)
    still = trained(built(privacy__clip=0.0, **chosen))
    assert torch.equal(still.state, initial), "without a clip an empty round changes nothing"


def test_late_clients_lost_members_and_a_server_optimiser_work_with_noise() -> None:
    loop = trained(
        built(
            "pfedmoe",
            privacy__noise=0.1,
            privacy__sampling="poisson",
            join__share=0.4,
            join__round=3,
            faults__dropout=0.5,
            server__optimiser="momentum",
        )
    )
    assert client_privacy_of(loop.federation).expected(1) == pytest.approx(0.8 * 3)
    assert client_privacy_of(loop.federation).expected(3) == pytest.approx(0.8 * 5)
    assert any(row["lost"] for row in loop.history) and bool(loop.state.isfinite().all())


# Methods


@pytest.mark.parametrize("algorithm", sorted(set(methods.names()) - set(REFUSED)))
def test_a_wide_clip_gives_the_mean_of_equal_members(algorithm: str) -> None:
    """Without noise, a clip that nothing reaches changes rounding alone where members weigh equally."""
    equal = {"partition__kind": "iid", "data__samples": 160, "participation": 1.0, "rounds": 1}
    with_clip = trained(built(algorithm, privacy__clip=1e5, **equal))
    counts = with_clip.federation.task.counts.sum(axis=1)
    without = trained(built(algorithm, privacy__clip=0.0, **equal))
    tolerance = 0.02 if len({*counts.tolist()}) > 1 else 1e-4
    torch.testing.assert_close(with_clip.state, without.state, rtol=0.02, atol=tolerance)
    tight = trained(built(algorithm, privacy__clip=1e-3, **equal))
    initial = tight.federation.workbench.initial(tight.federation.method.state())
    layout, method = tight.federation.state_layout, tight.federation.method
    places = [layout.parts[name] for name in method.payload(layout.sizes)]
    changes = torch.cat([tight.state[place] - initial[place] for place in places])
    assert float(changes.norm()) <= 1.01e-3


@pytest.mark.parametrize("algorithm", sorted(REFUSED))
def test_a_method_is_refused_with_the_reason(algorithm: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[algorithm]) as error:
        built(algorithm)
    assert "remove --privacy.clip" in error.value.remedy


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        (
            {"privacy.clip": 0, "privacy.noise": 1},
            "privacy.noise = 1 needs a privacy.clip",
            "--privacy.clip 1",
        ),
        ({"privacy.clip": 0, "privacy.epsilon": 8}, "privacy.epsilon = 8 needs", "--privacy.epsilon 0"),
        (
            {"privacy.clip": 0, "privacy.delta": 1e-3},
            "privacy.delta = 0.001 has no",
            "remove --privacy.delta",
        ),
        ({"privacy.neighbours": 4}, "privacy.neighbours = 4 has no", "--privacy.masked true"),
        ({"privacy.noise": 1, "privacy.epsilon": 8}, "epsilon = 8 chooses it", "--privacy.epsilon 0"),
        (
            {"algorithm": "pfedmoe", "unseen.private": "average"},
            "unseen.private = average",
            "--unseen.private",
        ),
        ({"algorithm": "fedmix", "gate.batch_norm": True}, "gate has BatchNorm", "--gate.batch_norm false"),
        ({"model.pool": "shufflenet_v2_x0_5", "model.shared": "shufflenet_v2_x0_5"}, "variance", "cnn5"),
        ({"privacy.clip": 1e7, "privacy.noise": 1}, "the sum of 5 updates holds at most", "--privacy.clip "),
        ({"privacy.noise": 3e5}, "privacy.noise = 300000 is too large", "--privacy.noise 65500"),
        ({"privacy.clip": 1e-9, "privacy.noise": 1}, "close to the sum's unit", "raise --privacy.clip"),
        ({"privacy.epsilon": 1e-9}, "privacy.epsilon = 1e-09 needs noise", "raise --privacy.epsilon"),
    ],
)
def test_a_combination_is_refused_with_a_remedy(changes: dict[str, Any], problem: str, remedy: str) -> None:
    given = {name.replace(".", "__"): value for name, value in changes.items()}
    with pytest.raises(ConfigError) as error:
        built(given.pop("algorithm", "fedavg"), **given)
    assert problem in error.value.problem and remedy in error.value.remedy


def test_poisson_cohorts_of_a_method_that_draws_its_own_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws cohorts of its own"):
        built("ensemble", privacy__clip=0.0, privacy__sampling="poisson")


def test_a_missing_accountant_is_refused_before_round_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match="dp-accounting"):
        built(privacy__noise=1.0)


def test_a_restart_keeps_what_epsilon_is_computed_from() -> None:
    before = config.to_tree(Case("fedavg", CLIP).settings())
    before["privacy"] |= {"neighbours": 4}  # which an earlier version let pass without masks
    for name, value in (("participation", 0.5), ("privacy.clip", 2.0), ("privacy.sampling", "poisson")):
        with pytest.raises(ConfigError, match=f"{name}: "):
            restart.override_settings(before, {name: value}, restart._fixed(before))
    unprotected = config.to_tree(Case("fedavg", {}).settings())
    restart.override_settings(unprotected, {"participation": 0.5}, restart._fixed(unprotected))
    restart.override_settings(before, {"rounds": 9}, restart._fixed(before))


def test_a_restart_keeps_the_rounds_for_which_epsilon_chose_the_noise() -> None:
    before = config.to_tree(built(privacy__epsilon=8.0).config)
    for name, value in (("rounds", 9), ("privacy.delta", 1e-3)):
        with pytest.raises(ConfigError, match=f"cannot be changed now: {name}"):
            restart.override_settings(before, {name: value}, restart._fixed(before))


# The wire


def test_conformance_checks_that_contributions_are_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks on them, and noise in the server's vector; a longer update is found."""
    given = {**CLIP, "privacy.clip": 0.01, "privacy.noise": 0.5}
    masked = Case("fedavg", {**given, "privacy.masked": True}).settings(rounds=1)
    for settings in (masked, Case("fedem", given).settings(rounds=2, faults__dropout=0.3)):
        assert not traffic_errors(launch.start().split(0), settings, tmp_path)
    encode = ClientRelease.encode
    monkeypatch.setattr(
        ClientRelease, "encode", lambda self, values: encode(replace(self, clip=0.02), values)
    )
    errors = traffic_errors(launch.start().split(0), masked, tmp_path)
    assert any("block 'model' of the sum: more than the method returned" in error for error in errors)


# Ranks and restarts


def test_noise_and_cohorts_repeat_on_any_ranks_and_after_any_restart() -> None:
    given = {**CLIP, "privacy.noise": 0.8, "privacy.sampling": "poisson"}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value).lower())]
    code, output = run_conformance("pfedmoe", "--check", "ranks,midround", *flags, timeout=200)
    assert code == 0 and output.count(": pass") == 2, output
