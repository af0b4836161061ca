"""The only round loop: sample, train, sum, update, evaluate, sum, record, checkpoint.

Every rank calls both sums in every round, even in a stopped one. All ranks read from the result whether to
update or to save, so they all decide the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.checkpoint.confusion import Confusion
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.errors import CheckpointError, DivergedError, StoppedError
from pfedmoe_mpi.federation import drift, evaluation, fork, metrics, pretraining, selection, store, training
from pfedmoe_mpi.federation.faults import Faults
from pfedmoe_mpi.federation.federation import Federation, pin
from pfedmoe_mpi.federation.initial_values import begin_private_parts
from pfedmoe_mpi.federation.masked_round import exchange_keys, opened
from pfedmoe_mpi.federation.metrics import EvaluationSum, Row
from pfedmoe_mpi.federation.privacy_account import account_of
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, LATE, LOST, MISSING, RoundSum
from pfedmoe_mpi.federation.saver import Listener, Saver
from pfedmoe_mpi.federation.server_optimiser import ServerOptimiser
from pfedmoe_mpi.mpi.comm import TIMEOUT, Comm
from pfedmoe_mpi.mpi.device import peak_rss_mib


class Observer(Listener, Protocol):
    """A receiver of a run's events, on every rank; that of rank 0 writes the run folder."""

    def pretrained(self, line: str) -> None: ...

    def client_trained(self, round: int, done: int, members: int) -> None:
        """Receive how many of this rank's members of the round have trained."""

    def round_done(self, row: Row, history: Sequence[Row]) -> None: ...

    def dropped(self, round: int, clients: Sequence[int]) -> None: ...


class SilentObserver:
    """An observer that does nothing."""

    def pretrained(self, line: str) -> None: ...

    def client_trained(self, round: int, done: int, members: int) -> None: ...

    def round_done(self, row: Row, history: Sequence[Row]) -> None: ...

    def dropped(self, round: int, clients: Sequence[int]) -> None: ...

    def check_folder(self) -> None: ...

    def written(self, path: Path, history: Sequence[Row], candidate: bool) -> None: ...

    def not_written(self, error: CheckpointError) -> None: ...


