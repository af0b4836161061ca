"""The only round loop: sample, train, sum, update, evaluate, sum, record, checkpoint.

Both sums are the same call on every rank in every round, a stopped one included; whether to update or to save
is read from their result, so all ranks decide alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pfedmoe_mpi import checkpoint, config, metrics, placement, setup
from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import Content
from pfedmoe_mpi.client import Client
from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.data.shard import SPLITS, Split
from pfedmoe_mpi.device import rss_mb
from pfedmoe_mpi.errors import StoppedError
from pfedmoe_mpi.fixedpoint import NotFiniteError
from pfedmoe_mpi.metrics import EvaluationSum, Row
from pfedmoe_mpi.roundsum import DROPPED, IN, MISSING, RoundSum
from pfedmoe_mpi.setup import Federation
from pfedmoe_mpi.training import Turn, measure


class Observer(Protocol):
    """Who is told of what happens, on every rank; rank 0's writes the run folder."""

    def round_done(self, row: Row) -> None: ...

    def dropped(self, round: int, clients: Sequence[int]) -> None: ...

    def written(self, path: Path, history: Sequence[Row], partial: bool) -> None: ...


class Silent:
    """An observer that does nothing."""

    def round_done(self, row: Row) -> None: ...

    def dropped(self, round: int, clients: Sequence[int]) -> None: ...

    def written(self, path: Path, history: Sequence[Row], partial: bool) -> None: ...


