"""A job of several ranks with masked sums: the digest of each run, and what its ranks sent."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.mpi.comm import Comm

SETTINGS: dict[str, Any] = {
    "data.source": "synthetic",
    "data.samples": 150,
    "data.size": 8,
    "clients": 6,
    "rounds": 1,
    "partition.kind": "iid",
    "model.pool": "mlp5",
    "model.dim": 8,
    "gate.hidden": 4,
    "train.epochs": 1,
    "train.batch": 16,
    "train.threads": 1,
    "train.device": "cpu",
}


def make_loop(world: Comm, folder: Path | None = None, **changes: Any) -> Loop:
    """Build a federation before its first round; `__` in a setting's name stands for the dot."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    chosen = config.build({**SETTINGS, **dotted})
    return Loop(world, build(world, chosen), SilentObserver(), folder)


def digest(loop: Loop) -> str:
    """Return a digest of the server's vector and of what this rank's clients keep, over all ranks."""
    clients = loop.federation.clients.items()
    own = {k: sha256(client.vector.numpy().tobytes()).digest() for k, client in clients}
    every = {k: found for part in loop.comm.gather(own, "digests") for k, found in part.items()}
    return sha256(loop.state.numpy().tobytes() + b"".join(every[k] for k in sorted(every))).hexdigest()


def main() -> None:
    """Print the digests of the runs in a file of {name: changes}, and resume the partial checkpoint."""
    world = launch.start()
    runs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {}
    for name, changes in runs.items():
        loop = make_loop(world, **changes)
        assert loop.run()
        found[name] = digest(loop)
    loop = make_loop(world, privacy__masked=True)
    with checkpoint.Checkpoint(Path(sys.argv[2])) as loaded:
        loop.resume(loaded)
    assert loop.run()
    found["resumed"] = digest(loop)
    found["sent"] = world.gather(recorded(world), "what was sent")  # type: ignore[assignment]
    if world.rank == 0:
        print(json.dumps(found))
    world.finish()


class Recorder:
    """What a rank's communicator is asked to send, as (purpose, bytes), while `recording`."""

    CALLS = ("sum", "gather", "broadcast", "move")

    def __init__(self, world: Comm) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self._world = world

    def _passing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def passing(value: Any, purpose: str) -> Any:
            self.sent.append((purpose, _bytes(value)))
            return call(value, purpose)

        return passing

    @contextmanager
    def recording(self) -> Iterator[None]:
        for name in self.CALLS:
            setattr(self._world, name, self._passing(getattr(self._world, name)))
        yield
        for name in self.CALLS:
            delattr(self._world, name)


def _bytes(value: Any) -> bytes:
    """Return all bytes and arrays in a value, joined."""
    if isinstance(value, bytes | np.ndarray):
        return bytes(value.tobytes() if isinstance(value, np.ndarray) else value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return b"".join(map(_bytes, items))


def recorded(world: Comm) -> dict[str, Any]:
    """Return what a rank sent in a round: bytes of its masked contribution and of the plain one.

    `shown`: whether any message of the masked round contained a part of the plain one.
    """
    found, start = {}, 8 * (1 + 3 * 5)  # bytes of the stop, and of the flags and metrics of three members
    for name, masked in (("plain", False), ("masked", True)):
        loop, recorder = make_loop(world, clients=3, privacy__masked=masked), Recorder(world)
        with recorder.recording():
            assert loop.run()
        found[name] = next(raw[start:] for what, raw in recorder.sent if what == "sum of round 1")
    plain = found["plain"]
    pieces = [plain[at : at + 32] for at in range(0, len(plain) - 32, 256)]
    shown = any(piece in raw for piece in pieces if any(piece) for _, raw in recorder.sent)
    return {"masked": found["masked"].hex(), "plain": plain.hex(), "shown": shown}


if __name__ == "__main__":
    main()
