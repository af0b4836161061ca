"""What ranks do in the tests of comm.py and checkpoint.py: `mpirun -n 4 python comm_driver.py CHECK ...`.

Harmless checks run one after the other in one job, each on a communicator of its own; `pass NAME` is printed
when all ranks have passed it. Other checks are run alone. Imported, this file launches the jobs.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NoReturn

import numpy as np

from pfedmoe_mpi import checkpoint, comm
from pfedmoe_mpi.checkpoint import Checkpoint, Content
from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.errors import EXIT_STOPPED, CheckpointError, ConfigError, StoppedError, UserError
from pfedmoe_mpi.flat import Layout

HERE = Path(__file__).parent
MARK = "PFEDMOE_TEST_JOB"

# Launching


@dataclass(frozen=True)
class Ended:
    """A job that came to an end: exit code, all it printed, duration, processes left a second later."""

    code: int
    output: str
    seconds: float
    left: int


def openmpi() -> Path | None:
    """Open MPI's folder beside the installed MPICH."""
    folder = HERE.parent / ".openmpi"
    return folder if (folder / "bin" / "mpirun").exists() else None


def mpirun(*arguments: str, ranks: int = 4, limit: float = 60, runtime: str = "mpich") -> Ended:
    """Run this file; after `limit` seconds everything it started is killed."""
    token = uuid.uuid4().hex
    environment = {**os.environ, MARK: token, "OMP_NUM_THREADS": "1"}
    launcher = [str(Path(sys.executable).parent / "mpirun")]
    folder = openmpi() if runtime == "openmpi" else None
    if folder:
        environment |= {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "MPI4PY_MPIABI": "openmpi",
            "MPI4PY_LIBMPI": str(folder / "lib" / "libmpi.so.40"),
        }
        launcher = [str(folder / "bin" / "mpirun"), "--oversubscribe", "--allow-run-as-root"]
    command = [*launcher, "-n", str(ranks), sys.executable, str(HERE / "comm_driver.py"), *arguments]
    started = time.monotonic()
    job = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for process in [job.pid, *marked(token)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        output = job.communicate()[0] + f"\nkilled after {limit} s"
    seconds = time.monotonic() - started
    deadline = time.monotonic() + 1
    while marked(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    return Ended(job.returncode, output, seconds, len(marked(token)))


def marked(token: str) -> list[int]:
    """The live processes of a job."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if token.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


# Checks that all ranks pass


def total(world: Comm) -> None:
    """The sum is exact, in one piece or in many."""
    for chunk in (1 << 26, 7, 1):
        world.chunk = chunk
        for length in (0, 1, 7, 50):
            whole = np.random.default_rng(length).integers(-(2**61), 2**61, (world.size, length))
            buffer = whole[world.rank].copy()
            waited = world.sum(buffer, "sum")
            assert np.array_equal(buffer, whole.sum(axis=0)) and waited >= 0
    alone = np.full(1000, 1 << 52 | 1, np.int64) if world.rank == 1 else np.zeros(1000, np.int64)
    world.sum(alone, "one contributes")
    assert (alone == 1 << 52 | 1).all(), "a slot is exact"


def broadcast(world: Comm) -> None:
    for chunk in (1 << 26, 3):
        world.chunk = chunk
        for shape in ((0,), (1,), (10, 7), (3, 1, 5)):
            sent = np.random.default_rng(1).random(shape).astype(np.float32)
            array = sent.copy() if world.rank == 0 else np.zeros(shape, np.float32)
            world.broadcast(array, "broadcast")
            assert np.array_equal(array, sent)


def gather(world: Comm) -> None:
    assert world.gather({"rank": world.rank, "x": b"a" * world.rank * 100000}, "gather") == [
        {"rank": rank, "x": b"a" * rank * 100000} for rank in range(world.size)
    ]


def agree(world: Comm) -> None:
    """Everyone's result on all ranks; a user's mistake on one is everyone's."""

    def fail() -> int:
        if world.rank >= 2:
            raise ConfigError(f"wrong on rank {world.rank}", "mend it")
        return world.rank

    assert world.agree(lambda: world.rank * 2, "agree") == [0, 2, 4, 6]
    assert world.agree(None, "nobody") == [None] * world.size
    assert world.from_root(lambda: world.rank + 5, "root") == 5
    heard: list[UserError] = []
    for _ in range(3):
        try:
            world.agree(fail, "agree")
        except UserError as error:
            heard.append(error)
    expected = (ConfigError, "wrong on rank 2\n  remedy: mend it")
    assert [(type(error), str(error)) for error in heard] == [expected] * 3
    assert world.gather(world.rank, "after") == [0, 1, 2, 3]


def move(world: Comm) -> None:
    """Arrays of any size between any two ranks, several between the same two, own ones untouched."""
    draw = np.random.default_rng(4)
    for chunk in (1 << 26, 2):
        world.chunk = chunk
        plan = [
            (int(s), int(d), int(n)) for s, d, n in zip(*draw.integers(0, (4, 4, 50), (40, 3)).T, strict=True)
        ]
        plan += [(0, 3, 0), (1, 2, 0), (2, 2, 5)]
        arrays = [
            np.random.default_rng(i).random((n, 3)).astype(np.float32) for i, (_, _, n) in enumerate(plan)
        ]
        transfers, received = [], []
        for (source, destination, n), array in zip(plan, arrays, strict=True):
            mine = array if world.rank == source else np.zeros((n, 3), np.float32)
            if world.rank == destination:
                received.append((mine, array))
            concerned = world.rank in (source, destination)
            transfers.append((source, destination, mine if concerned else np.empty(0, np.uint8)))
        world.move(transfers, "move")
        assert all(np.array_equal(got, sent) for got, sent in received)
    try:
        world.move([(0, 1, np.zeros((4, 4))[:, :2])], "strided")
    except AssertionError:
        assert world.rank in (0, 1)
    else:
        assert world.rank > 1


def barrier(world: Comm) -> None:
    """Nobody leaves a wait before the last has come, however quick some ranks are."""
    draw = random.Random(world.rank)
    before, after = [], []
    for _ in range(150):
        if draw.random() < 0.1 * world.rank:
            time.sleep(draw.random() * 0.01)
        before.append(time.monotonic())
        world.wait("again")
        after.append(time.monotonic())
    came, left = (np.array(world.gather(times, "times")) for times in (before, after))
    assert (left.min(axis=0) >= came.max(axis=0)).all()


def many(world: Comm) -> None:
    world.wait("start")
    started = time.monotonic()
    for _ in range(1000):
        world.wait("many")
    if world.rank == 0:
        print(f"1000 waits took {time.monotonic() - started:.2f} s", flush=True)
    assert time.monotonic() - started < 15


def polite(world: Comm) -> None:
    """Who waits for a late rank leaves the processor to it."""
    if world.rank == 3:
        time.sleep(2)
        world.wait("late")
        return
    spent = time.process_time()
    waited = world.wait("late")
    spent = time.process_time() - spent
    assert waited > 1.5 and spent < 0.3, f"{spent:.2f} s of processor time in a wait of {waited:.2f} s"


def quick(world: Comm) -> None:
    """A message of 16 MB does not crawl because its steps are polled for."""
    buffer = np.full(1 << 21, world.rank, np.int64)
    world.sum(buffer, "warm")
    started = time.monotonic()
    world.sum(np.full(1 << 21, world.rank, np.int64), "timed")
    if world.rank == 0:
        print(f"a sum of 16 MB took {time.monotonic() - started:.3f} s", flush=True)
    assert (buffer == 6).all() and time.monotonic() - started < 5


def stop(world: Comm) -> None:
    """One rank's signal ends the work of all of them between two batches."""
    world.catch_signals()
    world.poll()
    world.wait("all listen")
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline:
            world.poll()
            time.sleep(0.001)
    except StoppedError:
        assert world.stop_requested()
        world.finish()
        return
    raise AssertionError("no stop in 20 s")


def stop_while_waiting(world: Comm) -> None:
    """A signal is heard and passed on inside a wait, and the wait goes on."""
    world.catch_signals()
    if world.rank == 1:
        time.sleep(1)
        heard = [time.monotonic() + 10]
        while not world.stop_requested() and time.monotonic() < heard[0]:
            time.sleep(0.01)
    elif world.rank == 3:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    world.wait("a stop comes")
    assert world.stop_requested()
    world.finish()


def stop_everywhere(world: Comm) -> None:
    """All are told at once, as by mpirun; unread messages disturb neither what follows nor the end."""
    world.catch_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    buffer = np.ones(10, np.int64)
    world.sum(buffer, "after a stop")
    assert buffer.tolist() == [4] * 10 and world.stop_requested()
    world.finish()
    world.wait("others drain")
    assert not world._control.Iprobe(tag=comm._STOP)


def parts(world: Comm) -> None:
    """Sub-communicators, one of a single rank among them, work like the world."""
    assert world.local() == (world.rank, world.size)
    part = world.split(-1 if world.rank == 3 else world.rank // 2)
    if world.rank == 3:
        assert part is None
    else:
        assert part is not None
        assert (part.rank, part.size) == ((world.rank, 2) if world.rank < 2 else (0, 1))
        buffer = np.array([world.rank + 1])
        part.sum(buffer, "part")
        assert buffer[0] == 3
        part.broadcast(buffer, "part")
        assert part.gather("x", "part") == ["x"] * part.size
        part.move([(0, part.size - 1, np.zeros(3))], "part")
        part.finish()
    world.wait("parts done")


# Checks that end the job


def missing(world: Comm, *late: str) -> None:
    """Some ranks never come."""
    world.timeout, world.grace = 1.0, 0.5
    world.wait("start")
    if str(world.rank) in late:
        time.sleep(100)
    world.sum(np.zeros(3, np.int64), "sum of round 7")


def unfinished(world: Comm) -> None:
    """All come to the wait, but one does not take part in what follows."""
    world.timeout, world.grace = 1.0, 0.5
    if world.rank == 3:
        world.wait("sum")
        time.sleep(100)
    world.sum(np.zeros(3, np.int64), "sum of round 7")


def fault(world: Comm) -> None:
    """A bug on one rank."""

    def work() -> None:
        if world.rank == 2:
            raise ValueError("a bug on rank two")

    world.agree(work, "work")


def unheard(world: Comm) -> None:
    """A bug on a rank whose output goes nowhere."""
    if world.rank == 2:
        sys.stdout.write("something buffered")
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), 1)
            os.dup2(full.fileno(), 2)
        raise ValueError("nobody reads this")
    world.wait("for ever")


def code(world: Comm, folder: str) -> None:
    """All leave with 75, one of them late."""
    if world.rank == 3:
        time.sleep(0.7)
        Path(folder, "late").write_text("written")
    world.finish()
    sys.exit(EXIT_STOPPED)


def late_stop(world: Comm) -> None:
    """Stops asked for while the others already leave."""
    if world.rank:
        world.signal_received = signal.SIGUSR1
        time.sleep(0.1 * world.rank)
    world.finish()
    world.stop_requested()


# Checkpoints

SIZES = (1500, 1, 0, 100, 1024, 5000)


def content(
    clients: int = 12, partial: bool = False, sizes: Sequence[int] = SIZES, state: int = 700
) -> Content:
    """What a checkpoint may hold; client k's vector has sizes[k mod length] numbers."""
    draw = np.random.default_rng(clients)
    layouts = [Layout.join({"model": Layout.of_tensor((sizes[k % len(sizes)],))}) for k in range(clients)]
    split = [draw.integers(0, 1000, k % 4) for k in range(clients)]
    return Content(
        config={"algorithm": "pfedmoe", "train": {"lr": 0.1, "pool": ["cnn1", "cnn2"]}, "name": "bärbel"},
        round=3,
        state=draw.standard_normal(state).astype(np.float32),
        state_layout=Layout.join({"shared": Layout.of_tensor((state,))}) if state else Layout(()),
        client_layouts=layouts,
        partition={"train": split, "validation": [np.empty(0, np.int64)] * clients, "test": split[::-1]},
        history=[{"round": n, "x": 0.1 * n, "accuracy": {"mean": None}} for n in (1, 2, 3)],
        identity={"data_digest": "ab" * 32, "torch": "2.6", "notes": "ünicode " * 500},
        partial=draw.integers(-(2**62), 2**62, 333) if partial else None,
        finished=[1, 4] if partial else [],
    )


def vector(whole: Content, client: int) -> np.ndarray:
    """Any bits at all, NaN with payloads among them."""
    size = whole.client_layouts[client].size
    return np.random.default_rng(client).integers(0, 2**32, size, np.uint32).view(np.float32)


def shared_out(world: Comm, whole: Content) -> tuple[list[int], dict[int, np.ndarray]]:
    """(home of every client, this rank's vectors)."""
    home = [client % world.size for client in range(len(whole.client_layouts))]
    return home, {client: vector(whole, client) for client, rank in enumerate(home) if rank == world.rank}


def write_together(world: Comm, folder: str) -> None:
    whole = content()
    home, mine = shared_out(world, whole)
    path = Path(folder, checkpoint.name(3, False))
    checkpoint.write(world, path, whole, mine, home)
    world.agree(lambda: checkpoint.verify(path, world.rank, world.size), "verify")
    with Checkpoint(path) as loaded:
        for client in range(len(home)):
            assert np.array_equal(
                loaded.vector(client).view(np.uint32), vector(whole, client).view(np.uint32)
            )


def write_fails(world: Comm, folder: str) -> None:
    """A file may not grow on one rank: all hear of it, nothing is left of it, and the next one is good."""
    write_together(world, folder)
    whole = content()
    home, mine = shared_out(world, whole)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, failing in enumerate((2, 0), 4):
        path, heard = Path(folder, checkpoint.name(number, False)), ""
        if world.rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, unlimited[1]))
        try:
            checkpoint.write(world, path, whole, mine, home)
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
    """The rank whose share is damaged tells all."""
    write_together(world, folder)
    path = Path(folder, checkpoint.name(3, False))
    heard = []
    for at in (-1, 30000):
        world.wait("whole")
        if world.rank == 0:
            flip(path, at)
        try:
            world.agree(lambda: checkpoint.verify(path, world.rank, world.size), "verify")
        except CheckpointError as error:
            heard.append(str(error))
        world.wait("read")
        if world.rank == 0:
            flip(path, at)
    assert len(heard) == 2 and all("damaged" in text for text in heard)


