"""Rules that every method must keep, checked on sub-communicators of one job.

    mpirun -n 4 python tests/conformance.py [METHOD ...] [--check NAME] [--set section.field=VALUE]

Methods are found, not listed; no check has a line for a particular method. Deliberately wrong methods lie in
`tests/broken/` and are added with --broken. One line per check and method: `pass`, or `FAIL` with the reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi import algorithms, checkpoint, config
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.federation import build, metrics
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import comm
from pfedmoe_mpi.mpi.comm import Comm
from support.traffic_check import traffic_errors

SETTINGS: dict[str, Any] = {
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


def settings(name: str, **changes: Any) -> config.Config:
    """Return the settings of a federation that takes seconds; `__` stands for the dot."""
    return config.build(
        {**SETTINGS, "algorithm": name, **{k.replace("__", "."): v for k, v in changes.items()}}
    )


def run_federation(
    world: Comm, chosen: config.Config, folder: Path | None = None, source: Path | None = None
) -> Loop:
    """Train a federation from round 1, or from a checkpoint, to its end."""
    loop = Loop(world, build.build(world, chosen), SilentObserver(), folder)
    if source:
        world.agree(lambda: checkpoint.verify(source, world.rank, world.size), "verify")
        with Checkpoint(source) as loaded:
            loop.resume(loaded)
    loop.run()
    return loop


def digest(loop: Loop) -> str:
    """Return the SHA-256 of everything that must repeat."""
    own = {k: client.vector.numpy().tobytes() for k, client in loop.federation.clients.items()}
    vectors: dict[int, bytes] = {}
    for part in loop.comm.gather(own, "digest"):
        vectors |= part
    state = sha256(loop.state.numpy().tobytes())
    for k in sorted(vectors):
        state.update(vectors[k])
    for row in loop.history:
        state.update(metrics.dumps(metrics.learning(row)).encode())
    return state.hexdigest()


def on_ranks(world: Comm, ranks: int, work: Callable[[Comm], Any]) -> Any:
    """Run `work` on the first ranks; return its result, or raise its failed assertion, on all."""
    part = world.split(0 if world.rank < ranks else -1)
    result: Any = None
    if part:
        part.timeout = world.timeout
        try:
            result = work(part)
        except AssertionError as error:
            result = error
        part.finish()
    for found in world.gather(result, "sub-communicator"):
        if isinstance(found, AssertionError):
            raise found
    return result if ranks == world.size else world.gather(result, "result")[0]


# The checks


def ranks(world: Comm, name: str) -> None:
    """Require the same bits on 1, 2 and 4 ranks."""
    found = [
        on_ranks(world, n, lambda part: digest(run_federation(part, settings(name, rounds=2))))
        for n in (1, 2, 4)
    ]
    assert len(set(found)) == 1, f"digests on 1, 2 and 4 ranks: {found}"


def idle(world: Comm, name: str) -> None:
    """Require that ranks without clients change nothing."""
    chosen = settings(name, rounds=2, clients=2, participation=0.5, partition__alpha=100.0)
    alone, beside_idle = (
        on_ranks(world, n, lambda part: digest(run_federation(part, chosen))) for n in (1, 4)
    )
    assert alone == beside_idle, "idle ranks changed the result"


def restart(world: Comm, name: str) -> None:
    """Require that two rounds, a restart on other ranks and two more equal four at once."""
    with ScratchFolder(world) as folder:
        whole = on_ranks(world, 2, lambda part: digest(run_federation(part, settings(name))))
        on_ranks(world, 4, lambda part: run_federation(part, settings(name, rounds=2), folder).round)
        source = folder / checkpoint.name(2, partial=False)
        for n in (1, 3):
            again = on_ranks(
                world, n, lambda part: digest(run_federation(part, settings(name), source=source))
            )
            assert again == whole, f"restart on {n} ranks differs from four rounds at once"


def midround(world: Comm, name: str) -> None:
    """Require that a stop during a round and a restart on other ranks equal the undisturbed run."""
    whole = on_ranks(world, 1, lambda part: digest(run_federation(part, settings(name))))
    partial = 0
    for polls in (3, 7, 11, 29):
        if polls == 29 and partial:  # for methods that take many steps per turn
            break
        with ScratchFolder(world) as folder:
            on_ranks(
                world,
                2,
                lambda part, polls=polls, folder=folder: run_until_stopped(part, name, polls, folder),
            )
            source = checkpoint.newest_first(folder)[0]
            with Checkpoint(source) as loaded:
                partial += 0 < len(loaded.finished) < 4
            again = on_ranks(
                world,
                3,
                lambda part, source=source: digest(run_federation(part, settings(name), source=source)),
            )
            assert again == whole, f"restart of {source.name} differs from the undisturbed run"
    assert partial, "no stop fell into the middle of a round"


def run_until_stopped(world: Comm, name: str, polls: int, folder: Path) -> None:
    """Train until rank 0 gets SIGUSR1 at its `polls`-th check for a stop from round 1 on."""
    world.catch_signals()
    left, poll = 0, world.poll

    def counting() -> None:
        nonlocal left
        left -= 1
        if left == 0 and world.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        poll()

    world.poll = counting  # type: ignore[method-assign]
    loop = Loop(world, build.build(world, settings(name)), SilentObserver(), folder)
    assert loop.begin()  # what is stopped before round 1 is done again
    left = polls
    assert not loop.run(), "the signal did not stop the run"


def moves(world: Comm, name: str) -> None:
    """Require that every shared tensor, BatchNorm's statistics included, changes in the first round."""
    for changes in ({}, {"model__pool": "shufflenet_v2_x0_5", "model__shared": "shufflenet_v2_x0_5"}):
        bigger = {"data__size": 32, "clients": 2, "data__samples": 60} if changes else {}
        before, after, layout = on_ranks(
            world, 1, lambda part, c={**changes, **bigger}: first_round(part, name, c)
        )
        for entry in Layout.from_json(layout).entries:
            stretch = slice(entry.offset, entry.offset + entry.size)
            same = np.array_equal(before[stretch].view(np.uint32), after[stretch].view(np.uint32))
            assert not same, f"shared tensor {entry.name} did not move in the first round"


