"""Parts of a job's ranks that do different work at the same time."""

from __future__ import annotations

from typing import NoReturn

from pfedmoe_mpi.mpi.comm import Comm


class Part(Comm):
    """Some of the job's ranks, as a communicator that all the same work runs on.

    A stop that is asked of any rank of the job reaches the part, and an abort ends the whole job. Ranks are
    numbered from 0 within the part, and messages name their numbers in the job. `local` counts all ranks on
    this host, because the other parts use its cores, GPUs and memory at the same time.
    """

    def __init__(self, world: Comm, number: int) -> None:
        """Join part `number`; collective on the job."""
        ranks = world.gather(number, "parts")
        super().__init__(world._comm.Split(number, world.rank))
        self.names = [rank for rank, other in enumerate(ranks) if other == number]
        self._local = world.local()
        self._world = world

    def stop_requested(self) -> bool:
        """Return whether a stop was asked of any rank of the job, or of this part."""
        if not self._stopping and self._world.stop_requested():
            self._stopping, self.stopped_by = True, self._world.stopped_by
        return super().stop_requested()

    def local(self) -> tuple[int, int]:
        """Return (rank on this host, number of ranks on this host), of all parts; not collective."""
        return self._local

    def abort(self, reason: str, remedy: str = "") -> NoReturn:
        """Print the reason and end the whole job at once with exit code 1."""
        self._world.abort(reason, remedy)


def divide(world: Comm, parts: int) -> tuple[int, Part]:
    """Divide the job's ranks into neighbouring parts whose sizes differ by at most one; collective.

    Returns:
        The number of this rank's part, from 0, and the part.
    """
    number = world.rank * parts // world.size
    return number, Part(world, number)
