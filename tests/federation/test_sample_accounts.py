"""ε of DP-SGD: solved for, spent by rounds, in rows and in the plan."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.conformance.checks import Case
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.federation.privacy_account import check_fork
from pfedmoe_mpi.federation.sample_privacy import Account
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.report import epsilon_section
from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.run import console, restart
from support.sample_privacy import SAMPLE, built
from support.small_federation import plan_of


def test_rows_have_epsilon_of_what_is_sent_and_of_all() -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld

    def exact(noise: float, steps: int, probability: float = 1.0) -> float:
        """Return ε by privacy loss distributions, which are tight."""
        accountant = pld.PLDAccountant()
        event = GaussianDpEvent(noise)
        accountant.compose(PoissonSampledDpEvent(probability, event) if probability < 1 else event, steps)
        return float(accountant.get_epsilon(1e-5))

    found = {}
    for algorithm in ("ditto", "apfl", "standalone", "pfedmoe", "fedrep"):
        more = {"fedrep__head_epochs": 4} if algorithm == "fedrep" else {}
        federation = built(algorithm, privacy__noise=4.0, train__epochs=3, participation=1.0, **more)
        found[algorithm] = Account(federation).entry(5)
    expected = {
        "ditto": (exact(4, 15), exact(4, 30)),
        "apfl": (exact(4, 15), exact(4, 30)),  # √2 of sensitivity as twice the steps
        "standalone": (0.0, exact(4, 15)),
        "pfedmoe": (exact(4, 15), exact(4, 15)),
        "fedrep": (exact(4, 35), exact(4, 35)),  # the body learns from the head
    }
    run = Run(Path("run"), {}, [{"privacy": found["standalone"]}], [])
    assert epsilon_section.facts(run)[:2] == [
        ("ε of a sample at δ = 1e-05, of what a client sends", "0"),
        (
            "ε of a sample at δ = 1e-05, of a client's whole model",
            f"{found['standalone']['epsilon_private']:.3g}",
        ),
    ]
    for algorithm, pair in expected.items():
        row = found[algorithm]
        assert row["unit"] == "sample" and row["noise"] == 4.0 and row["delta"] == 1e-5
        for name, value in zip(("epsilon", "epsilon_private"), pair, strict=True):
            assert value <= row[name] <= 1.12 * value, (algorithm, name)

    federation = built("fedavg", privacy__noise=2.0, privacy__sampling="poisson", participation=1.0)
    sizes = federation.task.counts.sum(axis=1)
    values = [exact(2, 4 * math.ceil(n / 16), min(1, 16 / n)) for n in {*sizes.tolist()}]
    assert max(values) <= Account(federation).entry(4)["epsilon"] <= 1.12 * max(values)


def test_noise_is_solved_for_the_whole_run_and_not_for_more_rounds() -> None:
    chosen = {"privacy__epsilon": 3.0, "privacy__sampling": "poisson", "participation": 0.6}
    federation = built("ditto", **chosen)
    account = Account(federation)
    entries = [account.entry(round) for round in range(1, 5)]
    spent = [entry["epsilon_private"] for entry in entries]
    assert spent == sorted(spent) and 2.99 < spent[-1] <= 3.0
    assert Account(federation).entry(4) == entries[-1], "a restart counts the rounds before it"
    assert Account(built("ditto", privacy__noise=0.0)).entry(1)["epsilon"] is None, "infinite"

    settings = {
        "privacy__noise": 2.0,
        "privacy__sampling": "poisson",
        "participation": 1.0,
        "train__batch": 4,
    }
    drifting = {"stream__kind": "gradual", "stream__round": 2}
    whole, part = (Account(built("fedavg", **settings, **more)).entry(3) for more in ({}, drifting))
    assert part["epsilon"] > 1.1 * whole["epsilon"], "of fewer rows each is drawn more often"

    with pytest.raises(ConfigError, match="a fork adds the noise of its run") as error:
        check_fork(federation)
    assert "fork with --privacy.epsilon 0" in error.value.remedy
    check_fork(built("ditto", privacy__noise=0.0))


def test_a_restart_keeps_the_settings_that_epsilon_is_computed_from() -> None:
    before = config.to_tree(Case("fedavg", SAMPLE).settings())
    fixed = (("train.epochs", 2), ("participation", 0.5), ("privacy.noise", 3.0), ("privacy.delta", 1e-6))
    for name, value in fixed:
        with pytest.raises(ConfigError, match=f"{name}: "):
            restart.override_settings(before, {name: value}, restart._fixed(before))
    restart.override_settings(before, {"train.lr": 0.5}, restart._fixed(before))
    solved = config.to_tree(Case("fedavg", {**SAMPLE, "privacy.epsilon": 3.0}).settings())
    with pytest.raises(ConfigError, match="rounds: "):  # for which the noise was chosen
        restart.override_settings(solved, {"rounds": 9}, restart._fixed(solved))


def test_a_run_reports_epsilon_in_its_rows() -> None:
    federation = built("pfedmoe", privacy__noise=1.5, rounds=2)
    plan = plan_of(federation)
    (line,) = (line for line in plan if line.startswith("privacy: "))
    assert "keep it secret" in plan[plan.index(line) + 1]
    loop = Loop(launch.start(), federation, SilentObserver(), None)
    assert loop.run()
    assert [row["privacy"] for row in loop.history] == [Account(federation).entry(round) for round in (1, 2)]
    assert "noise 1.5 times the clip" in line and line in console.table(federation, loop.history)