def is_finished(settings: Config, history: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all rounds are done, or none was better on validation for `run.patience` rounds."""
    return len(history) >= settings.rounds or selection.exhausted(
        history, settings.run.patience, settings.run.forked
    )


class Loop:
    """A federation in training: `round` rounds are done, `state` is the server's vector after them."""

    def __init__(
        self, comm: Comm, federation: Federation, observer: Observer, checkpoints: Path | None
    ) -> None:
        self.comm = comm
        self.federation = federation
        self.round = 0
        self.state = pin(federation.workbench.initial(federation.method.state()), federation.device.device)
        self.history: list[Row] = []
        self.server = ServerOptimiser(federation.config.server, federation.state_layout)
        if checkpoints and not federation.config.run.scratch:
            federation.store.folder = checkpoints.parent
        self.saver = Saver(comm, federation, checkpoints, observer, self.server)
        self.steps = 0  # client steps finished since this program started, on all ranks
        self._samples = federation.task.counts.sum(axis=1)
        self._tested = federation.partition.test.sizes
        self._faults = Faults(federation.config.seed, federation.config.faults, federation.costs)
        self._account = None if comm.rank else account_of(federation)
        self._observer = observer
        self._partial: np.ndarray | None = None  # the sum of an interrupted round
        self._pretrained = self._prepared = False
        self._longest_round = 0.0
        self._seconds = dict.fromkeys(metrics.PHASES, 0.0)  # of this rank in this round
        self._keep_time(0.0)

    @property
    def _method(self) -> Algorithm:
        return self.federation.method

    def resume(self, loaded: checkpoint.Checkpoint) -> None:
        """Continue from a verified checkpoint of this federation; not collective.

        Its files stay: a client's vector is read from them when the client trains or is measured.
        """
        self.round = loaded.round
        self.history = [metrics.for_rank(row, self.comm.rank) for row in loaded.history]
        self._pretrained = True
        self.state.copy_(torch.from_numpy(loaded.state))
        first = torch.from_numpy(loaded.first_state)
        begin_private_parts(self.federation, first if len(first) else self.state)
        self.saver.resume(loaded)
        self._partial = loaded.partial
        self.saver.confusion = loaded.confusion
        self.server.load(torch.from_numpy(loaded.moments))

    def fork(self, loaded: checkpoint.Checkpoint) -> None:
        """Continue a fork from a run's complete rounds, in which parts may be missing; not collective.

        What the server's optimiser keeps begins anew. Clients' vectors are read from the run's checkpoint
        until the fork has one of its own, which must be written before anything else.
        """
        self.round = loaded.round
        self.history = [metrics.for_rank(row, self.comm.rank) for row in loaded.history]
        self._pretrained = True
        self.saver.trained(fork.begin(self.federation, self.state, loaded))

    def evaluation(self) -> Row:
        """Measure all clients with the server's state, without training; collective.

        Raises:
            StoppedError: on all ranks: a stop was asked for.
        """
        everyone = np.arange(self.federation.task.clients)
        measured = self._evaluate(self.round, self.state, "evaluation", everyone)
        if measured.stopped:
            raise StoppedError
        return metrics.evaluation_metrics(measured, self.federation.task.absent_clients(self.round))

    # Rounds

    def run(self) -> bool:
        """Train the remaining rounds; return False if stopped."""
        if not self.begin():
            return False
        while not self.finished:
            if not self.run_round():
                return False
        return True

    @property
    def finished(self) -> bool:
        """Whether no round is left to train."""
        return is_finished(self.federation.config, self.history)

    def begin(self) -> bool:
        """Do once what the method needs before round 1; return False if stopped.

        A stop after pretraining leaves a checkpoint.
        """
        with self.comm.located("before round 1"):
            if not self._pretrained:
                line = pretraining.pretrain(self.comm, self.federation, self.state)
                if line is None:
                    return False
                self._pretrained = True
                self._observer.pretrained(line)
                begun = begin_private_parts(self.federation, self.state)
                self.saver.began(self.state)
                self.saver.trained(begun)
                if begun:
                    store.check(self.comm, self.federation.store)
            if not self._prepared:
                self._prepared = pretraining.prepare(self.comm, self.federation, self.state)
            if self._prepared:
                return True
            if not self.round and self._partial is None:
                self.save(last=True)
            return False

    def run_round(self) -> bool:
        """Train the next round; return False if stopped with a checkpoint.

        Raises:
            RunError: on all ranks: all members diverged, or checkpoints cannot be written.
        """
        with self.comm.located(f"round {self.round + 1}"):
            return self._run_round(self.round + 1)

    def _run_round(self, round: int) -> bool:
        started = time.perf_counter()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        total = self._train(round)
        if total.stopped:
            self._save_stopped(total)
            store.check(self.comm, self.federation.store)
            return False
        self._check_divergence(total)
        state = self._updated(total)
        drawn = evaluation.drawn_clients(self.federation.config, round, [k for k, _ in total.cohort])
        measured = self._evaluate(round, state, f"evaluation of round {round}", drawn)
        if measured.stopped:
            self._save_stopped(total)
            return False
        self.state, self.round = state, round
        self.server.commit()
        if len(drawn):
            counts, clients = measured.confusion, self.federation.task.clients
            self.saver.confusion = None if counts is None else Confusion.of(round, counts, drawn, clients)
        seconds = time.perf_counter() - started
        self._record(total, measured, seconds)
        self._keep_time(seconds)
        return True

    def _keep_time(self, seconds: float) -> None:
        """Let ranks wait for each other for ten times the longest round, unless `run.timeout` is set."""
        self._longest_round = max(self._longest_round, seconds)
        self.comm.timeout = self.federation.config.run.timeout or max(TIMEOUT, 10 * self._longest_round)

    def _sum(self, buffer: np.ndarray, purpose: str) -> None:
        """Add a buffer up over all ranks, in place, and keep the seconds of waiting and of summing."""
        started = time.perf_counter()
        waited = self.comm.sum(buffer, purpose)
        self._seconds["wait"] += waited
        self._seconds["sum"] += time.perf_counter() - started - waited

    # Training

    def _train(self, round: int) -> RoundSum:
        """Return the sum of the cohort's contributions over all ranks; a stop leaves members MISSING."""
        federation = self.federation
        payload = self._method.payload(federation.state_layout.sizes)
        release = federation.private.release(self.state, round) if federation.private else None
        total = RoundSum(self._task(round), self._method.cohort(round), payload, release)
        finished = self._take_partial(total)
        exchange_keys(self.comm, federation, total, round)
        self._seconds["train"] = training.train_cohort(
            self.comm,
            federation,
            self._faults,
            total,
            finished.tolist(),
            self.state,
            round,
            tested=len(evaluation.drawn_clients(federation.config, round, ())) > 0,
            trained=partial(self._observer.client_trained, round),
        )
        self._sum(total.sent, f"sum of round {round}")
        self.steps += int((total.flags != MISSING).sum() - finished.sum())
        before = {client for (client, _), done in zip(total.cohort, finished, strict=True) if done}
        self.saver.trained(client for client in total.clients(IN, LOST, LATE) if client not in before)
        return total

    def _task(self, round: int) -> Task:
        """Return the task with the samples that count in a round."""
        task, stream = self.federation.task, self.federation.stream
        return replace(task, counts=stream.counts(round)) if stream else task

    def _take_partial(self, total: RoundSum) -> np.ndarray:
        """Return for each member whether an interrupted start of this round has trained it, (members,) bool.

        The interrupted start's sum becomes rank 0's contribution.
        """
        if self._partial is None:
            return np.zeros(len(total.cohort), bool)
        finished = self._partial[1 : 1 + len(total.cohort)] != MISSING
        if self.comm.rank == 0:
            total.buffer[:] = self._partial
            total.buffer[0] = 0
        self._partial = None
        return finished

    # After the sum

    def _check_divergence(self, total: RoundSum) -> None:
        """Report members that are not finite; end the run if `faults.nonfinite = stop`, or if all are.

        Raises:
            RunError: on all ranks.
        """
        diverged = total.clients(DROPPED)
        self._observer.dropped(self.round + 1, diverged)
        everyone = len(diverged) == len(total.cohort)
        if diverged and (everyone or self.federation.config.faults.nonfinite == "stop"):
            total.forget(DROPPED)
            who = "every client of the cohort" if everyone else f"client {', '.join(map(str, diverged))}"
            self._end_diverged(
                total,
                f"the loss, gradient or vector of {who}",
                "`restart RUN_DIR` with a lower --train.lr, --train.lr_shared and --train.lr_gate, or with "
                "--train.clip, resumes from the checkpoint",
            )

    def _end_diverged(self, total: RoundSum, what: str, remedy: str) -> NoReturn:
        """End the run on all ranks, with a checkpoint of the members that this round has trained."""
        self._save_stopped(total)
        raise DivergedError(f"round {self.round + 1}: {what} is not finite", remedy)

    def _updated(self, total: RoundSum) -> torch.Tensor:
        """Return the server's next vector, unchanged if there is no sum.

        A method's own `server_update` runs on rank 0 alone, and its result is broadcast; the default one and
        the server's optimiser compute the same bits on every rank.

        Raises:
            RunError: on all ranks: what the server trained is not finite.
        """
        state = pin(self.state.clone(), self.federation.device.device)
        if not opened(self.comm, total):
            return state
        method = self._method
        slices = self.federation.state_layout.parts
        overridden = type(method).server_update is not Algorithm.server_update
        if not overridden or self.comm.rank == 0:
            by_name, means = {name: state[place] for name, place in slices.items()}, total.means()
            try:
                with self.comm.located(f"server update of round {self.round + 1}", alone=overridden):
                    method.server_update(by_name, means, self.round + 1)
                    self.server.update(self.state, state, means)
            except StoppedError:  # the evaluation stops too, and this state is never used
                pass
            except NotFiniteError:
                state.fill_(math.inf)  # all ranks recognise it after the broadcast
        if overridden:
            self.comm.broadcast(state.numpy(), "server state")
            if bool(state.isinf().any()):
                self._end_diverged(
                    total,
                    "the vector that the server trained",
                    "`restart RUN_DIR` with a lower --train.lr_shared or with --train.clip resumes from the "
                    "checkpoint; a change of the method's own learning rate needs a new run",
                )
        return state

    def _evaluate(self, round: int, state: torch.Tensor, purpose: str, clients: np.ndarray) -> EvaluationSum:
        """Return the evaluation of these clients by all ranks, with every rank's seconds in the round."""
        started = time.perf_counter()
        result = evaluation.evaluate(self.comm, self.federation, state, round, clients)
        self._seconds["evaluate"] = time.perf_counter() - started
        if self.comm.rank == 0 and self.saver.overdue:
            result.request_save()
        result.ranks[self.comm.rank] = [*self._seconds.values(), peak_rss_mib()]
        self._sum(result.buffer, purpose)
        return result

    def _record(self, total: RoundSum, measured: EvaluationSum, seconds: float) -> None:
        """Add the round's row to the history, save a checkpoint when one is due, and report the round."""
        federation = self.federation
        task = self._task(self.round)
        row = metrics.row(
            self.round,
            total,
            measured,
            task.counts.sum(axis=1) if federation.stream else self._samples,
            self._tested,
            unseen=task.absent_clients(self.round),
            share=federation.stream.share(self.round) if federation.stream else None,
            bytes_once=self._method.bytes_once,
            seconds=seconds,
            simulated=self._faults.waited(client for client, _ in total.cohort),
        )
        if self._account:
            row["privacy"] = self._account.entry(self.round)
        row["drift"] = drift.cost([*self.history, row])
        row = metrics.for_rank(row, self.comm.rank)
        self.history.append(row)
        reported = dict(row)  # with the seconds of writing the checkpoint that holds the row itself
        last = self.finished
        scheduled = self.round == 1 or self.round % federation.config.run.checkpoint_every == 0 or last
        scheduled = scheduled or selection.improved(self.history, federation.config.run.forked)
        if scheduled or measured.saves:
            started = time.perf_counter()
            self.save(last, scheduled)
            write = time.perf_counter() - started
            reported["seconds"] = {**row["seconds"], "write": write, "total": seconds + write}
        self._observer.round_done(reported, self.history)

    # Checkpoints

    def save(self, last: bool = False, candidate: bool = True) -> None:
        """Write a checkpoint of the complete rounds; collective. The arguments are as for `Saver.rounds`."""
        self.saver.rounds(self.round, self.state.numpy(), self.history, last, candidate)

    def _save_stopped(self, total: RoundSum) -> None:
        """Write a partial checkpoint of the round in progress, or a complete one if no member is done."""
        total.buffer[0] = 0
        finished = total.clients(IN, DROPPED, LOST, LATE)
        if finished:
            self.saver.partial(self.round, self.state.numpy(), self.history, total.buffer, finished)
        elif not self.saver.has(self.round):
            self.save(last=True)
