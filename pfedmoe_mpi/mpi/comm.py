"""The communicator: wait, exchange, signals and abort; independent of learning.

Only this module and `launch` import mpi4py.

No rank blocks inside MPI: a blocked rank spins, runs no signal handler and cannot time out. Each rank posts a
non-blocking operation and tests it, sleeping in between, and checks for a stop and a time-out.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

import numpy as np

from pfedmoe_mpi.environment import SIGNALS
from pfedmoe_mpi.errors import EXIT_FAULT, MessageError, StoppedError, UserError

T = TypeVar("T")

_STOP, _ARRIVED, _MOVE, _FAULT = 1, 2, 3, 4  # message tags
_WALL_TIME = 0  # sent instead of a signal's number
TIMEOUT = 600.0  # seconds to wait for the other ranks, unless `run.timeout` is set
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.0002, 0.01  # seconds
_SAME_REQUEST = 1.0  # seconds in which a repeated Ctrl-C is not a second one


class Comm:
    """A communicator whose ranks sleep while they wait.

    Every rank must call the collective methods: `wait`, `sum`, `broadcast`, `gather`, `from_root`, `agree`,
    `attempt`, `move`, `local`, `split` and `finish`. The others are not collective.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._control = comm.Dup()
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.names: Sequence[int] = range(self.size)  # the ranks' numbers in messages
        self.timeout = TIMEOUT
        # Rank 0 knows which ranks are missing, so it reports first; rank n waits min(n, 6) · grace longer.
        self.grace = 10.0
        self.chunk = 1 << 26  # 8-byte numbers per operation: 512 MiB, below MPI's 2 GiB limit
        self.stop_at = math.inf  # wall-time limit, as time.time(); one rank that has it stops all
        self.signal_received = 0  # the last signal's number
        self.stopped_by = ""  # cause of the stop, in words
        self._stopping = False
        self._sent: list[Any] = []

    # Stops

    def catch_signals(self) -> None:
        """Request a stop on SIGUSR1, SIGTERM and Ctrl-C; end the job on a later Ctrl-C.

        Signals that arrived while they were blocked are handled now. A Ctrl-C within a second of the first is
        the same request: a launcher may pass on what the terminal has sent to the ranks already.
        """
        interrupted = math.inf

        def handler(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted
            self.signal_received = number
            if number == signal.SIGINT:
                if time.monotonic() > interrupted + _SAME_REQUEST:
                    time.sleep(min(self.rank, 1))  # one message: by then rank 0 has ended the job
                    self.abort("second Ctrl-C: the job ends at once, without another checkpoint")
                interrupted = min(interrupted, time.monotonic())

        for number in SIGNALS:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def stop_requested(self) -> bool:
        """Return whether this rank has a request to stop, or has received one; send its own to the others."""
        if self._stopping:
            return True
        if self.signal_received or time.time() >= self.stop_at:
            self._record_stop(self.signal_received or _WALL_TIME, self.rank)
            self._send_others(_STOP, self.signal_received or _WALL_TIME)
        elif self.size > 1:
            message = self._receive(_STOP)
            if message:
                self._record_stop(*message)
        return self._stopping

    def _record_stop(self, cause: int, rank: int) -> None:
        self._stopping = True
        self.stopped_by = f"{signal.Signals(cause).name} to rank {rank}" if cause else "the wall-time limit"

    def _send_others(self, tag: int, number: int) -> None:
        token, others = np.array([number], np.int64), set(range(self.size)) - {self.rank}
        self._sent += [(self._control.Isend(token, other, tag), token) for other in others]

    def _receive(self, tag: int) -> tuple[int, int] | None:
        """Return (number, source rank) of a message that has arrived, or None; does not wait."""
        from mpi4py import MPI

        status, token = MPI.Status(), np.empty(1, np.int64)
        if not self._control.Iprobe(tag=tag, status=status):
            return None
        self._control.Recv(token, status.source, tag)
        return int(token[0]), status.source

    def poll(self) -> None:
        """Raise StoppedError if a stop was requested on any rank. Called between batches."""
        if self.stop_requested():
            raise StoppedError

    # Waiting

    def wait(self, purpose: str) -> float:
        """Wait until every rank is here; return the seconds waited. End the job after the time-out."""
        started = time.perf_counter()
        if self.size == 1:
            return 0.0
        token = np.zeros(1, np.int64)
        if self.rank:
            self._sent.append((self._control.Isend(token, 0, _ARRIVED), token))
        arrived = {0}
        self._complete(self._control.Ibarrier(), purpose, arrived)
        while self.rank == 0 and len(arrived) < self.size:
            self._record_arrivals(arrived)
        self._sent = [(request, buffer) for request, buffer in self._sent if not request.Test()]
        return time.perf_counter() - started

    def _complete(self, request: Any, purpose: str, arrived: set[int] | None = None) -> None:
        """Test the request until it is complete, sleeping a twentieth of the time waited so far."""
        started = time.monotonic()
        deadline = started + self.timeout
        while not request.Test():
            self.stop_requested()
            if arrived is not None and self.rank == 0:
                self._record_arrivals(arrived)
            if time.monotonic() > deadline + self.grace * min(self.rank, 6):
                self._abort_timed_out(purpose, arrived)
            longest = _SHORTEST_SLEEP if arrived is None else _LONGEST_SLEEP
            time.sleep(min(max((time.monotonic() - started) / 20, _SHORTEST_SLEEP), longest))

    def _abort_timed_out(self, purpose: str, arrived: set[int] | None) -> NoReturn:
        """End the job: ranks are missing at a barrier, or an exchange that all had entered did not end."""
        longer = f"--run.timeout {2 * self.timeout:g}"
        if arrived is None:
            self.abort(
                f"all ranks reached '{purpose}', but the exchange did not end within {self.timeout:g} s "
                "(run.timeout): a rank or the network failed",
                "check the hosts and the network, then resume with: restart RUN; "
                f"if the network is only slow, add {longer}",
            )
        late = set(range(self.size)) - arrived if self.rank == 0 else {0}
        ranks = f"rank{'s' if len(late) > 1 else ''} {', '.join(str(self.names[n]) for n in sorted(late))}"
        self.abort(
            f"{ranks} did not reach '{purpose}' within {self.timeout:g} s (run.timeout)",
            f"look for an earlier error of {ranks} and check the hosts, then resume with: restart RUN; "
            f"if a client's step takes that long, add {longer}",
        )

    def _record_arrivals(self, arrived: set[int]) -> None:
        """Receive one message of each rank; a quick rank may already have sent its next one."""
        for source in range(1, self.size):
            if source not in arrived and self._control.Iprobe(source, _ARRIVED):
                self._control.Recv(np.empty(1, np.int64), source, _ARRIVED)
                arrived.add(source)

    # Exchange

    def sum(self, buffer: np.ndarray, purpose: str) -> float:
        """Sum an int64 or uint64 buffer (n,) over all ranks, in place; return the seconds waited."""
        from mpi4py import MPI

        assert buffer.dtype in (np.int64, np.uint64) and buffer.flags.c_contiguous
        waited = self.wait(purpose)
        if self.size > 1:
            for start in range(0, len(buffer), self.chunk):
                piece = buffer[start : start + self.chunk]
                self._complete(self._control.Iallreduce(MPI.IN_PLACE, piece, MPI.SUM), purpose)
        return waited

    def broadcast(self, array: np.ndarray, purpose: str) -> None:
        """Copy rank 0's array to all ranks, in place."""
        self.wait(purpose)
        if self.size > 1:
            for piece in self._pieces(array):
                self._complete(self._control.Ibcast(piece, 0), purpose)

    def gather(self, value: T, purpose: str) -> list[T]:
        """Return a small Python object of every rank, in rank order, on all ranks."""
        from mpi4py import MPI

        self.wait(purpose)
        if self.size == 1:
            return [value]
        pickled = np.frombuffer(MPI.pickle.dumps(value), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._complete(self._control.Iallgather(np.array([len(pickled)], np.int64), lengths), purpose)
        joined = np.empty(int(lengths.sum()), np.uint8)
        counts = [int(length) for length in lengths]
        self._complete(self._control.Iallgatherv(pickled, [joined, counts]), purpose)
        pieces = np.split(joined, np.cumsum(lengths)[:-1])
        return [MPI.pickle.loads(piece.tobytes()) for piece in pieces]

    def from_root(self, work: Callable[[], T], purpose: str, send: Callable[[T], T] | None = None) -> T:
        """Return rank 0's result of `work` on all ranks.

        Args:
            send: maps the result to a small object that the other ranks receive; default: the result itself.

        Raises:
            UserError: on all ranks, if `work` raised it on rank 0.
        """
        results: list[T] = []

        def share() -> T:
            results.append(work())
            return send(results[0]) if send else results[0]

        received = self.agree(share if self.rank == 0 else None, purpose)[0]
        return results[0] if results else received  # type: ignore[return-value]

    def agree(self, work: Callable[[], T] | None, purpose: str) -> list[T | None]:
        """Return every rank's result of `work`, in rank order, on all ranks; None where a rank has no work.

        Raises:
            UserError: on all ranks, if `work` raised it on any: the error of the lowest such rank.
        """
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
        """Return this rank's own result of `work`, which is not sent.

        Raises:
            UserError: on all ranks, if `work` raised it on any: the error of the lowest such rank.
        """
        results: list[T] = []

        def keep() -> None:
            results.append(work())

        self.agree(keep, purpose)
        return results[0]

    def move(self, transfers: list[tuple[int, int, np.ndarray]], purpose: str) -> None:
        """Send arrays between ranks: (source, destination, array).

        The array is read at the source and filled at the destination.
        All ranks pass the same list in the same order; on any other rank the array may be empty.
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
        """Split an array's bytes into views below MPI's limit."""
        assert array.flags.c_contiguous, "MPI would fill a copy instead of the array"
        flat, step = array.reshape(-1).view(np.uint8), 8 * self.chunk
        return [flat[start : start + step] for start in range(0, len(flat), step)]

    def local(self) -> tuple[int, int]:
        """Return (rank on this host, number of ranks on this host), from a shared-memory split."""
        from mpi4py import MPI

        host = self._control.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        local = host.Get_rank(), host.Get_size()
        host.Free()
        return local

    def split(self, color: int) -> Comm | None:
        """Return a communicator of the ranks with the same color; None for a negative color."""
        from mpi4py import MPI

        part = self._comm.Split(color if color >= 0 else MPI.UNDEFINED, self.rank)
        return None if color < 0 else Comm(part)

    # The end

    @contextmanager
    def located(self, place: str, alone: bool = False) -> Iterator[None]:
        """Name this rank and the innermost `place` in an exception that ends the job.

        Args:
            alone: the other ranks do not do this. They could not raise a MessageError, too, and would wait:
                it becomes an exception that ends the job.
        """
        where = f"rank {self.names[self.rank]}, {place}"
        try:
            yield
        except StoppedError:
            raise
        except MessageError as error:
            if not alone:
                raise
            unexpected = RuntimeError(str(error)).with_traceback(error.__traceback__)
            unexpected.add_note(where)
            raise unexpected from None
        except (Exception, SystemExit) as error:
            if not getattr(error, "__notes__", None):
                error.add_note(where)
            raise

    def abort(self, reason: str, remedy: str = "") -> NoReturn:
        """Print the reason and end the whole job at once with exit code 1."""
        self._print_reason(MessageError(reason, remedy))
        time.sleep(0.5)  # MPICH's launcher drops output that it has not yet forwarded when the job ends
        self._comm.Abort(EXIT_FAULT)
        os._exit(EXIT_FAULT)  # in case this MPI's Abort returns

    def _print_reason(self, reason: MessageError) -> None:
        with suppress(OSError, ValueError):  # the output may be closed; the job must end all the same
            sys.stdout.flush()
        with suppress(OSError, ValueError):
            print(f"rank {self.rank}: {reason}", file=sys.stderr, flush=True)

    def fault(self, error: BaseException) -> NoReturn:
        """End the whole job with this rank's traceback, unless another rank prints its own."""
        if not self._fails_elsewhere():
            self.abort("".join(traceback.format_exception(error)))
        time.sleep(2.0)  # by then the other rank has ended the job
        self.abort(f"{type(error).__name__}, after another rank had failed; see that rank's traceback")

    def _fails_elsewhere(self) -> bool:
        """Return whether another rank reports a failure: the first to fail, or the lowest of several."""
        if self.size == 1:
            return False
        if self._receive(_FAULT):
            return True
        self._send_others(_FAULT, self.rank)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            time.sleep(0.01)
            message = self._receive(_FAULT)
            if message and message[1] < self.rank:
                return True
        return False

    def finish(self) -> None:
        """Wait for all ranks at the end and drop unread stop messages.

        Without the wait a launcher may kill the other ranks at the first exit code.
        """
        self.wait("end")
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the exit code is already decided
        while self.size > 1 and self._control.Iprobe(tag=_STOP):
            self._control.Recv(np.empty(1, np.int64), tag=_STOP)
