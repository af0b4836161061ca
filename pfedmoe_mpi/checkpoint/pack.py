"""A checkpoint that relies on earlier files of its folder, as one file that is complete by itself."""

from __future__ import annotations

import os
from pathlib import Path

from pfedmoe_mpi.checkpoint import writer
from pfedmoe_mpi.checkpoint.places import Places
from pfedmoe_mpi.checkpoint.reader import SPLITS, Checkpoint
from pfedmoe_mpi.checkpoint.writer import Content
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.storage import durable


def write(loaded: Checkpoint, out: Path) -> None:
    """Write a verified checkpoint as a complete one to a new file.

    Raises:
        CheckpointError: the output exists or cannot be written.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"the output {out} exists already", "choose another name")
    if not os.path.isdir(out.parent):
        raise CheckpointError(f"there is no folder {out.parent}", "create it, or choose another name")
    try:
        with durable.new_file(out) as temporary:
            _write(loaded, temporary)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error}", "check the folder and its space"
        ) from error


def replace(path: Path) -> None:
    """Replace a checkpoint by a complete one, if it relies on other files.

    Raises:
        OSError: it cannot be written; the checkpoint is as before.
        CheckpointError: it is damaged.
    """
    with Checkpoint(path) as loaded:
        if not loaded.elsewhere.files:
            return
        temporary = path.with_name(f".{path.name}.tmp")
        with durable.removed_after_error(temporary):
            _write(loaded, temporary)
            durable.publish(temporary, path)


def _write(loaded: Checkpoint, temporary: Path) -> None:
    content = Content(
        config=loaded.config,
        round=loaded.round,
        state=loaded.state,
        state_layout=loaded.state_layout,
        client_layouts=[loaded.layout(client) for client in range(loaded.clients)],
        partition={split: loaded.partition(split) for split in SPLITS},
        history=loaded.history,
        identity=loaded.identity,
        partial=loaded.partial,
        finished=loaded.finished,
        code=loaded.code,
        moments=loaded.moments,
        confusion=loaded.confusion,
        first_state=loaded.first_state,
        held=loaded.trained,
        elsewhere=Places(),
    )
    writer.write_alone(temporary, content, loaded.vector)
