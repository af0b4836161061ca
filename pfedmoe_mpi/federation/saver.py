"""The checkpoints of a running federation: their content, and the handling of writes that fail."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.checkpoint import Checkpoint, Content
from pfedmoe_mpi.checkpoint.confusion import Confusion
from pfedmoe_mpi.core.batches import SPLITS
from pfedmoe_mpi.errors import CheckpointError, RunError
from pfedmoe_mpi.federation import resumed, selection
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.metrics import Row
from pfedmoe_mpi.federation.server_optimiser import ServerOptimiser
from pfedmoe_mpi.federation.written import Vectors
from pfedmoe_mpi.mpi.comm import Comm

TRIES = 3  # checkpoints in a row that may fail before the run ends


class Listener(Protocol):
    """A receiver of a saver's events, on every rank.

    `candidate`: whether the checkpoint may become best.h5.
    """

    def check_folder(self) -> None:
        """Raise OSError on rank 0 if the folder of the checkpoints is another one now."""

    def written(self, path: Path, history: Sequence[Row], candidate: bool) -> None: ...

    def not_written(self, error: CheckpointError) -> None: ...


class Saver:
    """A writer of a federation's checkpoints into `folder`; without a folder it writes nothing."""

    def __init__(
        self,
        comm: Comm,
        federation: Federation,
        folder: Path | None,
        listener: Listener,
        server: ServerOptimiser,
    ) -> None:
        self.identity: Mapping[str, str] = {}  # conditions of the run: versions, device, threads
        self.confusion: Confusion | None = None  # of the last evaluation
        self._comm = comm
        self._federation = federation
        self._folder = folder
        self._listener = listener
        self._server = server
        self._newest: Path | None = None
        self._last_try = time.monotonic()
        self._failed = 0
        sizes = [layout.size for layout in federation.client_layouts]
        self._vectors = Vectors(4 * np.array(sizes, np.int64))
        self._first_state = np.empty(0, np.float32)  # only if clients begin with values of it

    def began(self, state: torch.Tensor) -> None:
        """Keep the server's vector after what comes before round 1, if clients begin with values of it."""
        beginning = self._federation.beginning
        if beginning.server is not None and beginning.needs_server(self._federation.task.clients):
            self._first_state = state.numpy().copy()

    def trained(self, clients: Iterable[int]) -> None:
        """Record that these clients have other vectors than the newest checkpoint; the same on all ranks."""
        self._vectors.change(clients)

    def resume(self, loaded: Checkpoint) -> None:
        """Continue after a checkpoint, with the vectors that are in its files."""
        resumed.begin(self._federation, loaded)
        self._first_state = loaded.first_state
        self._vectors.change(loaded.trained)
        if self._folder and loaded.path.parent == self._folder and checkpoint.is_name(loaded.path.name):
            self._vectors.written(loaded.places)

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint is `run.checkpoint_minutes` old, by this rank's clock."""
        minutes = self._federation.config.run.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self._last_try >= 60 * minutes

    def rounds(
        self,
        round: int,
        state: np.ndarray,
        history: Sequence[Row],
        last: bool = False,
        candidate: bool = True,
    ) -> None:
        """Write a checkpoint of `round` complete rounds; collective.

        A write that fails is reported, and the next checkpoint is another try.

        Args:
            last: there is no next checkpoint.
            candidate: it may become best.h5. A checkpoint by the clock may not, because which rounds have one
                differs between runs with the same bits.

        Raises:
            RunError: on all ranks: the third failure in a row, or a failure of the last checkpoint.
        """
        self._write(self._content(round, state, history), history, last, candidate)

    @property
    def written(self) -> bool:
        """Whether a checkpoint has been written."""
        return self._newest is not None

    def has(self, round: int) -> bool:
        """Return whether the newest checkpoint written is that of `round` complete rounds."""
        return self._newest is not None and self._newest.name == checkpoint.name(round, partial=False)

    def partial(
        self,
        round: int,
        state: np.ndarray,
        history: Sequence[Row],
        total: np.ndarray,
        finished: Sequence[int],
    ) -> None:
        """Write `round` complete rounds and the int64 sum of the next one, with the clients finished in it.

        Collective.

        Raises:
            RunError: on all ranks: the checkpoint cannot be written.
        """
        content = self._content(round, state, history, total, finished)
        self._write(content, history, last=True, candidate=False)

    def _content(
        self,
        round: int,
        state: np.ndarray,
        history: Sequence[Row],
        total: np.ndarray | None = None,
        finished: Sequence[int] = (),
    ) -> Content:
        """Return everything in a checkpoint except the clients' vectors."""
        federation = self._federation
        return Content(
            config=config.to_tree(federation.config),
            code=federation.code,
            round=round,
            state=state,
            state_layout=federation.state_layout,
            client_layouts=federation.client_layouts,
            partition={split: getattr(federation.partition, split) for split in SPLITS},
            history=history,
            identity={
                "data_digest": federation.data_digest,
                "partition_digest": federation.partition.digest(),
                "selected_on": selection.selected_on(history),
                **self.identity,
            },
            partial=total,
            finished=finished,
            confusion=self.confusion,
            moments=self._server.moments.numpy().ravel(),
            first_state=self._first_state,
        )

    def _write(self, content: Content, history: Sequence[Row], last: bool, candidate: bool) -> None:
        if self._folder is None:
            return
        self._last_try = time.monotonic()
        path = self._folder / checkpoint.name(content.round, content.partial is not None)
        store = self._federation.store
        try:
            home, check = self._federation.home, self._listener.check_folder
            divide = partial(self._vectors.divided, path)
            places = checkpoint.write(self._comm, path, content, store.values, home, check, divide)
            self._vectors.written(places)
            resumed.follow(self._federation, path, places)
        except CheckpointError as error:
            self._failed += 1
            self._listener.not_written(error)
            if last or self._failed == TRIES:
                problem = "the last one" if last else f"{TRIES} in a row"
                raise RunError(
                    f"the run ends because checkpoints cannot be written ({problem})",
                    "fix the error above; then `restart RUN_DIR` resumes from the newest checkpoint",
                ) from error
            return
        self._failed = 0
        self._newest = path
        self._listener.written(path, history, candidate)
