"""The checks of the contract of `algorithms/base.py`, each on sub-communicators of one job of four ranks.

No check has a line for a particular method. A check raises an AssertionError with a sentence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi import algorithms, checkpoint, config
from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.conformance.traffic import traffic_errors
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Module
from pfedmoe_mpi.errors import MessageError
from pfedmoe_mpi.federation import build, declarations, metrics
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi.comm import Comm

RANKS = 4
SETTINGS: Mapping[str, Any] = {  # of a federation that runs for seconds
    "data.source": "synthetic",
    "data.samples": 160,
    "data.size": 8,
    "data.classes": 4,
    "partition.alpha": 3.0,
    "clients": 5,
    "participation": 0.8,
    "rounds": 4,
    "train.batch": 16,
    "train.lr_gate": 0.05,
    "gate.hidden": 8,
    "model.pool": "auto",
    "model.dim": 12,
}


@dataclass(frozen=True)
class Case:
    """A method, and settings of its federations that replace `SETTINGS`."""

    algorithm: str
    overrides: Mapping[str, Any]

    def settings(self, **changes: Any) -> config.Config:
        """Return the configuration with changes; `__` in a name stands for the dot."""
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        return config.build({**SETTINGS, **self.overrides, "algorithm": self.algorithm, **dotted})


def run_federation(
    world: Comm, chosen: config.Config, folder: Path | None = None, source: Path | None = None
) -> Loop:
    """Run a federation from round 1, or from a checkpoint, to its end, and return its loop."""
    loop = Loop(world, build.build(world, chosen), SilentObserver(), folder)
    if source:
        with checkpoint.open_everywhere(world, source) as loaded:
            loop.resume(loaded)
    loop.run()
    return loop


def digest(loop: Loop) -> str:
    """Return the SHA-256 of everything that must be reproducible."""
    clients = {k: client.vector.numpy().tobytes() for k, client in loop.federation.clients.items()}
    vectors: dict[int, bytes] = {}
    for part in loop.comm.gather(clients, "digest"):
        vectors |= part
    sha = sha256(loop.state.numpy().tobytes())
    for k in sorted(vectors):
        sha.update(vectors[k])
    learning = loop.comm.from_root(lambda: [metrics.learning(row) for row in loop.history], "digest")
    sha.update(json.dumps(learning, sort_keys=True).encode())
    return sha.hexdigest()


def run_digest(world: Comm, chosen: config.Config, source: Path | None = None) -> str:
    """Run a federation and return its digest."""
    return digest(run_federation(world, chosen, source=source))


def on_ranks(world: Comm, ranks: int, work: Callable[[Comm], Any]) -> Any:
    """Run `work` on the first ranks of the world; return its result, or raise its failure, on all ranks."""
    part = world.split(0 if world.rank < ranks else -1)
    result: Any = None
    if part:
        part.timeout = world.timeout
        try:
            result = work(part)
        except (AssertionError, MessageError) as error:  # the other ranks are waiting for it
            result = error
        part.finish()
    for outcome in world.gather(result, "sub-communicator"):
        if isinstance(outcome, AssertionError | MessageError):
            raise outcome
    return result if ranks == world.size else world.gather(result, "result")[0]


# The checks


def documented(world: Comm, case: Case) -> None:
    """Check that the file's docstring says what the method is, where it is published and what is shared."""
    text = sys.modules[algorithms.load(case.algorithm).__module__].__doc__ or ""
    assert re.match(r"\S.*: .*\.\n\n", text), (
        "its file's docstring does not begin with a line «NAME: WHAT IT DOES.»"
    )
    published = r"\b(19|20)\d\d\b|arXiv \d{4}\.\d{4,5}"
    assert re.search(published, text), (
        "its file's docstring names no publication, with its year or arXiv number"
    )
    shared = "its file's docstring has no paragraph «Shared: …» about what leaves a client"
    assert re.search(r"^Shared: \S", text, re.MULTILINE), shared


