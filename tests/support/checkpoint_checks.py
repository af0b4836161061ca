"""What ranks do in tests of checkpoints: `mpirun -n 4 python -m support.checkpoint_checks CHECK FOLDER`."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, Content
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.storage.columns import NO_VALUES, ClientColumns, Column
from support.files import flip_bit

SIZES = (1500, 1, 0, 100, 1024, 5000)


def sample_content(
    clients: int = 12, partial: bool = False, sizes: Sequence[int] = SIZES, state: int = 700
) -> Content:
    """Return content for a checkpoint; client k's vector has sizes[k mod length] numbers."""
    draw = np.random.default_rng(clients)
    server = {"server": {"optimiser": "yogi"}} if partial else {}  # earlier versions have no such section
    layouts = [Layout.join({"model": Layout.of_tensor((sizes[k % len(sizes)],))}) for k in range(clients)]
    split = [draw.integers(0, 1000, k % 4) for k in range(clients)]
    return Content(
        config={
            **{"algorithm": "pfedmoe", "seed": 0, "clients": clients, "rounds": 9, "name": "bärbel"},
            **{"model": {"pool": ["cnn1", "cnn2"]}, "train": {"lr": 0.1}},
            **{"data": {"source": "digits"}, "partition": {"kind": "iid"}, **server},
        },
        round=3,
        state=draw.standard_normal(state).astype(np.float32),
        state_layout=Layout.join({"shared": Layout.of_tensor((state,))}) if state else Layout(()),
        client_layouts=layouts,
        partition={"train": split, "validation": [np.empty(0, np.int64)] * clients, "test": split[::-1]},
        history=[{**sample_row(n), "clients": sample_columns(n, clients)} for n in (1, 2, 3)],
        identity={
            **{"data_digest": "ab" * 32, "partition_digest": "cd" * 32, "torch": "2.6"},
            "notes": "ünicode " * 500,
        },
        partial=draw.integers(-(2**62), 2**62, 333) if partial else None,
        finished=[1, 4] if partial else [],
        moments=draw.standard_normal(2 * state if partial else 0).astype(np.float32),
    )


def sample_row(number: int) -> dict[str, Any]:
    """Return a metrics row with all required keys."""
    names = ("accuracy", "accuracy_cohort", "accuracy_validation")
    summary = dict.fromkeys(("mean", "weighted", "std", "worst"))
    return {"round": number, "train_loss": 0.1 * number, **{name: {**summary} for name in names}}


def sample_columns(number: int, clients: int) -> ClientColumns:
    """Return columns: of all clients, of the first, in round 2 of nobody; the samples change in round 2."""
    some = Column(np.zeros(1, np.int64), np.array([0.1 * number]))
    counts = np.arange(clients) + (number > 1)
    measured = {"accuracy": Column.of(np.arange(clients) / 7 + number), "accuracy_before": some}
    nobody = dict.fromkeys(measured, NO_VALUES)
    return ClientColumns(clients, {**(nobody if number == 2 else measured), "samples": Column(None, counts)})


def client_vector(whole: Content, client: int) -> np.ndarray:
    """Return a client's vector of random bits, including NaN with payloads."""
    size = whole.client_layouts[client].size
    return np.random.default_rng(client).integers(0, 2**32, size, np.uint32).view(np.float32)


def distribute(world: Comm, whole: Content) -> tuple[list[int], dict[int, np.ndarray]]:
    """Return (home rank of every client, this rank's vectors)."""
    home = [client % world.size for client in range(len(whole.client_layouts))]
    return home, {
        client: client_vector(whole, client) for client, rank in enumerate(home) if rank == world.rank
    }


def write_together(world: Comm, folder: str) -> None:
    whole = sample_content()
    home, mine = distribute(world, whole)
    path = Path(folder, checkpoint.name(3, False))
    checkpoint.write(world, path, whole, mine.__getitem__, home)
    world.agree(lambda: checkpoint.verify(path, world.rank, world.size), "verify")
    with Checkpoint(path) as loaded:
        for client in range(len(home)):
            assert np.array_equal(
                loaded.vector(client).view(np.uint32), client_vector(whole, client).view(np.uint32)
            )


