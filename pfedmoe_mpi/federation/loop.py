"""The only round loop: sample, train, sum, update, evaluate, sum, record, checkpoint.

Both sums are the same call on every rank in every round, a stopped one included; whether to update or to save
is read from their result, so all ranks decide alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import CheckpointError, RunError, StoppedError
from pfedmoe_mpi.federation import evaluation, lending, metrics, placement, pretraining
from pfedmoe_mpi.federation.faults import Faults
from pfedmoe_mpi.federation.federation import Federation, pinned
from pfedmoe_mpi.federation.metrics import EvaluationSum, Row
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, LATE, LOST, MISSING, RoundSum
from pfedmoe_mpi.federation.saver import Listener, Saver
from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.device import rss_mb


class Observer(Listener, Protocol):
    """Who is told of what happens, on every rank; rank 0's writes the run folder."""

    def pretrained(self, line: str) -> None: ...

    def round_done(self, row: Row, history: Sequence[Row]) -> None: ...

    def dropped(self, round: int, clients: Sequence[int]) -> None: ...


class SilentObserver:
    """An observer that does nothing."""

    def pretrained(self, line: str) -> None: ...

    def round_done(self, row: Row, history: Sequence[Row]) -> None: ...

    def dropped(self, round: int, clients: Sequence[int]) -> None: ...

    def written(self, path: Path, history: Sequence[Row], partial: bool) -> None: ...

    def not_written(self, error: CheckpointError) -> None: ...