def ranks(world: Comm, case: Case) -> None:
    """Check that the result has the same bits on 1, 2 and 4 ranks."""
    digests = [on_ranks(world, n, lambda part: run_digest(part, case.settings(rounds=2))) for n in (1, 2, 4)]
    assert len(set(digests)) == 1, f"the digests on 1, 2 and 4 ranks differ: {digests}"


def idle(world: Comm, case: Case) -> None:
    """Check that ranks without clients do not change the result."""
    chosen = case.settings(rounds=2, clients=2, participation=0.5, partition__alpha=100.0)
    alone, with_idle_ranks = (on_ranks(world, n, lambda part: run_digest(part, chosen)) for n in (1, 4))
    assert alone == with_idle_ranks, "idle ranks changed the result"


def restart(world: Comm, case: Case) -> None:
    """Check that two rounds, a restart on another number of ranks and two more rounds equal four rounds."""
    with ScratchFolder(world) as folder:
        uninterrupted = on_ranks(world, 2, lambda part: run_digest(part, case.settings()))
        on_ranks(world, 4, lambda part: run_federation(part, case.settings(rounds=2), folder).round)
        source = folder / checkpoint.name(2, partial=False)
        for n in (1, 3):
            restarted = on_ranks(world, n, lambda part: run_digest(part, case.settings(), source))
            assert restarted == uninterrupted, f"a restart on {n} ranks differs from an uninterrupted run"


def midround(world: Comm, case: Case) -> None:
    """Check that a run stopped by a signal inside a round and restarted equals an uninterrupted run."""
    uninterrupted = on_ranks(world, 1, lambda part: run_digest(part, case.settings()))
    for polls in (3, 11, None):
        with ScratchFolder(world) as folder:
            stop = partial(run_until_stopped, case=case, polls=polls, folder=folder)
            on_ranks(world, 2, stop)
            source = checkpoint.newest_first(folder)[0]
            with Checkpoint(source) as loaded:
                assert polls or loaded.finished, "a stop between two clients of a rank left no partial round"
            restarted = on_ranks(world, 3, partial(run_digest, chosen=case.settings(), source=source))
            assert restarted == uninterrupted, (
                f"a restart from {source.name} differs from an uninterrupted run"
            )


class StopBetweenClients(SilentObserver):
    """Sends SIGUSR1 to each rank that has trained some of its clients of a round, and not all."""

    def client_trained(self, round: int, done: int, members: int) -> None:
        """Stop this rank if clients are left to train."""
        if done < members:
            os.kill(os.getpid(), signal.SIGUSR1)


def run_until_stopped(world: Comm, case: Case, polls: int | None, folder: Path) -> None:
    """Run until rank 0 receives SIGUSR1 at its `polls`-th poll, counted from round 1 on.

    Without `polls` each rank receives it between two clients, and leaves a partial round whatever its speed.
    """
    world.catch_signals()
    remaining, poll = 0, world.poll

    def counting_poll() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0 and world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        poll()

    observer = SilentObserver()
    if polls:
        world.poll = counting_poll  # type: ignore[method-assign]
    else:
        observer = StopBetweenClients()
    loop = Loop(world, build.build(world, case.settings()), observer, folder)
    assert loop.begin()  # a stop before round 1 leaves no partial round: the work is repeated
    remaining = polls or 0
    assert not loop.run(), "the signal did not stop the run: do at least three clients train in a round?"


def moves(world: Comm, case: Case) -> None:
    """Check that the first round changes every shared tensor, including BatchNorm's running statistics.

    Modules that the method neither sends nor trains are left out.
    """
    for changes in ({}, {"model__pool": "shufflenet_v2_x0_5", "model__shared": "shufflenet_v2_x0_5"}):
        bigger = {"data__size": 32, "clients": 2, "data__samples": 60} if changes else {}
        chosen = {"rounds": 1, "participation": 1.0, **changes, **bigger}
        before, after, layout = on_ranks(world, 1, partial(state_change, case=case, changes=chosen))
        for entry in Layout.from_json(layout).entries:
            stretch = slice(entry.offset, entry.offset + entry.size)
            same = np.array_equal(before[stretch].view(np.uint32), after[stretch].view(np.uint32))
            assert not same, f"shared tensor {entry.name} did not change in the first round"


