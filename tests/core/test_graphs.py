"""What surrounds the capture of a step as a CUDA graph: which steps, when anew, and what if it fails.

A function that runs the step again stands in for the graph; `tests/test_gpu.py` captures on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.graphs import Graphs
from support.one_client import BOTH, SPLIT, Player, phase

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"optimiser": "adamw", "epochs": 2},
    {"accumulate": 2, "epochs": 2, "clip": 0.5},
    {"steps": 7},
]


class Recorder:
    """A stand-in for `capture`, which warms up and counts."""

    def __init__(self, fails: bool = False) -> None:
        self.captured = self.replayed = 0
        self._fails = fails

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        work()
        if self._fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def play(
    recorder: Recorder | None, *phases: Any, rounds: tuple[int, ...] = (1, 1), **train: Any
) -> list[Tensor]:
    """Return the vectors after a client step per round; each continues from the one before."""
    player = Player(*phases, batch=6, **train)
    if recorder:
        player.engine = replace(player.engine, graphs=Graphs(6, recorder))
    found = []
    for number, round in enumerate(rounds):
        rows = slice(0, 25 - 6 * number)  # 6·4 + 1, 6·3 + 1 samples: the last batch has seven
        player.client.splits = {**player.client.splits, "train": Split(SPLIT.x[rows], SPLIT.y[rows])}
        turn, shared, player.client.vector = player.step(round)
        found += [shared, player.client.vector, torch.tensor(turn.loss)]
    return found


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_replayed_steps_give_the_same_bits(settings: dict[str, Any]) -> None:
    recorder, chosen = Recorder(), phase(BOTH, **settings)
    for mine, plain in zip(play(recorder, chosen), play(None, chosen), strict=True):
        assert torch.equal(mine, plain)
    assert recorder.captured == 1 and recorder.replayed >= 2


def test_a_step_is_captured_once_per_phase_and_learning_rate() -> None:
    recorder = Recorder()
    play(recorder, phase(BOTH), phase({"own": 0.03}), rounds=(1, 1, 1))
    assert recorder.captured == 2 and recorder.replayed == 2 * (3 + 2 + 1), "not the smaller batches"
    changing = Recorder()
    play(changing, phase(BOTH), rounds=(1, 2, 2), schedule="exponential", gamma=0.5)
    assert changing.captured == 2, "the learning rate is a constant of the graph"
    for mine, plain in zip(
        play(Recorder(), phase(BOTH), rounds=(1, 2), schedule="exponential", gamma=0.5),
        play(None, phase(BOTH), rounds=(1, 2), schedule="exponential", gamma=0.5),
        strict=True,
    ):
        assert torch.equal(mine, plain)


def test_a_step_that_cannot_be_captured_is_computed_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(fails=True)
    with caplog.at_level(logging.WARNING):
        found = play(recorder, phase(BOTH, momentum=0.9))
    for mine, plain in zip(found, play(None, phase(BOTH, momentum=0.9)), strict=True):
        assert torch.equal(mine, plain)
    (record,) = caplog.records
    said = record.getMessage()
    assert "train.graphs = on" in said and said.endswith("stream is capturing") and "shared, own" in said


def test_a_loss_of_one_client_is_not_captured() -> None:
    recorder = Recorder()
    player = Player(phase(BOTH), batch=6)
    player.engine = replace(player.engine, graphs=Graphs(6, recorder))
    turn = player.turn()
    turn.sgd(phase(BOTH), loss=lambda batch: player.method.loss(turn.parts, batch))
    assert not recorder.captured
