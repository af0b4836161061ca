"""The user's own code in a run: the same on all ranks, and compared with what a checkpoint recorded."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from pfedmoe_mpi import algorithms, config, user_code
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.models import user_model
from pfedmoe_mpi.mpi import alike
from pfedmoe_mpi.mpi.comm import Comm


def load(comm: Comm, settings: Config) -> dict[str, str]:
    """Run the code that a configuration names, and the method's file; return the texts by name; collective.

    Raises:
        UserError: on all ranks: a file is missing, its code raised an exception, or the ranks' files differ.
    """
    texts = comm.attempt(lambda: _load(settings), "your own code")
    if not texts:  # alike on all ranks, as they have the same settings
        return texts
    digests = dict(user_code.digests(texts))
    of_ranks = comm.gather(digests, "your own code")
    if any(other != of_ranks[0] for other in of_ranks):
        raise alike.difference(of_ranks)
    return texts


def _load(settings: Config) -> dict[str, str]:
    references = config.references(settings)
    texts = user_code.sources(references)
    user_code.forget_changed(references)
    threads = torch.get_num_threads()
    for reference in references:
        if user_code.split(reference)[1]:
            user_code.load(reference)
    algorithms.load(settings.algorithm)
    if texts:
        user_model.check_settings(f"code in {', '.join(texts)}", threads)
    return texts


def check_unchanged(
    comm: Comm, settings: Config, now: Mapping[str, str], loaded: Checkpoint, forked: bool = False
) -> None:
    """Compare the user's own code with that of a checkpoint; with `run.changed_code` print the difference.

    Args:
        forked: another method may have come or gone with its files, so only those of both are compared.

    Raises:
        CheckpointError: on all ranks: the code differs.
    """
    compared = loaded.code.keys() & now.keys() if forked else loaded.code.keys() | now.keys()
    before, after = ({n: texts[n] for n in compared & texts.keys()} for texts in (loaded.code, now))
    difference = user_code.difference(before, after)
    if difference and not settings.run.changed_code:
        raise CheckpointError(
            f"your own code changed since the checkpoint:\n{difference}",
            "--run.changed_code true continues with the changed code; the code of the run is in RUN_DIR/code",
        )
    if difference and comm.rank == 0:
        print(f"note: your own code changed since the checkpoint:\n{difference}", file=sys.stderr, flush=True)
