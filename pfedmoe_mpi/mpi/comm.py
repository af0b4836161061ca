"""The only file that imports mpi4py: start, abort, wait, sum, agree, move. It knows nothing of learning.

Nobody waits inside MPI: a rank blocked there spins, runs no signal handler and cannot time out. Whoever is
done posts a non-blocking operation and tests it, sleeping in between, looking for a stop and a time-out.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

import numpy as np

from pfedmoe_mpi.environment import SIGNALS, launched_size
from pfedmoe_mpi.errors import EXIT_FAULT, LaunchError, MessageError, StoppedError, UserError

T = TypeVar("T")

_STOP, _ARRIVED, _MOVE, _FAULT = 1, 2, 3, 4  # message tags
_WALL_TIME = 0  # in place of a signal's number
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.0002, 0.01


class Comm:
    """A communicator with polite waiting. Every method but `poll`, `abort` and `send` is collective."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._control = comm.Dup()
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.timeout = 600.0
        self.grace = 10.0  # how much later than rank 0, which knows who is missing, each next rank speaks up
        self.chunk = 1 << 26  # 8-byte numbers per operation: 512 MiB, below MPI's 2 GiB limit
        self.stop_at = math.inf  # as time.time(): when to stop by itself, which one rank is enough to know
        self.signal_received = 0
        self.stopped_by = ""  # for people
        self._stopping = False
        self._sent: list[Any] = []

    # Stops

    def catch_signals(self) -> None:
        """SIGUSR1, SIGTERM and Ctrl-C ask for a stop; a second Ctrl-C ends the job.

        Those that came while they were held back are met now.
        """

        def handler(number: int, frame: FrameType | None) -> None:
            if self.signal_received == signal.SIGINT == number:
                self.abort("interrupted twice")
            self.signal_received = number

        for number in SIGNALS:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop, as far as this one has heard; passes its own request on."""
        if self._stopping:
            return True
        if self.signal_received or time.time() >= self.stop_at:
            self._stop(self.signal_received or _WALL_TIME, self.rank)
            self._tell_others(_STOP, self.signal_received or _WALL_TIME)
        elif self.size > 1:
            message = self._message(_STOP)
            if message:
                self._stop(*message)
        return self._stopping

    def _stop(self, cause: int, rank: int) -> None:
        self._stopping = True
        self.stopped_by = f"{signal.Signals(cause).name} to rank {rank}" if cause else "the wall-time limit"

    def _tell_others(self, tag: int, number: int) -> None:
        token = np.array([number], np.int64)
        others = (rank for rank in range(self.size) if rank != self.rank)
        self._sent += [(self._control.Isend(token, other, tag), token) for other in others]

    def _message(self, tag: int) -> tuple[int, int] | None:
        """(number, rank) of a message that has come, if any."""
        from mpi4py import MPI

        status, token = MPI.Status(), np.empty(1, np.int64)
        if not self._control.Iprobe(tag=tag, status=status):
            return None
        self._control.Recv(token, status.source, tag)
        return int(token[0]), status.source

    def poll(self) -> None:
        """Raise StoppedError if a stop was asked for on any rank. Called between batches."""
        if self.stop_requested():
            raise StoppedError

    # Waiting

    def wait(self, purpose: str) -> float:
        """A barrier; the seconds waited. After the time-out the job ends, naming who is missing."""
        started = time.perf_counter()
        if self.size == 1:
            return 0.0
        token = np.zeros(1, np.int64)
        if self.rank:
            self._sent.append((self._control.Isend(token, 0, _ARRIVED), token))
        arrived = {0}
        self._complete(self._control.Ibarrier(), purpose, arrived)
        while self.rank == 0 and len(arrived) < self.size:
            self._note_arrivals(arrived)
        self._sent = [(request, buffer) for request, buffer in self._sent if not request.Test()]
        return time.perf_counter() - started

    def _complete(self, request: Any, purpose: str, arrived: set[int] | None = None) -> None:
        """Test until done, sleeping a twentieth of the time waited so far."""
        started = time.monotonic()
        deadline = started + self.timeout
        while not request.Test():
            self.stop_requested()
            if arrived is not None and self.rank == 0:
                self._note_arrivals(arrived)
            if time.monotonic() > deadline + self.grace * min(self.rank, 6):
                self._timed_out(purpose, arrived)
            longest = _SHORTEST_SLEEP if arrived is None else _LONGEST_SLEEP
            time.sleep(min(max((time.monotonic() - started) / 20, _SHORTEST_SLEEP), longest))

    def _timed_out(self, purpose: str, arrived: set[int] | None) -> NoReturn:
        """End the job: a barrier lacks somebody, or an exchange that all had entered did not end."""
        if arrived is None:
            self.abort(f"the exchange '{purpose}' did not end within {self.timeout:g} s")
        missing = sorted(set(range(self.size)) - arrived) if self.rank == 0 else [0]
        named = ", ".join(map(str, missing))
        self.abort(
            f"no sign for {self.timeout:g} s at '{purpose}' of rank {named}; "
            "if a client's step may take longer, raise --run.timeout"
        )

    def _note_arrivals(self, arrived: set[int]) -> None:
        """One message of each rank; a quick one may already have sent its next."""
        for source in range(1, self.size):
            if source not in arrived and self._control.Iprobe(source, _ARRIVED):
                self._control.Recv(np.empty(1, np.int64), source, _ARRIVED)
                arrived.add(source)

    # Exchange

    def sum(self, buffer: np.ndarray, purpose: str) -> float:
        """Add an int64 buffer (n,) up over all ranks, in place; the seconds waited for the others."""
        from mpi4py import MPI

        assert buffer.dtype == np.int64 and buffer.flags.c_contiguous
        waited = self.wait(purpose)
        if self.size > 1:
            for start in range(0, len(buffer), self.chunk):
                piece = buffer[start : start + self.chunk]
                self._complete(self._control.Iallreduce(MPI.IN_PLACE, piece, MPI.SUM), purpose)
        return waited

    def broadcast(self, array: np.ndarray, purpose: str) -> None:
        """Rank 0's numbers to all, in place."""
        self.wait(purpose)
        if self.size > 1:
            for piece in self._pieces(array):
                self._complete(self._control.Ibcast(piece, 0), purpose)

    def gather(self, value: T, purpose: str) -> list[T]:
        """A small Python object of every rank, on all ranks in rank order."""
        from mpi4py import MPI

        self.wait(purpose)
        if self.size == 1:
            return [value]
        own = np.frombuffer(MPI.pickle.dumps(value), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._complete(self._control.Iallgather(np.array([len(own)], np.int64), lengths), purpose)
        everyone = np.empty(int(lengths.sum()), np.uint8)
        counts = [int(length) for length in lengths]
        self._complete(self._control.Iallgatherv(own, [everyone, counts]), purpose)
        pieces = np.split(everyone, np.cumsum(lengths)[:-1])
        return [MPI.pickle.loads(piece.tobytes()) for piece in pieces]

    def from_root(self, work: Callable[[], T], purpose: str, send: Callable[[T], T] | None = None) -> T:
        """Return rank 0's result on all ranks; its UserError is raised on all of them.

        Args:
            send: what the other ranks get of the result, a small object; default: the result itself.
        """
        results: list[T] = []

        def share() -> T:
            results.append(work())
            return send(results[0]) if send else results[0]

        received = self.agree(share if self.rank == 0 else None, purpose)[0]
        return results[0] if results else received  # type: ignore[return-value]

    def agree(self, work: Callable[[], T] | None, purpose: str) -> list[T | None]:
        """Everyone's result on all ranks; if any rank met a UserError, all raise the first one."""
        result: T | UserError | None
        try:
            result = work() if work else None
        except UserError as error:
            result = error
        results = self.gather(result, purpose)
        for item in results:
            if isinstance(item, UserError):
                raise item
        return results  # type: ignore[return-value]

    def attempt(self, work: Callable[[], T], purpose: str) -> T:
        """Return this rank's result of `work`, which is not sent; raise the first rank's UserError on all."""
        results: list[T] = []

        def keep() -> None:
            results.append(work())

        self.agree(keep, purpose)
        return results[0]

    def move(self, transfers: list[tuple[int, int, np.ndarray]], purpose: str) -> None:
        """Send arrays (source, destination, array): filled in at the destination, read at the source.

        All ranks pass the same list in the same order; arrays of ranks not concerned may be empty.
        """
        self.wait(purpose)
        requests = []
        for source, destination, array in transfers:
            if self.rank == source != destination:
                requests += [self._comm.Isend(piece, destination, _MOVE) for piece in self._pieces(array)]
            elif self.rank == destination != source:
                requests += [self._comm.Irecv(piece, source, _MOVE) for piece in self._pieces(array)]
        for request in requests:
            self._complete(request, purpose)

    def _pieces(self, array: np.ndarray) -> list[np.ndarray]:
        """The bytes of an array, in stretches below MPI's limit."""
        assert array.flags.c_contiguous, "a copy would be filled in instead of the array"
        flat, step = array.reshape(-1).view(np.uint8), 8 * self.chunk
        return [flat[start : start + step] for start in range(0, len(flat), step)]

    def local(self) -> tuple[int, int]:
        """(rank on this host, ranks on this host), by a shared-memory split."""
        from mpi4py import MPI

        host = self._control.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        local = host.Get_rank(), host.Get_size()
        host.Free()
        return local

    def split(self, color: int) -> Comm | None:
        """A communicator of the ranks with equal color; None for a negative one."""
        from mpi4py import MPI

        part = self._comm.Split(color if color >= 0 else MPI.UNDEFINED, self.rank)
        return None if color < 0 else Comm(part)

    # The end

    @contextmanager
    def located(self, place: str) -> Iterator[None]:
        """Name this rank and the innermost `place` in an exception that ends the job."""
        try:
            yield
        except (StoppedError, MessageError):
            raise
        except Exception as error:
            if not getattr(error, "__notes__", None):
                error.add_note(f"rank {self.rank}, {place}")
            raise

    def abort(self, reason: str) -> NoReturn:
        """End the whole job at once with exit code 1."""
        self._last_words(reason)
        time.sleep(0.5)  # MPICH's launcher drops what it has not passed on when the job ends
        self._comm.Abort(EXIT_FAULT)
        os._exit(EXIT_FAULT)  # an MPI whose Abort returns

    def _last_words(self, reason: str) -> None:
        with suppress(OSError, ValueError):  # nobody may read what is printed; the job must end all the same
            sys.stdout.flush()
        with suppress(OSError, ValueError):
            print(f"rank {self.rank}: {reason}", file=sys.stderr, flush=True)

    def fault(self, error: BaseException) -> NoReturn:
        """End the whole job with this rank's traceback, or silently if another rank is about to."""
        if not self._faulted_elsewhere():
            self.abort("".join(traceback.format_exception(error)))
        time.sleep(2.0)  # the other one ends the job
        self.abort("ends too")

    def _faulted_elsewhere(self) -> bool:
        """Whether a rank fails at the same time, and speaks: the first, or the lowest of several."""
        if self.size == 1:
            return False
        if self._message(_FAULT):
            return True
        self._tell_others(_FAULT, self.rank)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            time.sleep(0.01)
            message = self._message(_FAULT)
            if message and message[1] < self.rank:
                return True
        return False

    def finish(self) -> None:
        """Leave together, so that no launcher kills the others at the first exit code; drop unread stops."""
        self.wait("end")
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the exit code is settled
        while self.size > 1 and self._control.Iprobe(tag=_STOP):
            self._control.Recv(np.empty(1, np.int64), tag=_STOP)


def start(allow_singleton: bool = False) -> Comm:
    """Start MPI and take the world.

    Raises:
        LaunchError: no MPI library, or a launcher of another MPI family started ranks unknown to each other.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpi4py finds no MPI library ({str(error).splitlines()[0]})",
            "load the cluster's MPI module, or install a runtime: pip install 'pfedmoe_mpi[mpich]'",
        ) from error
    if not MPI.Is_initialized():
        with warnings.catch_warnings():  # mpi4py suspects a mismatched launcher too, on every rank
            warnings.simplefilter("ignore", RuntimeWarning)
            MPI.Init_thread(MPI.THREAD_FUNNELED)
    world = Comm(MPI.COMM_WORLD)
    expected = launched_size(os.environ)
    if world.size == 1 and expected > 1 and not allow_singleton:
        raise LaunchError(
            f"the launcher started {expected} ranks, but each believes it is alone: it belongs to another "
            f"MPI than {library()}",
            "use the mpirun of the same MPI, or srun --mpi=pmi2 (MPICH) or pmix (Open MPI); "
            "--run.singleton true if one rank is meant",
        )
    return world


def library() -> str:
    """The MPI library's first line."""
    from mpi4py import MPI

    return MPI.Get_library_version().splitlines()[0].strip(" \0")
