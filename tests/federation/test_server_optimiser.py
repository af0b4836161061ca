"""The server's optimiser against the paper's equations, what it leaves alone, and the methods it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.algorithms.base import Mean
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config.sections import Server
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.federation import server_optimiser
from pfedmoe_mpi.federation.server_optimiser import ServerOptimiser
from support.mpi_job import run_conformance

# Two parts: one averaged in every round, one only in some; each has parameters, then running statistics.
LAYOUT = Layout.join({name: Layout.of(nn.BatchNorm1d(20)) for name in ("often", "seldom")})
OFTEN, SELDOM = (slice(start, start + 40) for start in (0, 80))  # their parameters
BUFFERS = [slice(40, 80), slice(120, 160)]


def reference(optimiser: str, x: np.ndarray, means: list[np.ndarray], settings: Server) -> list[np.ndarray]:
    """Return x after every round by Algorithm 2 of Reddi et al. (FedAdam, FedYogi), or FedAvgM."""
    eta, tau, (beta1, beta2) = settings.rate, settings.tau, settings.betas
    m, v, after = np.zeros_like(x), np.full_like(x, tau**2), []
    for mean in means:
        delta = mean - x
        if optimiser == "momentum":
            m = settings.momentum * m + delta
            x = x + eta * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            if optimiser == "adam":
                v = beta2 * v + (1 - beta2) * delta**2
            else:
                v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            x = x + eta * m / (np.sqrt(v) + tau)
        after.append(x)
    return after


@pytest.mark.parametrize(
    ("optimiser", "others"),
    [
        ("momentum", {}),
        ("adam", {}),
        ("yogi", {}),
        ("momentum", {"lr": 0.3, "momentum": 0.5}),
        ("yogi", {"lr": 0.1, "betas": (0.5, 0.6), "tau": 0.1}),
    ],
)
def test_steps_are_those_of_the_paper(
    optimiser: str, others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_optimiser, "PIECE", 7)  # pieces that do not divide the parts
    settings = Server(optimiser=optimiser, **others)
    server, draw = ServerOptimiser(settings, LAYOUT), np.random.default_rng(3)
    state = torch.from_numpy(draw.standard_normal(160).astype(np.float32))
    start, rounds = state.numpy().astype(float), range(1, 9)
    trained = [n for n in rounds if n % 3]  # rounds in which somebody trained the part `seldom`
    targets = {n: start + draw.standard_normal(160) * 10.0 ** draw.integers(-4, 1, 160) for n in rounds}
    kept: dict[str, list[np.ndarray]] = {"often": [], "seldom": []}
    for n in rounds:
        before, mean = state.clone(), torch.from_numpy(targets[n].astype(np.float32))
        sent = {"often": True, "seldom": n in trained}
        for name, place in LAYOUT.parts.items():
            state[place] = mean[place] if sent[name] else state[place]  # as the default server_update does
        means = {
            name: Mean(mean[place].view(1, -1), torch.tensor([int(sent[name])]))
            for name, place in LAYOUT.parts.items()
        }
        server.update(before, state, means)
        server.update(
            before, before.clone(), means
        )  # again, as after a stop: only `commit` keeps the moments
        again = state.clone()
        for name, place in LAYOUT.parts.items():
            again[place] = mean[place] if sent[name] else before[place]
        server.update(before, again, means)
        assert torch.equal(again, state)
        server.commit()
        for place, name in zip(BUFFERS, LAYOUT.parts, strict=True):
            assert torch.equal(state[place], mean[place] if sent[name] else before[place]), "statistics"
        kept["often"].append(state[OFTEN].numpy())
        kept["seldom"] += [state[SELDOM].numpy()] if n in trained else []
    for name, place, chosen in (("often", OFTEN, rounds), ("seldom", SELDOM, trained)):
        wanted = reference(optimiser, start[place], [targets[n][place] for n in chosen], settings)
        np.testing.assert_allclose(kept[name][-1], wanted[-1], rtol=1e-6, atol=1e-6, err_msg=name)
        assert len(wanted) == len(kept[name]) and not np.allclose(wanted[-1], targets[8][place], atol=1e-3)
    assert server.moments.shape == (settings.moments, 160)
    assert not server.moments[0][BUFFERS[0]].any(), "running statistics have no moments"


def test_without_momentum_the_server_is_at_the_mean() -> None:
    server = ServerOptimiser(Server(optimiser="momentum", momentum=0.0), LAYOUT)
    before, mean = torch.randn(160), torch.randn(160)
    state = mean.clone()
    server.update(before, state, {"often": Mean(mean[:80].view(1, -1), torch.tensor([3]))})
    torch.testing.assert_close(state, mean)


def test_rows_without_a_contribution_are_unchanged() -> None:
    """A block of several rows, as a method may send a layer row by row."""
    layout = Layout.join({"head": Layout.of(nn.Linear(4, 3, bias=False))})
    server, before = ServerOptimiser(Server(optimiser="adam"), layout), torch.ones(12)
    mean, weight = torch.full((3, 4), 2.0), torch.tensor([5, 0, 1])
    state = torch.where((weight > 0)[:, None], mean, 1.0).view(-1)
    server.update(before, state, {"head": Mean(mean, weight)})
    server.commit()
    moved = (state != 1).view(3, 4)
    assert moved[0].all() and moved[2].all() and not moved[1].any()
    assert not server.moments[0][4:8].any() and server.moments[1][4:8].unique().tolist() == [
        pytest.approx(1e-6)
    ]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--algorithm scaffold", "the server of scaffold has an update of its own in place of a mean"),
        ("--algorithm fedkd", "the server of fedkd has an update of its own"),
        ("--algorithm fedproto", "the server of fedproto averages no parameters"),
        ("--algorithm fedssa", "the server of fedssa averages no parameters"),
        ("--algorithm standalone", "the server of standalone averages no parameters"),
        ("--pfedmoe.share false", "the server of pfedmoe averages no parameters"),
        ("--unseen.private average --unseen.clients 1", "parts that no client starts from"),
    ],
)
def test_server_without_a_mean_of_parameters_is_refused(
    assert_refused: Callable[..., str], small_run: tuple[str, ...], flags: str, reason: str
) -> None:
    chosen = (*small_run, "--model.pool", "mlp5", "--run.dir", "run", "--server.optimiser", "yogi")
    message = assert_refused(f"server.optimiser = yogi, but .*{reason}", *chosen, *flags.split())
    assert "remedy: remove --server.optimiser" in message


def test_restart_and_evaluation_keep_the_optimiser(
    run: Path, run_command: Callable[..., Any], assert_refused: Callable[..., str]
) -> None:
    """A run without an optimiser writes no moments, and gets none later."""
    newest = checkpoint.newest_first(run / "checkpoints")[0]
    with Checkpoint(newest) as loaded:
        assert len(loaded.moments) == 0
    refusal = "server.optimiser: none → yogi"
    assert_refused(refusal, "restart", run, "--rounds", "4", "--server.optimiser", "yogi")
    assert_refused(refusal, "evaluate", newest, "--server.optimiser", "yogi")


METHODS = ("fedavg", "fedjets")


@pytest.mark.timeout(400)
def test_methods_conform_with_other_optimisers() -> None:
    """The same bits on any number of ranks, after a restart and a stop in a round, and no other traffic."""
    settings = ("train.optimiser=adamw", "server.optimiser=yogi", "train.steps=7", "train.accumulate=2")
    flags = [f"--{setting}" for setting in settings]
    code, output = run_conformance(*METHODS, "--check=wire,ranks,restart,midround", *flags, timeout=350)
    assert code == 0 and output.count(": pass") == 4 * len(METHODS), output