class Loop:
    """A federation in motion: `round` rounds are done, `state` is the server's vector after them."""

    def __init__(
        self, comm: Comm, federation: Federation, observer: Observer, checkpoints: Path | None
    ) -> None:
        self.comm = comm
        self.federation = federation
        self.round = 0
        self.state = setup.pinned(
            federation.workbench.initial(federation.method.state()), federation.device.device
        )
        self.history: list[Row] = []
        self.identity: dict[str, str] = {}
        self._observer = observer
        self._checkpoints = checkpoints
        self._partial: np.ndarray | None = None
        self._written: Path | None = None
        self._longest_round = 0.0
        self._seconds = dict.fromkeys(("train", "evaluate", "sum", "wait"), 0.0)
        self._keep_time(0.0)

    @property
    def _method(self) -> Algorithm:
        return self.federation.method

    def resume(self, loaded: checkpoint.Checkpoint) -> None:
        """Take up a verified checkpoint whose federation is this one; every rank reads its own clients."""
        self.round, self.history = loaded.round, list(loaded.history)
        self.state.copy_(torch.from_numpy(loaded.state))
        for client in self.federation.clients.values():
            client.vector.copy_(torch.from_numpy(loaded.vector(client.id)))
        self._partial = loaded.partial

    def evaluation(self) -> Row:
        """Measure all clients as they are, with the server's state.

        Raises:
            StoppedError: on all ranks, if a stop was asked for.
        """
        evaluation = self._evaluate(self.federation.config.rounds, self.state)
        self._sum(evaluation.buffer, "evaluation")
        if evaluation.stopped:
            raise StoppedError
        return metrics.evaluated(evaluation)

    # Rounds

    def run(self) -> bool:
        """Play the rounds that are left; False if stopped with a checkpoint."""
        settings = self.federation.config
        while self.round < settings.rounds:
            if not self.play():
                return False
        return True

    def play(self) -> bool:
        """Play the next round; False if stopped with a checkpoint."""
        round = self.round + 1
        started = time.perf_counter()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        total = self._train(round)
        self._sum(total.buffer, f"sum of round {round}")
        if total.stopped:
            self._save_stopped(total)
            return False
        self._observer.dropped(round, total.clients(DROPPED))
        state = self._updated(total)
        evaluation = self._evaluate(round, state)
        self._sum(evaluation.buffer, f"evaluation of round {round}")
        if evaluation.stopped:
            self._save_stopped(total)
            return False
        self.state, self.round = state, round
        seconds = time.perf_counter() - started
        self._record(total, evaluation, seconds)
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

    def _train(self, round: int) -> RoundSum:
        """This rank's share of the round's contributions; a stop leaves members MISSING."""
        federation = self.federation
        cohort = self._method.cohort(round)
        sizes = {name: place.stop - place.start for name, place in federation.state_layout.parts.items()}
        total = RoundSum(federation.task, cohort, self._method.payload(sizes))
        finished = self._take_partial(total)
        left = {
            client: federation.costs[client]
            for (client, _), done in zip(cohort, finished, strict=True)
            if not done
        }
        trainer = placement.trainers(left, federation.home, self.comm.size)
        guests = self._lend(trainer)
        started = time.perf_counter()
        try:
            for position, (client, role) in enumerate(cohort):
                if trainer.get(client) == self.comm.rank:
                    self.comm.poll()
                    self._step(total, position, guests.get(client) or federation.clients[client], round, role)
        except StoppedError:
            pass
        self._seconds["train"] = time.perf_counter() - started
        self._return(trainer, guests)
        if self.comm.stop_requested():
            total.request_stop()
        return total

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
            parts = federation.workbench.parts((method.state(), self.state), (client.spec, client.vector))
            turn = Turn(federation.engine, method, client, parts, round, role)
            values = dict(method.client_step(turn))
            parts.check()
            before = float("nan")
            if self._evaluated(round):
                measured = measure(federation.engine, method, parts, client.splits["test"])
                before = measured.correct / measured.samples if measured.samples else before
            vector = federation.workbench.read(client.spec, parts, torch.empty_like(client.vector))
            if not bool(vector.sum().isfinite()):  # one pass; a sum beyond float32 is no model either
                raise NotFiniteError("its private vector is not finite")
            total.add(position, values, {"train_loss": turn.loss, "accuracy_before": before})
            client.vector.copy_(vector)
        except NotFiniteError as error:
            if federation.config.train.nonfinite == "stop":
                raise RuntimeError(f"client {client.id} in round {round}: {error}") from error
            total.drop(position)
        except StoppedError:
            raise
        except Exception as error:
            error.add_note(f"rank {self.comm.rank}, client {client.id}, round {round}")
            raise

    def _evaluated(self, round: int) -> bool:
        settings = self.federation.config
        return round % settings.eval.every == 0 or round == settings.rounds

    # Guests: cohort members trained away from home, to balance the round

    def _lend(self, trainer: dict[int, int]) -> dict[int, Client]:
        """Send the clients that train away from home; this rank's guests by client id."""
        home, rank = self.federation.home, self.comm.rank
        away = [client for client in sorted(trainer) if trainer[client] != home[client]]
        guests: dict[int, Client] = {}
        transfers = []
        for client in away:
            arrays: list[np.ndarray] = []
            if trainer[client] == rank:
                guests[client] = self._empty_guest(client)
                arrays = _arrays(guests[client])
            elif home[client] == rank:
                arrays = [np.ascontiguousarray(a) for a in _arrays(self.federation.clients[client])]
            transfers += [(home[client], trainer[client], array) for array in arrays]
        self.comm.move(transfers, "lending clients")
        where = self.federation.device.device
        for guest in guests.values():
            guest.splits = {s: Split(d.x.to(where), d.y.to(where)) for s, d in guest.splits.items()}
        return guests

    def _empty_guest(self, client: int) -> Client:
        federation = self.federation
        dtype = torch.from_numpy(np.empty(0, federation.dataset.dtype)).dtype
        lengths = {split: len(getattr(federation.partition, split)[client]) for split in SPLITS}
        splits = {
            split: Split(
                torch.empty((n, *federation.dataset.shape), dtype=dtype), torch.empty(n, dtype=torch.int64)
            )
            for split, n in lengths.items()
        }
        vector = torch.empty(federation.client_layouts[client].size)
        return Client(client, self._method.client_state(client), vector, splits)

    def _return(self, trainer: dict[int, int], guests: dict[int, Client]) -> None:
        """Send the guests' vectors home, changed or not."""
        home, rank = self.federation.home, self.comm.rank
        transfers = []
        for client in sorted(trainer):
            if trainer[client] != home[client] and rank in (trainer[client], home[client]):
                at = guests[client] if trainer[client] == rank else self.federation.clients[client]
                transfers.append((trainer[client], home[client], at.vector.numpy()))
        self.comm.move(transfers, "returning clients")

    # After the sum

    def _updated(self, total: RoundSum) -> torch.Tensor:
        """The server's next vector; nobody's contribution leaves it as it is."""
        state = setup.pinned(self.state.clone(), self.federation.device.device)
        if not total.clients(IN):
            return state
        method = self._method
        slices = self.federation.state_layout.parts
        overridden = type(method).server_update is not Algorithm.server_update
        if not overridden or self.comm.rank == 0:
            method.server_update({name: state[place] for name, place in slices.items()}, total.means())
        if overridden:
            self.comm.broadcast(state.numpy(), "server state")
        return state

    def _evaluate(self, round: int, state: torch.Tensor) -> EvaluationSum:
        """Every client's accuracy with the new state, measured at its home."""
        federation, method = self.federation, self._method
        evaluation = EvaluationSum(federation.task.clients, self.comm.size)
        started = time.perf_counter()
        try:
            if self._evaluated(round):
                for client in federation.clients.values():
                    self.comm.poll()
                    parts = federation.workbench.parts((method.state(), state), (client.spec, client.vector))
                    test = measure(federation.engine, method, parts, client.splits["test"])
                    held = measure(federation.engine, method, parts, client.splits["validation"])
                    evaluation.clients[client.id] = [
                        *(test.correct, test.samples, test.loss, test.alpha),
                        *(held.correct, held.samples),
                    ]
        except StoppedError:
            pass
        self._seconds["evaluate"] = time.perf_counter() - started
        evaluation.ranks[self.comm.rank] = [*self._seconds.values(), rss_mb()]
        if self.comm.stop_requested():
            evaluation.request_stop()
        return evaluation

    def _record(self, total: RoundSum, evaluation: EvaluationSum, seconds: float) -> None:
        federation = self.federation
        samples = [federation.task.samples(k) for k in range(federation.task.clients)]
        tested = [len(rows) for rows in federation.partition.test]
        row = metrics.row(
            self.round, total, evaluation, samples, tested, 4 * federation.state_layout.size, seconds
        )
        self.history.append(row)
        shown = dict(row)
        if self.round % federation.config.run.checkpoint_every == 0 or self.round == federation.config.rounds:
            started = time.perf_counter()
            self._save()
            write = time.perf_counter() - started
            shown["seconds"] = {**row["seconds"], "write": write, "total": seconds + write}
        self._observer.round_done(shown)

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint of the rounds done; collective."""
        self._save()

    def _save(self, partial: np.ndarray | None = None, finished: Sequence[int] = ()) -> None:
        if self._checkpoints is None:
            return
        federation = self.federation
        content = Content(
            config=config.to_tree(federation.config),
            round=self.round,
            state=self.state.numpy(),
            state_layout=federation.state_layout,
            client_layouts=federation.client_layouts,
            partition={split: getattr(federation.partition, split) for split in SPLITS},
            history=self.history,
            identity={
                "data_digest": federation.data_digest,
                "partition_digest": federation.partition.digest(),
                "selected_on": metrics.selected_on(self.history),
                **self.identity,
            },
            partial=partial,
            finished=finished,
        )
        path = self._checkpoints / checkpoint.name(self.round, partial is not None)
        vectors = {client.id: client.vector.numpy() for client in federation.clients.values()}
        checkpoint.write(self.comm, path, content, vectors, federation.home)
        self._written = path
        self._observer.written(path, self.history, partial is not None)

    def _save_stopped(self, total: RoundSum) -> None:
        """A round in progress as a partial checkpoint; as the complete one before it if nobody finished."""
        total.buffer[0] = 0
        finished = [*total.clients(IN), *total.clients(DROPPED)]
        if finished:
            self._save(total.buffer, finished)
        elif self._written is None or self._written.name != checkpoint.name(self.round, False):
            self._save()


def _arrays(client: Client) -> list[np.ndarray]:
    """What travels with a client that trains away from home."""
    tensors = [
        client.vector,
        *(t for split in client.splits.values() for t in (split.x.cpu(), split.y.cpu())),
    ]
    return [t.numpy() for t in tensors]
