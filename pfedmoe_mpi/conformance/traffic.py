"""Everything that ranks send during whole rounds, recorded at the communicator and checked.

A sum must be made of flags, the metrics of members and what `client_step` returned under the declared weights
and scales, every integer of it; the evaluation's sum of the declared metrics; a broadcast of the server's
vector, as a server that never saw a client computes it. With `privacy.clip` contributions of clients are
clipped, and the server's vector has the noise; with `privacy.masked` contributions have their masks on, and
the protocol's messages are those of this rank's members. Clients lent to another rank and digests of
a checkpoint are the simulator's own traffic. Nothing else is sent. Every violation is reported as a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.conformance import contribution
from pfedmoe_mpi.conformance.masked_traffic import SECONDS, TAKEN_OFF, MaskedTraffic
from pfedmoe_mpi.conformance.recorded_step import RecordedStep, contains_affine
from pfedmoe_mpi.conformance.source import fresh_method, outside_imports
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.federation import build, confusion, placement
from pfedmoe_mpi.federation.evaluation import inputs, measure
from pfedmoe_mpi.federation.gates import GateSum
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.federation.metrics import CLIENT_METRICS, RANK_METRICS
from pfedmoe_mpi.federation.round_sum import IN, MEMBER_METRICS, MISSING, RoundSum
from pfedmoe_mpi.federation.server_optimiser import ServerOptimiser
from pfedmoe_mpi.mpi.comm import Comm

CALLS = ("sum", "broadcast", "gather", "from_root", "agree", "move", "wait", "local", "split")


def traffic_errors(comm: Comm, chosen: Config, folder: Path) -> list[str]:
    """Train with checkpoints; return, on all ranks, what was sent against the rules. Collective."""
    loop = Loop(comm, build.build(comm, chosen), SilentObserver(), folder)
    assert loop.begin()
    check = TrafficCheck(loop)
    with check.attached():
        loop.run()
    check.check_calls(chosen)
    return [error for errors in comm.gather(check.errors, "wire") for error in errors]


class TrafficCheck:
    """A wrapper around a loop's communicator and method that checks every call."""

    def __init__(self, loop: Loop) -> None:
        self.errors: list[str] = []
        self._loop, self._comm, self._made = loop, loop.comm, loop.federation
        self._method, self._fresh = self._made.method, fresh_method(self._made.method)
        self._fresh.prepared = self._method.prepared
        self._calls: list[str] = []
        self._depth = self._inside = 0
        self._turns: dict[int, RecordedStep] = {}
        self._before: set[int] = set()  # who trained in earlier rounds
        self._server = ServerOptimiser(self._made.config.server, self._made.state_layout)
        self._state = loop.state  # after this round's sum, as the fresh method computes it
        self._sums = self._moves = 0
        self._reduced = np.empty(0, np.int64)  # the round's sum
        self._masked: tuple[int, MaskedTraffic] | None = None  # by round
        for name in outside_imports(self._method):
            self._report(f"the method imports {name}")

    def _report(self, problem: str) -> None:
        self.errors.append(f"rank {self._comm.rank}, round {self._loop.round + 1}: {problem}")

    # Standing between

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Route the communicator's and the method's calls through this check."""
        for name in CALLS:
            setattr(self._comm, name, self._call(name, getattr(self._comm, name)))
        method: Any = self._method
        method.client_step = self._step(method.client_step)
        for name in ("server_update", "loss", "predict", "mixture", "predictor"):
            setattr(method, name, self._method_call(getattr(method, name)))
        try:
            yield
        finally:
            for item in (self._comm, method):
                for name in [name for name in vars(item) if hasattr(type(item), name)]:
                    delattr(item, name)

    def _call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def passing(*arguments: Any) -> Any:
            if self._inside:  # not performed: the other ranks do not come by
                self._report(f"the method called {name} of the communicator")
                return [arguments[0]] * self._comm.size
            if self._depth:
                return call(*arguments)
            self._calls.append(name)
            check = getattr(self, f"_check_{name}", None)
            self._depth += 1
            try:
                if check:
                    check(*arguments)
                result = call(*arguments)
                if name in ("from_root", "agree"):
                    self._check_checkpoint(name, result)
                if name == "sum":
                    self._after_sum(*arguments)
                return result
            finally:
                self._depth -= 1

        return passing

    def _method_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def passing(*arguments: Any) -> Any:
            self._inside += 1
            try:
                return call(*arguments)
            finally:
                self._inside -= 1

        return passing

    def _step(self, call: Callable[[Turn], Mapping[str, torch.Tensor]]) -> Callable[..., Any]:
        call = self._method_call(call)

        def passing(turn: Turn) -> Any:
            step = self._turns[turn.client] = RecordedStep(turn)
            sgd = turn.sgd
            turn.sgd = lambda *a, **k: step.record_sgd(sgd, *a, **k)  # type: ignore[method-assign]
            values = call(turn)
            step.values = {name: value.detach().clone() for name, value in values.items()}
            spec = self._method.client_state(turn.client)
            layout = self._made.workbench.layout(spec)
            step.vector = self._made.workbench.read(spec, turn.parts, torch.empty(layout.size))
            if turn.client in self._before:  # at first a private difference may be all there is
                self._check_private(turn.client, step)
            return values

        return passing

    # Sums

    def _check_sum(self, buffer: np.ndarray, purpose: str) -> None:
        if purpose != TAKEN_OFF:  # which is made of messages that all ranks have
            self._sums += 1
            (self._check_round if self._sums % 2 else self._check_evaluation)(buffer.copy().view(np.int64))

    def _after_sum(self, buffer: np.ndarray, purpose: str) -> None:
        """Compute the next state once the round's sum is reduced, and opened if it is masked."""
        if purpose == TAKEN_OFF:
            numbers = self._reduced[len(self._reduced) - len(buffer) :].view(np.uint64)
            numbers += buffer
            self._update(self._reduced)
        elif self._sums % 2 == 1:
            self._reduced = buffer.copy().view(np.int64)
            self._state = self._loop.state.clone()
            if not self._masks():
                self._update(self._reduced)

    def _masks(self) -> MaskedTraffic | None:
        """Return the masks of the round in progress, None without."""
        total, round = self._empty(), self._loop.round + 1
        if not (self._made.config.privacy.masked and len(total.blocks) and total.cohort):
            return None
        if self._masked is None or self._masked[0] != round:
            cohort = [client for client, _ in total.cohort]
            self._masked = round, MaskedTraffic(self._made, self._comm.rank, cohort, round)
        return self._masked[1]

    def _check_gather(self, value: Any, purpose: str) -> None:
        """Allow only the messages of this rank's members, and seconds."""
        total, masks = self._empty(), self._masks()
        if len(self._reduced) == len(total.buffer):
            total.buffer[:] = self._reduced
        allowed = masks.messages(purpose, total.clients(IN)) if masks else None
        found, seconds = value if isinstance(value, tuple) else (value, 0.0)
        is_time = purpose == SECONDS and isinstance(found, float)
        if not is_time and (allowed is None or allowed != found or not isinstance(seconds, float)):
            self._report(f"'{purpose}' gathers more than the messages of masks")

    def _empty(self) -> RoundSum:
        """Return the round's sum before any contribution."""
        method = self._fresh
        parts = self._made.state_layout.parts
        payload = method.payload({name: place.stop - place.start for name, place in parts.items()})
        round, private = self._loop.round + 1, self._made.private
        release = private.release(self._loop.state, round) if private else None
        return RoundSum(self._made.task, method.cohort(round), payload, release)

    def _check_round(self, buffer: np.ndarray) -> None:
        """Allow, before the reduction, only what this rank's clients returned, as declared."""
        total = self._empty()
        if len(buffer) != len(total.buffer):
            return self._report(f"{len(buffer)} numbers are summed, declared are {len(total.buffer)}")
        members, masks = len(total.cohort), self._masks()
        parts = {"stop": 1, "flags": members, "metrics": members * len(MEMBER_METRICS)}
        parts |= {f"block '{name}'": length for name, length in self._lengths(total).items()}
        expected = np.zeros_like(buffer)
        for position, (client, _) in enumerate(total.cohort):
            flag = buffer[1 + position]
            if client in self._turns and flag != MISSING:
                expected[1 + position] = flag
                width = len(MEMBER_METRICS)
                place = slice(1 + members + width * position, 1 + members + width * (position + 1))
                expected[place] = self._metrics(client, total, flag == IN, buffer[place]).view(np.int64)
                if flag == IN:
                    self._contribute(expected, total, position)
                    if masks:
                        masks.add(client, expected[len(buffer) - len(total.blocks) :].view(np.uint64))
        at = 0
        for name, length in parts.items():
            if not np.array_equal(buffer[at : at + length], expected[at : at + length]):
                self._report(f"{name} of the sum: more than the method returned under its declaration")
            at += length

    def _lengths(self, total: RoundSum) -> dict[str, int]:
        members = len(total.cohort)
        return {n: b.rows * (1 + b.size) * (members if b.slot else 1) for n, b in total.payload.items()}

    def _metrics(self, client: int, total: RoundSum, is_in: bool, found: np.ndarray) -> np.ndarray:
        """Return a member's metrics: its loss, a possible test accuracy, the bytes of its blocks."""
        if not is_in:
            return np.full(len(MEMBER_METRICS), np.nan)
        step, tested = self._turns[client], len(self._made.partition.test[client])
        seen = found.view(np.float64)[1]
        if not np.isnan(seen) and not any(seen == right / tested for right in range(tested + 1)):
            self._report(f"the accuracy of client {client} is not a share of its {tested} samples")
        blocks = [block for name, block in total.payload.items() if name in step.values]
        weights = [contribution.weight(self._made.task.counts, block, client) for block in blocks]
        sent = sum(4 * int((own > 0).sum()) * b.size for own, b in zip(weights, blocks, strict=True))
        down = 4 * self._made.state_layout.size if step.turn.bytes_down is None else step.turn.bytes_down
        up = sent if step.turn.bytes_up is None else step.turn.bytes_up
        return np.array([step.loss(), seen, up, down], np.float64)

    def _contribute(self, buffer: np.ndarray, total: RoundSum, position: int) -> None:
        """Add what a member returned, weighted and scaled as declared, or clipped."""
        client, private = total.cohort[position][0], self._made.private
        values = self._turns[client].values
        if private:
            state = {name: self._loop.state[self._made.state_layout.parts[name]] for name in total.payload}
            expected = private.expected(self._loop.round + 1)
            clip = self._made.config.privacy.clip
            pieces = contribution.clipped(clip, expected, total.payload, state, values)
        else:
            pieces = contribution.declared(self._made.task.counts, total, client, values)
        at = 1 + len(total.cohort) * (1 + len(MEMBER_METRICS))
        for name, block in total.payload.items():
            length = block.rows * (1 + block.size)
            if name in pieces:
                start = at + (position * length if block.slot else 0)
                buffer[start : start + length] += np.concatenate(pieces[name])
            at += self._lengths(total)[name]

    def _update(self, buffer: np.ndarray) -> None:
        """Compute the next state, after the reduction, with the new instance."""
        total = self._empty()
        total.buffer[:] = buffer
        if not total.empty:
            parts = self._made.state_layout.parts
            stretches = {name: self._state[place] for name, place in parts.items()}
            try:
                means = total.means()
                self._fresh.server_update(stretches, means, self._loop.round + 1)
                self._server.update(self._loop.state, self._state, means)
                self._server.commit()
            except Exception as error:
                self._report(f"the server's update needs more than the state before and the sum: {error!r}")

    def _check_broadcast(self, array: np.ndarray, purpose: str) -> None:
        if array.dtype != np.float32 or array.shape != (self._made.state_layout.size,):
            self._report(f"a broadcast of {array.dtype} {array.shape}, which is not the server's state")
        elif self._comm.rank == 0 and array.tobytes() != self._state.numpy().tobytes():
            self._report(
                "the server's state holds more than the update makes of the state before and the sum"
            )

    def _check_evaluation(self, buffer: np.ndarray) -> None:
        """Allow only the declared metrics of this rank's clients, measured again, and of this rank."""
        made, width = self._made, len(CLIENT_METRICS)
        clients, ranks = made.task.clients * width, self._comm.size * len(RANK_METRICS)
        classes = made.task.classes
        gates = GateSum(classes, self._fresh.experts)
        end = 2 + clients + ranks + len(gates.buffer)
        declared = end + made.task.clients * classes**2
        if len(buffer) != declared or buffer[:2].any():
            return self._report(f"the evaluation sums {len(buffer)} numbers, declared are {declared}")
        expected = np.zeros((made.task.clients, width))
        matrices = np.zeros((made.task.clients, classes, classes), np.int64)
        for client in made.clients.values():
            specs = ((self._fresh.state(), self._state), (client.spec, client.vector))
            parts = made.workbench.parts(*specs)
            self._fresh.assemble(parts)
            rows = {"test": made.gate_rows, "validation": None}
            test, held = (
                measure(made.engine, self._fresh, parts, client.splits[split], gate_rows=common)
                for split, common in rows.items()
            )
            assert test and held, "every client of this federation trains"
            self._check_mixture(parts, client.splits["test"])
            row = [test.correct, test.samples, test.loss, test.alpha, test.auc, held.correct, held.samples]
            labels = client.splits["test"].y.cpu().numpy()
            by_class = [f(labels, test.answers) for f in (confusion.macro_f1, confusion.balanced_accuracy)]
            expected[client.id] = [*row, 0, 0, 0, 0, *by_class, 0, 0]  # no stream, no concepts, nobody tunes
            matrices[client.id] = confusion.matrix(labels, test.answers, classes)
            gates.buffer += test.gate.buffer if test.gate else 0
        found = buffer[2 : 2 + clients].view(np.float64).reshape(expected.shape)
        if not np.array_equal(found, expected, equal_nan=True):
            self._report("the metrics of clients are not those measured")
        if not np.array_equal(buffer[2 + clients + ranks : end], gates.buffer):
            self._report("the sums about gates are not those of this rank's clients")
        if not np.array_equal(buffer[end:], matrices.ravel()):
            self._report("the confusion matrices are not those of this rank's clients")
        own = buffer[2 + clients : 2 + clients + ranks].view(np.float64).reshape(-1, len(RANK_METRICS))
        if np.delete(own, self._comm.rank, 0).any() or not (own >= 0).all():
            self._report("the metrics of ranks are more than seconds and memory of this one")
        cohort = self._method.cohort(self._loop.round + 1)
        self._before |= {client for client, _ in cohort}
        self._turns.clear()

    def _check_mixture(self, parts: Parts, split: Split) -> None:
        """Check that the method's mixture answers as its predictor does, bit for bit."""
        engine = self._made.engine
        samples = partial(inputs, engine, split)
        with torch.no_grad():
            mixture = self._fresh.mixture(parts, samples)
            answer = self._fresh.predictor(parts, samples, False)
            if mixture and answer and any(not torch.equal(mixture(x).answer(), answer(x)) for x in samples()):
                self._report("the answer of `mixture` is not that of `predictor`")

    # The simulator's own traffic

    def _check_move(self, transfers: Sequence[tuple[int, int, np.ndarray]], purpose: str) -> None:
        """Allow only whole clients that train on another rank, and their vectors on the way back."""
        self._moves += 1
        made, rank, back = self._made, self._comm.rank, self._moves % 2 == 0
        cohort = {client: made.costs[client] for client, _ in self._method.cohort(self._loop.round + 1)}
        trainer = placement.trainers(cohort, made.home, self._comm.size)
        expected: list[tuple[int, int, bytes | None]] = []
        for client in sorted(k for k in trainer if trainer[k] != made.home[k]):
            way = (trainer[client], made.home[client])
            if rank in way and back:
                vector = self._turns[client].vector if rank == way[0] else None
                expected.append((*way, None if vector is None else vector.numpy().tobytes()))
            elif rank in way:
                here = made.clients.get(client)
                held = [s for split in here.splits.values() for s in (split.x, split.y)] if here else []
                sent = [tensor.numpy().tobytes() for tensor in (here.vector, *held)] if here else [None] * 7
                expected += [(made.home[client], trainer[client], raw) for raw in sent]
        found = [
            (a, b, None if raw is None else array.tobytes())
            for (a, b, array), (_, _, raw) in zip(transfers, expected, strict=False)
        ]
        if len(transfers) != len(expected) or found != expected:
            self._report(f"'{purpose}' moves more than clients between home and trainer")

    def _check_checkpoint(self, name: str, result: Any) -> None:
        """Allow only the places of datasets and the digests of clients' vectors."""
        clients = {f"clients/{client:06d}" for client in range(self._made.task.clients)}
        for part in result if name == "agree" else [result]:
            for key, value in (part or {}).items():
                place = isinstance(value, tuple) and [type(number) for number in value] == [int, int]
                hashed = key in clients and isinstance(value, bytes) and len(value) == sha256().digest_size
                if not (place if name == "from_root" else hashed):
                    self._report(f"a checkpoint's {name} sends {key}: {value!r}")

    def check_calls(self, chosen: Config) -> None:
        """Check that each round makes the same calls in the same order, and no others."""
        expected: list[str] = []
        overridden = type(self._method).server_update is not Algorithm.server_update
        for round in range(1, chosen.rounds + 1):
            masks = self._loop.history[round - 1]["masks"]
            opened = not masks or masks["opened"]
            expected += [*(["gather", "gather"] if masks else []), "move", "move", "sum"]
            expected += ["gather", *(["sum"] if opened else []), "gather"] if masks else []
            expected += [*(["broadcast"] if overridden and opened else []), "sum"]
            if round in {1, chosen.rounds} or round % chosen.run.checkpoint_every == 0:
                expected += ["from_root", "agree", "from_root"]
        if self._calls != expected:
            self._report(f"the calls between ranks are {self._calls}, not {expected}")

    # Private tensors

    def _check_private(self, client: int, step: RecordedStep) -> None:
        """Search what is sent for every private tensor after the step, also scaled and shifted."""
        layout = self._made.workbench.layout(self._method.client_state(client))
        for name, value in step.values.items():
            sent = value.double().numpy().ravel()
            for entry in layout.entries:
                private = step.vector[entry.offset : entry.offset + entry.size].double().numpy()
                if contains_affine(np.nan_to_num(sent), private):
                    self._report(f"private tensor {entry.name} is in payload block '{name}'")