def state_change(part: Comm, case: Case, changes: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the server's vector before and after a run, and the layout, as JSON, of what is shared of it."""
    loop = Loop(part, build.build(part, case.settings(**changes)), SilentObserver(), None)
    before = loop.state.numpy().copy()
    loop.run()
    own, entries = loop.federation.method.kept_by_clients, loop.federation.state_layout.entries
    still = frozen_parts(loop.federation.method, loop.federation.state_layout.sizes)
    shared = Layout(
        tuple(
            entry for entry in entries if entry.name not in own and entry.name.partition("/")[0] not in still
        )
    )
    return before, loop.state.numpy(), shared.to_json()


def frozen_parts(method: Algorithm, sizes: Mapping[str, int]) -> set[str]:
    """Return the state's modules that are neither sent nor trained, such as what an earlier stage left."""
    modules = {name for name, part in method.state().items() if isinstance(part, Module)}
    return modules - declarations.trained(method).keys() - method.payload(sizes).keys()


def fixpoint(world: Comm, case: Case) -> None:
    """Check that with vanishing steps the mean over a part of the clients equals the state they received."""
    tiny = dict.fromkeys(("train__lr", "train__lr_shared", "train__lr_gate"), 1e-7)
    chosen = {"participation": 0.4, "rounds": 2, **tiny}
    before, after, layout = on_ranks(world, 2, lambda part: state_change(part, case, chosen))
    for entry in Layout.from_json(layout).entries:
        stretch = slice(entry.offset, entry.offset + entry.size)
        if entry.trained:
            np.testing.assert_allclose(
                after[stretch], before[stretch], rtol=1e-3, atol=1e-5, err_msg=entry.name
            )


def layouts(world: Comm, case: Case) -> None:
    """Check that module to vector to module keeps every tensor, JSON every layout, and vectors fit them."""
    number = on_ranks(world, 1, lambda part: check_round_trips(part, case))
    assert number, "no layout was checked"


def check_round_trips(part: Comm, case: Case) -> int:
    """Check the layouts of every client, and return how many clients there are."""
    built = build.build(part, case.settings())
    method, bench = built.method, built.workbench
    for client in built.clients.values():
        for spec in (method.state(), client.spec):
            layout, vector = bench.layout(spec), torch.randn(bench.layout(spec).size)
            parts = bench.parts((spec, vector))
            parts.check()
            assert torch.equal(bench.read(spec, parts, torch.empty_like(vector)), vector)
            assert Layout.from_json(layout.to_json()).digest == layout.digest
        assert client.vector.shape == (built.client_layouts[client.id].size,)
    return len(built.clients)


def wire(world: Comm, case: Case) -> None:
    """Check on 2 and 3 ranks that only the declared payload, weights and metrics leave a client."""
    with ScratchFolder(world) as folder:
        for n, share, lost in ((2, 1.0, 0.0), (3, 0.8, 0.4)):
            chosen = case.settings(rounds=2, participation=share, faults__dropout=lost)
            on_ranks(world, n, partial(assert_declared_traffic, chosen=chosen, folder=folder))


def assert_declared_traffic(part: Comm, chosen: config.Config, folder: Path) -> None:
    """Assert that the traffic of a run has no violations; report the first three."""
    violations = traffic_errors(part, chosen, folder)
    assert not violations, "; ".join(violations[:3])


CHECKS = {check.__name__: check for check in (layouts, moves, fixpoint, wire, idle, ranks, restart, midround)}


class ScratchFolder:
    """A temporary folder of the job, removed at the end."""

    def __init__(self, world: Comm) -> None:
        self._world = world

    def __enter__(self) -> Path:
        self._folder = self._world.from_root(lambda: Path(tempfile.mkdtemp()), "scratch")
        return self._folder

    def __exit__(self, *_: object) -> None:
        self._world.wait("scratch")
        if self._world.rank == 0:
            shutil.rmtree(self._folder)
