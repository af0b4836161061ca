"""Shadow runs for the likelihood ratio: with the run's settings, and other test rows.

Those that the attack trains itself have the run's seed, which is published with it, and each client's rows
are divided anew into training and test rows of the same numbers; over the runs every row is a test row about
equally often. Those that were trained before may have other seeds and other partition files.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.config.partition_settings import DRAWN
from pfedmoe_mpi.core.rows import Rows
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data import Partition
from pfedmoe_mpi.data.partition_file import write_rows
from pfedmoe_mpi.errors import CheckpointError, ConfigError, StoppedError
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.names import check_reachable
from pfedmoe_mpi.run.evaluate import evaluation_loop
from pfedmoe_mpi.run.folder import RunFolder

PURPOSE = "attack/shadow"
# Settings in which shadow runs may differ, and those in which they may if clients have the same rows.
FREE = ("seed", "run", "eval", "train.device", "train.threads", "partition.file")
SPLIT = ("partition.kind", *(f"partition.{name}" for name in DRAWN))


class Shadows:
    """The shadow runs of a loop: so many to be trained, or the folders of earlier runs."""

    def __init__(self, loop: Loop, runs: int | Sequence[Path], overrides: Mapping[str, Any]) -> None:
        """Keep what the runs are made of; `overrides`: settings with which earlier runs are opened."""
        self._loop, self._runs, self._overrides = loop, runs, overrides
        self.number = runs if isinstance(runs, int) else len(runs)

    def loops(self, clients: Sequence[int]) -> Iterator[Loop]:
        """Yield each shadow run after as many rounds.

        Args:
            clients: those whose models are attacked.

        Raises:
            UserError: too few runs, or one that differs from the attacked run in more than its split.
            StoppedError: a stop was asked for.
        """
        if not isinstance(self._runs, int):
            yield from self._earlier(self._runs)
            return
        federation = self._loop.federation
        shares = (client_rows(federation, k).size / len(federation.partition.test[k]) for k in clients)
        needed = max(map(math.ceil, shares))
        if self.number < needed:
            problem = f"--shadows {self.number}, but only {needed} shadow runs test every row once"
            raise ConfigError(problem, f"--shadows {needed}")
        for number in range(self.number):
            print(f"shadow run {number + 1} of {self.number}", file=sys.stderr, flush=True)
            yield _trained(self._loop, number)

    # Trained before

    def _earlier(self, folders: Sequence[Path]) -> Iterator[Loop]:
        federation = self._loop.federation
        names = {(federation.config.seed, federation.partition.digest()): "the attacked run"}
        for folder in folders:
            path = _checkpoint_of(folder, self._loop.round)
            with checkpoint.open_everywhere(self._loop.comm, path) as loaded:
                shadow = evaluation_loop(self._loop.comm, loaded, self._overrides)
                self._check(folder, shadow, loaded.identity["data_digest"])
                key = shadow.federation.config.seed, shadow.federation.partition.digest()
                if key in names:
                    problem = f"--shadows {folder} has the seed and the training rows of {names[key]}"
                    raise ConfigError(problem, f"remove {folder}, or train it with another --seed")
                names[key] = str(folder)
                yield shadow

    def _check(self, folder: Path, shadow: Loop, data: str) -> None:
        """Refuse a run that tells nothing of the attacked one.

        Raises:
            UserError: its settings, its code or its data differ.
        """
        own, other = self._loop.federation, shadow.federation
        settings = [config.flatten(config.to_tree(each.config)) for each in (own, other)]
        everyone = range(own.task.clients)
        same = own.task.clients == other.task.clients and all(
            np.array_equal(client_rows(own, k), client_rows(other, k)) for k in everyone
        )
        free = (*FREE, *SPLIT) if same else FREE
        names = [n for n in settings[0] | settings[1] if n not in free and n.partition(".")[0] not in free]
        differ = [name for name in names if settings[0].get(name) != settings[1].get(name)]
        if differ:
            listed = "; ".join(f"{n} = {settings[1].get(n)}, not {settings[0].get(n)}" for n in differ[:4])
            raise ConfigError(
                f"--shadows {folder} is not a shadow run of this checkpoint: {listed}",
                "train it with the settings of the attacked run; --seed and the split may differ",
            )
        same_data = other.data_digest == data and np.array_equal(own.dataset.labels, other.dataset.labels)
        if own.code != other.code or not same_data:
            what = "data" if own.code == other.code else "code of a user"
            drawn = same_data or own.config.data.source != "synthetic"
            raise CheckpointError(
                f"--shadows {folder} was trained with other {what} than the attacked run",
                "train it again with the files of the attacked run"
                if drawn
                else f"synthetic data depend on the seed: train it with --seed {own.config.seed}",
            )


def client_rows(federation: Federation, client: int) -> np.ndarray:
    """Return a client's training and test rows, ascending."""
    partition = federation.partition
    return np.sort(np.concatenate([partition.train[client], partition.test[client]]))


def _checkpoint_of(folder: Path, round: int) -> Path:
    """Return the checkpoint of a run after as many rounds.

    Raises:
        CheckpointError: there is none.
    """
    run = RunFolder(folder.absolute())
    check_reachable(run.path, CheckpointError)
    if not run.resumable:
        raise CheckpointError(f"--shadows {folder} is not a run folder", "name the folder of a run")
    path = run.checkpoints / checkpoint.name(round, partial=False)
    if path in checkpoint.restart_points(run.checkpoints):
        return path
    if run.best_round() == round:
        return run.best
    raise CheckpointError(
        f"--shadows {folder} has no checkpoint of round {round}, the round of the attacked one",
        "attack the last checkpoint of a run, or train with --run.checkpoint_every 1 --run.keep 99",
    )


# Trained by the attack


def _trained(loop: Loop, number: int) -> Loop:
    """Return the loop of a shadow run after as many rounds.

    Raises:
        StoppedError: a stop was asked for.
    """
    federation = loop.federation
    before = federation.config
    fields = config.fields(before.algorithm)
    flat = {**config.flatten(config.to_tree(before)), "run.dir": ""}
    flat |= {f"partition.{name}": fields[f"partition.{name}"].default for name in DRAWN}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "split.h5"
        write_rows(path, _divided(federation, number), federation.dataset.labels, before)
        flat |= {"partition.kind": "file", "partition.file": str(path)}
        shadow = Loop(loop.comm, build(loop.comm, config.build(flat), warn=False), SilentObserver(), None)
    if not shadow.begin():
        raise StoppedError
    for _ in range(loop.round):
        if not shadow.run_round():
            raise StoppedError
    return shadow


def _divided(federation: Federation, number: int) -> Partition:
    """Return the partition with other test rows for each client that trains.

    A client's rows have one drawn order; the test rows of the runs follow each other in it, all round.
    """
    partition = federation.partition
    train, test = list(partition.train), list(partition.test)
    for client in federation.task.training:
        rows = client_rows(federation, client)
        order = numpy_generator(federation.config.seed, PURPOSE, 0, client).permutation(len(rows))
        first = number * len(test[client])
        places = order.take(np.arange(first, first + len(test[client])), mode="wrap")
        chosen = np.isin(np.arange(len(rows)), places)
        train[client], test[client] = rows[~chosen], rows[chosen]
    return replace(partition, train=Rows.of(train), test=Rows.of(test))