class Loop:
    """A federation in motion: `round` rounds are done, `state` is the server's vector after them."""

    def __init__(
        self, comm: Comm, federation: Federation, observer: Observer, checkpoints: Path | None
    ) -> None:
        self.comm = comm
        self.federation = federation
        self.round = 0
        self.state = pinned(federation.workbench.initial(federation.method.state()), federation.device.device)
        self.history: list[Row] = []
        self.saver = Saver(comm, federation, checkpoints, observer)
        self.steps = 0  # client steps finished since this program started, on all ranks
        self._faults = Faults(federation.config.seed, federation.config.faults, federation.costs)
        self._observer = observer
        self._partial: np.ndarray | None = None
        self._pretrained = self._prepared = False
        self._longest_round = 0.0
        self._seconds = dict.fromkeys(("train", "evaluate", "sum", "wait"), 0.0)
        self._keep_time(0.0)

    @property
    def _method(self) -> Algorithm:
        return self.federation.method

    def resume(self, loaded: checkpoint.Checkpoint) -> None:
        """Take up a verified checkpoint whose federation is this one; every rank reads its own clients."""
        self.round, self.history = loaded.round, list(loaded.history)
        self._pretrained = True
        self.state.copy_(torch.from_numpy(loaded.state))
        for client in self.federation.clients.values():
            client.vector.copy_(torch.from_numpy(loaded.vector(client.id)))
        self._partial = loaded.partial

    def evaluation(self) -> Row:
        """Measure all clients as they are, with the server's state.

        Raises:
            StoppedError: on all ranks, if a stop was asked for.
        """
        measured = self._evaluate(self.round, self.state)
        self._sum(measured.buffer, "evaluation")
        if measured.stopped:
            raise StoppedError
        return metrics.evaluated(measured, self.federation.task.absent(self.round))

    # Rounds

    def run(self) -> bool:
        """Play the rounds that are left; False if stopped."""
        settings = self.federation.config
        if not self.begin():
            return False
        while self.round < settings.rounds:
            if not self.run_round():
                return False
        return True

    def begin(self) -> bool:
        """What a method does before round 1, once; False if stopped, with a checkpoint if it had trained."""
        with self.comm.located("before round 1"):
            if not self._pretrained:
                line = pretraining.pretrain(self.comm, self.federation, self.state)
                if line is None:
                    return False
                self._pretrained = True
                self._observer.pretrained(line)
            if not self._prepared:
                self._prepared = pretraining.prepare(self.comm, self.federation, self.state)
            if self._prepared:
                return True
            if not self.round and self._partial is None:
                self.save(last=True)
            return False

    def run_round(self) -> bool:
        """Play the next round; False if stopped with a checkpoint.

        Raises:
            RunError: on all ranks: all members diverged, or checkpoints cannot be written.
        """
        with self.comm.located(f"round {self.round + 1}"):
            return self._run_round(self.round + 1)

    def _run_round(self, round: int) -> bool:
        started = time.perf_counter()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        total, before = self._train(round)
        self._sum(total.buffer, f"sum of round {round}")
        self.steps += int((total.flags != MISSING).sum()) - before
        if total.stopped:
            self._save_stopped(total)
            return False
        self._check_divergence(total)
        state = self._updated(total)
        measured = self._evaluate(round, state, self._evaluated(round))
        self._sum(measured.buffer, f"evaluation of round {round}")
        if measured.stopped:
            self._save_stopped(total)
            return False
        self.state, self.round = state, round
        seconds = time.perf_counter() - started
        self._record(total, measured, seconds)
        self._keep_time(seconds)
        return True

    def _keep_time(self, seconds: float) -> None:
        self._longest_round = max(self._longest_round, seconds)
        self.comm.timeout = self.federation.config.run.timeout or max(600.0, 10 * self._longest_round)

    def _sum(self, buffer: np.ndarray, purpose: str) -> None:
        started = time.perf_counter()
        waited = self.comm.sum(buffer, purpose)
        self._seconds["wait"] += waited
        self._seconds["sum"] += time.perf_counter() - started - waited

    # Training

    def _train(self, round: int) -> tuple[RoundSum, int]:
        """This rank's share of the round's contributions, a stop leaving members MISSING; how many members an
        interrupted round had already finished.
        """
        federation = self.federation
        cohort = self._method.cohort(round)
        total = RoundSum(self._task(round), cohort, self._method.payload(federation.state_layout.sizes))
        finished = self._take_partial(total)
        left = {
            client: federation.costs[client]
            for (client, _), done in zip(cohort, finished, strict=True)
            if not done
        }
        trainer = placement.trainers(left, federation.home, self.comm.size)
        here = {**federation.clients, **lending.lend(self.comm, federation, trainer)}
        started = time.perf_counter()
        try:
            for position, (client, role) in enumerate(cohort):
                if trainer.get(client) == self.comm.rank:
                    self.comm.poll()
                    with self.comm.located(f"client {client}, round {round}"):
                        self._step(total, position, here[client], round, role)
        except StoppedError:
            pass
        self._seconds["train"] = time.perf_counter() - started
        lending.give_back(self.comm, federation, trainer, here)
        if self.comm.stop_requested():
            total.request_stop()
        return total, int(finished.sum())

    def _task(self, round: int) -> Task:
        """The task with the samples that count in a round."""
        task, stream = self.federation.task, self.federation.stream
        return replace(task, counts=stream.counts(round)) if stream else task

    def _take_partial(self, total: RoundSum) -> np.ndarray:
        """An interrupted round's sum becomes rank 0's contribution; True for each member already in it."""
        if self._partial is None:
            return np.zeros(len(total.cohort), bool)
        finished = self._partial[1 : 1 + len(total.cohort)] != MISSING
        if self.comm.rank == 0:
            total.buffer[:] = self._partial
            total.buffer[0] = 0
        self._partial = None
        return finished

    def _step(self, total: RoundSum, position: int, client: Client, round: int, role: str) -> None:
        """One client's turn; its private vector changes only if the whole step is done and finite."""
        federation, method = self.federation, self._method
        try:
            parts = federation.parts(client, self.state)
            at_hand = federation.stream.of(client, round) if federation.stream else client
            turn = Turn(federation.engine, method.loss, at_hand, parts, round, role)
            values = dict(method.client_step(turn))
            parts.check()
            before = float("nan")
            if self._evaluated(round):
                tested = evaluation.measure(federation.engine, method, parts, client.splits["test"])
                assert tested
                before = tested.correct / tested.samples if tested.samples else before
            vector = federation.workbench.read(client.spec, parts, torch.empty_like(client.vector))
            if not bool(vector.sum().isfinite()):  # one pass; a sum beyond float32 is no model either
                raise NotFiniteError("its private vector is not finite")
            fate = self._faults.fate(round, client.id)
            if fate == IN:
                total.add(position, values, self._member_metrics(turn, before))
            else:
                total.leave_out(position, fate)
            client.vector.copy_(vector)
        except NotFiniteError as error:
            LOGGER.warning("client %d in round %d: %s", client.id, round, error)
            total.leave_out(position, DROPPED)

    def _member_metrics(self, turn: Turn, accuracy: float) -> dict[str, float]:
        """MEMBER_METRICS, but for what the payload itself tells."""
        down = 4 * self.federation.state_layout.size if turn.bytes_down is None else turn.bytes_down
        told = {"train_loss": turn.loss, "accuracy_before": accuracy, "bytes_down": down}
        return told if turn.bytes_up is None else {**told, "bytes_up": turn.bytes_up}

    def _evaluated(self, round: int) -> bool:
        settings = self.federation.config
        return round % settings.eval.every == 0 or round == settings.rounds

    # After the sum

    def _check_divergence(self, total: RoundSum) -> None:
        """Tell who was left out as not finite; the run ends if it is the whole cohort, or so configured."""
        diverged = total.clients(DROPPED)
        self._observer.dropped(self.round + 1, diverged)
        everyone = len(diverged) == len(total.cohort)
        if diverged and (everyone or self.federation.config.faults.nonfinite == "stop"):
            total.forget(DROPPED)
            who = "every client of the cohort" if everyone else f"client {', '.join(map(str, diverged))}"
            lower = "lower --train.lr, --train.lr_shared and --train.lr_gate, or set --train.clip"
            self._end_diverged(total, f"the loss, gradient or vector of {who}", lower)

    def _end_diverged(self, total: RoundSum, what: str, lower: str) -> NoReturn:
        """The run's end on all ranks, with a checkpoint of whom this round has trained."""
        self._save_stopped(total)
        raise RunError(
            f"round {self.round + 1}: {what} is not finite",
            f"{lower}; `restart` of the run folder goes on with that from there",
        )

    def _updated(self, total: RoundSum) -> torch.Tensor:
        """The server's next vector; nobody's contribution leaves it as it is."""
        state = pinned(self.state.clone(), self.federation.device.device)
        if not total.clients(IN):
            return state
        method = self._method
        slices = self.federation.state_layout.parts
        overridden = type(method).server_update is not Algorithm.server_update
        if not overridden or self.comm.rank == 0:
            by_name = {name: state[place] for name, place in slices.items()}
            try:
                method.server_update(by_name, total.means(), self.round + 1)
            except StoppedError:  # the evaluation meets it too, and this state is never used
                pass
            except NotFiniteError:
                state.fill_(math.inf)  # tells all ranks
        if overridden:
            self.comm.broadcast(state.numpy(), "server state")
            if bool(state.isinf().any()):
                lower = (
                    "lower --train.lr_shared or set --train.clip; a rate of the method's own needs a new run"
                )
                self._end_diverged(total, "what the server trained", lower)
        return state

    def _evaluate(self, round: int, state: torch.Tensor, due: bool = True) -> EvaluationSum:
        """Return this rank's share of the evaluation, with the seconds of the round so far."""
        started = time.perf_counter()
        result = evaluation.evaluate(self.comm, self.federation, state, round, due)
        self._seconds["evaluate"] = time.perf_counter() - started
        result.ranks[self.comm.rank] = [*self._seconds.values(), rss_mb()]
        return result

    def _record(self, total: RoundSum, measured: EvaluationSum, seconds: float) -> None:
        federation = self.federation
        task = self._task(self.round)
        samples = [task.samples(k) for k in range(task.clients)]
        tested = [len(rows) for rows in federation.partition.test]
        row = metrics.row(
            self.round,
            total,
            measured,
            samples,
            tested,
            unseen=task.absent(self.round),
            share=federation.stream.share(self.round) if federation.stream else None,
            bytes_once=self._method.bytes_once,
            seconds=seconds,
            simulated=self._faults.waited(client for client, _ in total.cohort),
        )
        row["drift"] = metrics.drift([*self.history, row])
        self.history.append(row)
        shown = dict(row)
        last = self.round == federation.config.rounds
        if self.round % federation.config.run.checkpoint_every == 0 or last:
            started = time.perf_counter()
            self.save(last)
            write = time.perf_counter() - started
            shown["seconds"] = {**row["seconds"], "write": write, "total": seconds + write}
        self._observer.round_done(shown, self.history)

    # Checkpoints

    def save(self, last: bool = False) -> None:
        """Write a checkpoint of the rounds done; collective."""
        self.saver.rounds(self.round, self.state.numpy(), self.history, last)

    def _save_stopped(self, total: RoundSum) -> None:
        """A round in progress as a partial checkpoint; as the complete one before it if nobody finished."""
        total.buffer[0] = 0
        finished = total.clients(IN, DROPPED, LOST, LATE)
        if finished:
            self.saver.partial(self.round, self.state.numpy(), self.history, total.buffer, finished)
        elif not self.saver.has(self.round):
            self.save(last=True)