def write_fails(world: Comm, folder: str) -> None:
    """Limit the file size on one rank: the error reaches all, no file is left, the next write succeeds."""
    write_together(world, folder)
    whole = sample_content()
    home, mine = distribute(world, whole)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, failing in enumerate((2, 0), 4):
        path, heard = Path(folder, checkpoint.name(number, False)), ""
        if world.rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, unlimited[1]))
        try:
            checkpoint.write(world, path, whole, mine.__getitem__, home)
        except CheckpointError as error:
            heard = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert f"{path} cannot be written" in heard and "free space" in heard, heard
        world.wait("removed")
        assert os.listdir(folder) == ["round-000003.h5"]
        checkpoint.verify(Path(folder, "round-000003.h5"))
    world.wait("looked")
    write_together(world, folder)


def damaged_for_one(world: Comm, folder: str) -> None:
    """Damage one rank's share: every rank raises."""
    write_together(world, folder)
    path = Path(folder, checkpoint.name(3, False))
    heard = []
    for at in (-1, 30000):
        world.wait("whole")
        if world.rank == 0:
            flip_bit(path, at)
        try:
            world.agree(lambda: checkpoint.verify(path, world.rank, world.size), "verify")
        except CheckpointError as error:
            heard.append(str(error))
        world.wait("read")
        if world.rank == 0:
            flip_bit(path, at)
    assert len(heard) == 2 and all("damaged" in text for text in heard)


def write_limited(world: Comm, folder: str) -> None:
    """Limit the file to many lengths: a CheckpointError each time, the old file stays, the last succeeds."""
    whole = sample_content()
    home, mine = distribute(world, whole)
    first = Path(folder, checkpoint.name(3, False))
    checkpoint.write(world, first, whole, mine.__getitem__, home)
    length, unlimited = first.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [0, 1, 8, 512, 4095, 4096, 5000, *range(6000, length, length // 30), length - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            checkpoint.write(world, Path(folder, checkpoint.name(4, False)), whole, mine.__getitem__, home)
        except CheckpointError:
            pass
        else:
            raise AssertionError(f"no error at {limit} of {length} bytes")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert os.listdir(folder) == [first.name], limit
    write_together(world, folder)


def writer_killed(folder: str, seed: str, times: str) -> None:
    """Kill children that keep writing checkpoints; every file without a temporary name must verify."""
    draw, number, unfinished = random.Random(seed), 0, 0
    for _ in range(int(times)):
        child = os.fork()
        if not child:
            _write_for_ever(Path(folder), number)
        ready = time.monotonic() + 20
        while not Path(folder, checkpoint.name(number, False)).exists() and time.monotonic() < ready:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        while draw.random() < 0.999 and not list(Path(folder).glob(".*.tmp")):
            pass
        time.sleep(draw.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"
        found = checkpoint.newest_first(Path(folder))
        for path in found:
            checkpoint.verify(path)
            with Checkpoint(path) as loaded:
                assert loaded.round == int(path.stem.split("-")[1])
        unfinished += any(name.endswith(".tmp") for name in os.listdir(folder))
        number = int(found[0].stem.split("-")[1]) + 1
    print(f"{number} checkpoints, {unfinished} kills in the middle of one")


def _write_for_ever(folder: Path, number: int) -> NoReturn:
    world = launch.start()
    whole = sample_content(clients=8, sizes=(100_000, 20_000))
    home, mine = distribute(world, whole)
    for round in count(number):
        now = replace(whole, round=round, history=[sample_row(n + 1) for n in range(round)])
        checkpoint.write(world, folder / checkpoint.name(round, False), now, mine.__getitem__, home)
        for old in checkpoint.newest_first(folder)[3:]:
            old.unlink()
    raise AssertionError


def main(check: str, *arguments: str) -> None:
    if check == "writer_killed":
        writer_killed(*arguments)
        return
    world = launch.start()
    try:
        {work.__name__: work for work in (write_together, write_fails, write_limited, damaged_for_one)}[
            check
        ](world, *arguments)
    except BaseException as error:
        world.fault(error)
    world.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
