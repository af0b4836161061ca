"""The conditions that a run's bits depend on besides its configuration, and their check at a restart."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import numpy as np
import torch

from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation import fork, own_code
from pfedmoe_mpi.federation.federation import Federation, samples_text
from pfedmoe_mpi.federation.privacy_account import check_fork
from pfedmoe_mpi.federation.round_sum import RoundSum
from pfedmoe_mpi.mpi import launch
from pfedmoe_mpi.mpi.comm import Comm

CONDITIONS = ("torch", "device", "threads", "precision")  # a restart repeats bits only where these are equal


def run_identity(federation: Federation) -> dict[str, str]:
    """Return versions and conditions, for the checkpoint and events.jsonl.

    `weights`: SHA-256 of the files of model.weights, as JSON; `frozen`: digest of the frozen tensors.
    """
    files = {"weights": federation.pretrained.identity, "frozen": federation.frozen.digest}
    return {
        **{name: value for name, value in files.items() if value},
        "samples": samples_text(federation),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "h5py": metadata.version("h5py"),
        "mpi": launch.library(),
        "device": federation.device.model,
        "threads": str(federation.config.train.threads),
        "precision": federation.config.train.precision,
    }


def check_same_federation(
    world: Comm, federation: Federation, loaded: Checkpoint, forked: bool = False
) -> None:
    """Check that a federation has the checkpoint's code, data, partition and models; note what changes bits.

    Args:
        forked: other settings may have removed and added parts of the models.

    Raises:
        CheckpointError: on all ranks: the user's own code, the data, the partition or the models differ.
        ConfigError: on all ranks: the settings of a fork change the architecture of a part.
    """
    if forked:
        check_fork(federation)
    own_code.check_unchanged(world, federation.config, federation.code, loaded, forked)
    for name, digest in (("data", federation.data_digest), ("partition", federation.partition.digest())):
        before = loaded.identity[f"{name}_digest"]
        if digest != before:
            raise CheckpointError(
                f"the {name} changed since the checkpoint: digest {before[:16]}… then, {digest[:16]}… now",
                "restart with the same data, or start a new run",
            )
    if forked:
        notes = fork.check(federation, loaded)
    else:
        payload = federation.method.payload(federation.state_layout.sizes)
        total = RoundSum(federation.task, federation.method.cohort(loaded.round + 1), payload)
        loaded.check_fits(federation.state_layout, federation.client_layouts, len(total.buffer))
        notes = []
    now = run_identity(federation)
    before_now = {name: (loaded.identity.get(name, "unknown"), now[name]) for name in CONDITIONS}
    changes = [f"{name} {before} → {now}" for name, (before, now) in before_now.items() if before != now]
    if changes:
        notes.append(f"bits will differ from an uninterrupted run: {'; '.join(changes)}")
    if world.rank == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
