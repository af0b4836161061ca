"""The checkpoints that a run removes from its folder."""

from __future__ import annotations

from pathlib import Path

from pfedmoe_mpi import checkpoint


def remove(folder: Path, best: Path, number: int, written: Path) -> None:
    """Remove all but the `number` newest complete checkpoints, and partial ones older than the newest.

    Files on which the remaining ones or best.h5 rely are kept, too. A file whose name is newer than
    `written`, because it is damaged or its round is trained again, gets the suffix .unused. A checkpoint is
    removed before those on which it relies: who finds one of these missing looks for a newer checkpoint.

    Raises:
        OSError: nothing was removed, because it cannot be read now on which files the remaining ones rely;
            or a file cannot be removed.
    """
    paths = checkpoint.newest_first(folder)
    # `written` is missing if the whole folder was removed meanwhile.
    at = paths.index(written) if written in paths else 0
    for path in paths[:at]:
        path.rename(path.with_name(f"{path.name}.unused"))
    paths = paths[at:]
    complete = [path for path in paths if "partial" not in path.stem]
    older = paths[paths.index(complete[0]) :] if complete else []
    superseded = {*complete[number:], *(path for path in older if "partial" in path.stem)}
    kept = [best, *(path for path in paths if path not in superseded)]
    needed = {name for path in kept for name in checkpoint.files_needed(path)}
    for path in paths:
        if path in superseded and path.name not in needed:
            path.unlink(missing_ok=True)
