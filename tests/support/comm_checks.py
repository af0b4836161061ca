"""What ranks do in the tests of comm.py: `mpirun -n 4 python -m support.comm_checks CHECK ...`.

Harmless checks run one after the other in one job, each on a communicator of its own; `pass NAME` is printed
when all ranks have passed it. Other checks are run alone.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pfedmoe_mpi.errors import EXIT_STOPPED, ConfigError, StoppedError, UserError
from pfedmoe_mpi.mpi import comm, launch
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.part import divide

# Checks that all ranks pass


def total(world: Comm) -> None:
    """Sum exactly, in one piece or in many."""
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
    """Return every rank's result on all ranks; raise a UserError of one rank on all."""

    def fail() -> int:
        if world.rank >= 2:
            raise ConfigError(f"wrong on rank {world.rank}", "fix it")
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
    expected = (ConfigError, "wrong on rank 2\n  remedy: fix it")
    assert [(type(error), str(error)) for error in heard] == [expected] * 3
    assert world.gather(world.rank, "after") == [0, 1, 2, 3]


def move(world: Comm) -> None:
    """Move arrays of any size between any two ranks, several between the same two, some to oneself."""
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
    """Hold every rank in a wait until the last one arrives."""
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
    """Use almost no processor time while waiting for a late rank."""
    if world.rank == 3:
        time.sleep(2)
        world.wait("late")
        return
    spent = time.process_time()
    waited = world.wait("late")
    spent = time.process_time() - spent
    assert waited > 1.5 and spent < 0.1, f"{spent:.2f} s of processor time in a wait of {waited:.2f} s"


def quick(world: Comm) -> None:
    """Send a message of 16 MB within seconds although its steps are polled."""
    buffer = np.full(1 << 21, world.rank, np.int64)
    world.sum(buffer, "warm")
    started = time.monotonic()
    world.sum(np.full(1 << 21, world.rank, np.int64), "timed")
    if world.rank == 0:
        print(f"a sum of 16 MB took {time.monotonic() - started:.3f} s", flush=True)
    assert (buffer == 6).all() and time.monotonic() - started < 5


def stop(world: Comm) -> None:
    """Stop all ranks between two batches when one gets a signal."""
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
    """Receive and forward a signal inside a wait, and continue waiting."""
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
    """Signal all ranks at once, as mpirun does; unread messages disturb neither the next call nor the end."""
    world.catch_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    buffer = np.ones(10, np.int64)
    world.sum(buffer, "after a stop")
    assert buffer.tolist() == [4] * 10 and world.stop_requested()
    world.finish()
    world.wait("others drain")
    assert not world._control.Iprobe(tag=comm._STOP)


def parts(world: Comm) -> None:
    """Use sub-communicators, including one of a single rank, like the world."""
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


def divided(world: Comm) -> None:
    """Divide four ranks into three parts; a stop of one rank reaches all, and each counts the whole host."""
    world.catch_signals()
    number, part = divide(world, 3)
    assert (number, part.rank, part.size) == [(0, 0, 2), (0, 1, 2), (1, 0, 1), (2, 0, 1)][world.rank]
    assert part.local() == (world.rank, world.size) and part.names[part.rank] == world.rank
    assert part.gather(world.rank, "part") == part.names
    world.wait("all are divided")
    assert not part.stop_requested()
    world.wait("none is stopped")
    if world.rank == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while not part.stop_requested():
        assert time.monotonic() < deadline, "no stop in 20 s"
        time.sleep(0.001)
    assert part.stopped_by == "SIGUSR1 to rank 3"
    world.finish()


# Checks that end the job


def missing(world: Comm, *late: str) -> None:
    """Keep some ranks away from a sum."""
    world.timeout, world.grace = 1.0, 2.0
    world.wait("start")
    if str(world.rank) in late:
        time.sleep(1000)
    world.sum(np.zeros(3, np.int64), "sum of round 7")


def unfinished(world: Comm) -> None:
    """Bring all ranks to the wait, but keep one from the exchange after it."""
    world.timeout, world.grace = 1.0, 2.0
    if world.rank == 3:
        world.wait("sum")
        time.sleep(1000)
    world.sum(np.zeros(3, np.int64), "sum of round 7")


def fault(world: Comm) -> None:
    """Raise an exception on one rank."""

    def work() -> None:
        if world.rank == 2:
            raise ValueError("a bug on rank two")

    world.agree(work, "work")


def unheard(world: Comm) -> None:
    """Raise an exception on a rank that cannot print."""
    if world.rank == 2:
        sys.stdout.write("something buffered")
        with open("/dev/full", "w", encoding="utf-8") as full:
            os.dup2(full.fileno(), 1)
            os.dup2(full.fileno(), 2)
        raise ValueError("nobody reads this")
    world.wait("for ever")


def code(world: Comm, folder: str) -> None:
    """Exit with 75 on all ranks, one of them late."""
    if world.rank == 3:
        time.sleep(0.7)
        Path(folder, "late").write_text("written", encoding="utf-8")
    world.finish()
    sys.exit(EXIT_STOPPED)


def late_stop(world: Comm) -> None:
    """Request stops while other ranks already finish."""
    if world.rank:
        world.signal_received = signal.SIGUSR1
        time.sleep(0.1 * world.rank)
    world.finish()
    world.stop_requested()


HARMLESS: dict[str, Callable[[Comm], None]] = {
    work.__name__: work
    for work in (
        *(total, broadcast, gather, agree, move, barrier, many, polite, quick),
        *(stop, stop_while_waiting, stop_everywhere, parts, divided),
    )
}
ALONE: dict[str, Callable[..., None]] = {
    work.__name__: work for work in (missing, unfinished, fault, unheard, code, late_stop)
}


def main(name: str, *arguments: str) -> None:
    world = launch.start()
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
    main(*sys.argv[1:])
