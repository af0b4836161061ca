"""`attack`: try to tell members from other rows, or to rebuild samples, with what a checkpoint gives away."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, environment
from pfedmoe_mpi.attack import table
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.errors import EXIT_DONE, CheckpointError, ConfigError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.run.evaluate import evaluation_loop
from pfedmoe_mpi.storage import durable

FOLDER = "attacks"  # of a run folder


@dataclass(frozen=True)
class AttackFlags:
    """The command's own flags; `shadows` is of membership, the others of a reconstruction."""

    kind: str
    shadows: int | Sequence[Path]
    client: int | None
    samples: int
    trials: int
    steps: int
    as_json: bool


def run(path: Path, flags: AttackFlags, overrides: Mapping[str, Any]) -> int:
    """Attack a checkpoint on one rank, print the result, and keep it in the run folder for `report`.

    Raises:
        ConfigError: the program was started on several ranks.
    """
    if environment.launched_size(os.environ) > 1:
        raise ConfigError("attack runs on one rank", "start it without mpirun")

    def work(world: Comm, code: str) -> int:
        with checkpoint.open_everywhere(world, path) as loaded:
            result = _attack(world, loaded, flags, overrides)
        print(json.dumps(result) if flags.as_json else table.text(result))
        _keep(path.absolute(), result)
        return EXIT_DONE

    return under_mpi(work, {"command": "attack", **overrides}, singleton=True)


def _attack(
    world: Comm, loaded: Checkpoint, flags: AttackFlags, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the result of an attack on a verified checkpoint.

    Raises:
        UserError: the checkpoint, its data or its method cannot be attacked.
    """
    from pfedmoe_mpi.attack import contribution, membership, protection, reconstruction
    from pfedmoe_mpi.attack.shadows import Shadows

    if flags.kind == "membership" and flags.client is not None:
        raise ConfigError("--client has no effect with --kind membership", "remove --client")
    if flags.kind == "reconstruction" and flags.shadows:
        raise ConfigError("--shadows has no effect with --kind reconstruction", "remove --shadows")
    if loaded.partial is not None:
        raise CheckpointError(
            f"{loaded.path} was written in the middle of round {loaded.round + 1}",
            "name the checkpoint of a complete round",
        )
    step = contribution.settings_of_step(flags.samples) if flags.kind == "reconstruction" else {}
    given = sorted(set(step) & set(overrides))
    if given:
        raise ConfigError(
            f"--{given[0]} has no effect: --kind reconstruction attacks one update of one batch",
            f"remove --{given[0]}; --samples is the size of the batch",
        )
    loop = evaluation_loop(world, loaded, {**overrides, **step})
    if loop.federation.data_digest != loaded.identity["data_digest"]:
        raise CheckpointError(
            "the run trained on other data, so it is not known which of these rows it trained on",
            "set --data.path to the data that it was trained on",
        )
    facts = {"kind": flags.kind, "round": loaded.round, "method": loop.federation.config.method}
    if flags.kind == "membership":
        runs = Shadows(loop, flags.shadows, overrides) if flags.shadows else None
        return {**facts, **membership.attack(loop, runs)}
    protection.check(loop.federation)
    facts["protection"] = protection.summary(loop.federation)
    client, role = reconstruction.check(loop, flags.client, flags.samples)
    run_attack = partial(reconstruction.attack, loop, client, role)
    return {**facts, **run_attack(flags.samples, flags.trials, flags.steps)}


def _keep(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result into the run folder of a checkpoint; a note if that is not possible."""
    folder = path.parent.parent
    if path.parent.name != "checkpoints" or not (folder / "config.toml").is_file():
        return
    name = _name(result)
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        durable.write_text(folder / FOLDER / name, json.dumps(result) + "\n")
    except OSError as error:
        print(f"note: {folder / FOLDER / name} cannot be written: {error.strerror}", file=sys.stderr)


def _name(result: Mapping[str, Any]) -> str:
    """Return the name of the file, equal for equal attacks."""
    name = f"{result['kind']}-round-{result['round']:06}"
    if result["kind"] == "membership":
        return f"{name}.json"
    protection = "-".join(re.findall(r"[\w.]+", result["protection"]))
    return f"{name}-client-{result['client']}-samples-{result['samples']}-{protection}.json"