def first_round(part: Comm, name: str, changes: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
    built = build.build(part, settings(name, rounds=1, participation=1.0, **changes))
    loop = Loop(part, built, SilentObserver(), None)
    before = loop.state.numpy().copy()
    loop.run()
    return before, loop.state.numpy(), built.state_layout.to_json()


def fixpoint(world: Comm, name: str) -> None:
    """Require that with vanishing steps the mean over a part of the clients equals what was sent to them."""
    tiny = dict.fromkeys(("train__lr", "train__lr_shared", "train__lr_gate"), 1e-7)
    chosen = {"participation": 0.4, "rounds": 2, **tiny}
    before, after, layout = on_ranks(world, 2, lambda part: shared_vectors(part, name, chosen))
    for entry in Layout.from_json(layout).entries:
        stretch = slice(entry.offset, entry.offset + entry.size)
        if entry.trained:
            np.testing.assert_allclose(
                after[stretch], before[stretch], rtol=1e-3, atol=1e-5, err_msg=entry.name
            )


def shared_vectors(part: Comm, name: str, changes: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
    loop = Loop(part, build.build(part, settings(name, **changes)), SilentObserver(), None)
    before = loop.state.numpy().copy()
    loop.run()
    return before, loop.state.numpy(), loop.federation.state_layout.to_json()


def layouts(world: Comm, name: str) -> None:
    """Require that modules, vectors, layouts and their JSON convert into each other without loss."""
    built = on_ranks(world, 1, lambda part: round_trip(part, name))
    assert built, "no layout was checked"


def round_trip(part: Comm, name: str) -> int:
    built = build.build(part, settings(name))
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


def wire(world: Comm, name: str) -> None:
    """Require on 2 and 3 ranks that a client sends only its declared payload, weights and metrics."""
    with ScratchFolder(world) as folder:
        for n, share, lost in ((2, 1.0, 0.0), (3, 0.8, 0.4)):
            chosen = settings(name, rounds=2, participation=share, faults__dropout=lost)
            on_ranks(world, n, lambda part, chosen=chosen: assert_declared_traffic(part, chosen, folder))


def assert_declared_traffic(part: Comm, chosen: config.Config, folder: Path) -> None:
    wrong = traffic_errors(part, chosen, folder)
    assert not wrong, "; ".join(wrong[:3])


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


def run_check(world: Comm, check: Callable[[Comm, str], None], name: str) -> bool:
    """Run one check and print its verdict; ranks agree on it."""
    try:
        check(world, name)
        reason = ""
    except AssertionError as error:
        reason = str(error) or "assertion"
    reasons = [r for r in world.gather(reason, "verdict") if r]
    if world.rank == 0:
        print(f"{check.__name__} {name}: {'FAIL ' + reasons[0] if reasons else 'pass'}", flush=True)
    return not reasons


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--check", action="append", choices=list(CHECKS))
    parser.add_argument("--broken", action="store_true", help="add tests/broken to the methods")
    parser.add_argument("--set", action="append", default=[], help="another setting of all federations")
    options = parser.parse_args()
    SETTINGS.update(item.split("=", 1) for item in options.set)
    if options.broken:
        algorithms.__path__.append(str(Path(__file__).parent / "broken"))
    torch.set_num_threads(1)
    world = comm.start()
    world.timeout = 20.0
    try:
        good = [
            run_check(world, CHECKS[check], name)
            for name in options.methods or methods.names()
            for check in options.check or CHECKS
        ]
    except BaseException as error:
        world.fault(error)
    world.finish()
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