def flip(path: Path, at: int, bit: int = 4) -> None:
    """Turn one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


def write_limited(world: Comm, folder: str) -> None:
    """Files limited to any length: an error of ours each time, the old file stays, the next is good."""
    whole = content()
    home, mine = shared_out(world, whole)
    first = Path(folder, checkpoint.name(3, False))
    checkpoint.write(world, first, whole, mine, home)
    length, unlimited = first.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [0, 1, 8, 512, 4095, 4096, 5000, *range(6000, length, length // 30), length - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            checkpoint.write(world, Path(folder, checkpoint.name(4, False)), whole, mine, home)
        except CheckpointError:
            pass
        else:
            raise AssertionError(f"no error at {limit} of {length} bytes")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert os.listdir(folder) == [first.name], limit
    write_together(world, folder)


def writer_killed(folder: str, seed: str, times: str) -> None:
    """Children that write checkpoint after checkpoint are killed at any moment; what has a name is good."""
    draw, number, unfinished = random.Random(seed), 0, 0
    for _ in range(int(times)):
        child = os.fork()
        if not child:
            _write_for_ever(Path(folder), number)
        ready = time.monotonic() + 20
        while not Path(folder, checkpoint.name(number, False)).exists() and time.monotonic() < ready:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.06)
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
    world = comm.start()
    whole = content(clients=8, sizes=(100_000, 20_000))
    home, mine = shared_out(world, whole)
    for round in count(number):
        checkpoint.write(
            world, folder / checkpoint.name(round, False), replace(whole, round=round), mine, home
        )
        for old in checkpoint.newest_first(folder)[3:]:
            old.unlink()
    raise AssertionError


HARMLESS: dict[str, Callable[[Comm], None]] = {
    work.__name__: work
    for work in (
        *(total, broadcast, gather, agree, move, barrier, many, polite, quick),
        *(stop, stop_while_waiting, stop_everywhere, parts),
    )
}
ALONE: dict[str, Callable[..., None]] = {
    work.__name__: work
    for work in (
        *(missing, unfinished, fault, unheard, code, late_stop),
        *(write_together, write_fails, write_limited, damaged_for_one),
    )
}


def main(name: str, *arguments: str) -> None:
    world = comm.start()
    try:
        if name in ALONE:
            ALONE[name](world, *arguments)
        for check, work in HARMLESS.items() if name == "harmless" else ():
            own = world.split(0)
            assert own is not None
            work(own)
            world.wait(check)
            if world.rank == 0:
                print(f"pass {check}", flush=True)
    except SystemExit:
        raise
    except BaseException as error:
        world.fault(error)
    world.finish()


if __name__ == "__main__":
    if sys.argv[1] == "writer_killed":
        writer_killed(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
