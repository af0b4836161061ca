"""The method of a checkpoint or of an exported client, built again without MPI and without the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfedmoe_mpi import algorithms, config, user_code
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.checkpoint import Checkpoint, seal
from pfedmoe_mpi.checkpoint.client_file import ClientFile
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.beginning import Beginning
from pfedmoe_mpi.core.parts import Workbench
from pfedmoe_mpi.errors import CheckpointError, CodeError, ConfigError
from pfedmoe_mpi.models import generators
from pfedmoe_mpi.storage import untrusted_json

MOST_SHOWN = 300  # characters of an error about a configuration
MOST = 1 << 30  # classes, tokens of a vocabulary, or numbers in a sample


def vectors(loaded: Checkpoint) -> Callable[[int], np.ndarray]:
    """Return the function from a client to its private vector, float32, drawn if it never trained.

    It raises CheckpointError if drawing needs code that is missing or changed.
    """
    drawn: list[Beginning] = []

    def vector(client: int) -> np.ndarray:
        if loaded.has_trained(client) or not loaded.layout(client).size:
            return loaded.vector(client)
        with generators.kept():
            if not drawn:
                drawn.append(_beginning(loaded, client))
            vector: np.ndarray = drawn[0].vector(client).numpy()
        if len(vector) != loaded.layout(client).size:
            raise CheckpointError(
                f"the models of {loaded.path} are not those of its configuration", seal.REMEDY
            )
        return vector

    return vector


def _beginning(loaded: Checkpoint, client: int) -> Beginning:
    """Return what draws the vectors of clients that never trained; `client` is one of them."""
    code = loaded.path.absolute().parent.parent / "code"
    try:
        settings = configuration(loaded, code if loaded.code and code.is_dir() else None)
    except ConfigError as error:
        problem = f"client {client} of {loaded.path} never trained, and its first vector cannot be drawn: "
        raise CheckpointError(problem + error.problem, error.remedy) from error
    method = method_of(settings, sample_facts(loaded.path, loaded.identity.get("samples", "")))
    bench = Workbench(settings.seed, torch.device("cpu"), start=settings.model.start)
    beginning = Beginning(bench, method.client_state, method.initial)
    if len(loaded.first_state):
        state = torch.from_numpy(loaded.first_state)
        beginning.server = {name: state[place] for name, place in loaded.state_layout.parts.items()}
    elif type(method).initial is not Algorithm.initial:
        beginning.server = {}
    return beginning


def configuration(
    source: ClientFile | Checkpoint, code: Path | None = None, changed_code: bool = False
) -> Config:
    """Return the configuration, whose own code is that of the run.

    Raises:
        CheckpointError: the code changed or is missing, or the configuration cannot be used.
    """
    settings = _build(source, code)
    references = config.references(settings)
    user_code.forget_changed(references)
    difference = user_code.difference(source.code, user_code.sources(references)) if references else ""
    if difference and not changed_code:
        problem = f"the code of {source.path}'s models changed since the run:\n{difference}"
        remedy = "pass code=FOLDER with the files of the run, such as RUN_DIR/code, or changed_code=True"
        raise CheckpointError(problem, remedy)
    return settings


def _build(source: ClientFile | Checkpoint, code: Path | None) -> Config:
    try:
        flat = config.flatten(source.config)
        return config.build(config.relocated(flat, code.absolute()) if code else flat)
    except CodeError:
        raise
    except (ConfigError, RecursionError) as error:
        problem = f"{source.path} has a configuration that cannot be used: {str(error)[:MOST_SHOWN]}"
        raise CheckpointError(problem, "use the version of this program that wrote it") from error


def sample_facts(path: Path, samples: str) -> dict[str, Any]:
    """Return what `samples_text` wrote, `absent` as the clients that never train and the late.

    Raises:
        CheckpointError: there is no such text.
    """
    try:
        facts: dict[str, Any] = untrusted_json.parse(samples, "samples")
        numbers = {name: int(facts[name]) for name in ("classes", "vocabulary")}
        shape = tuple(map(int, facts["shape"]))
        if max(math.prod(shape), *numbers.values()) > MOST or min(*shape, *numbers.values()) < 0:
            raise ValueError("sizes that no data have")
        if facts["absent"] is not None:
            never, late = map(frozenset, facts["absent"])
            facts["absent"] = never, late
        return {**facts, **numbers, "shape": shape, "class_names": _names(facts, numbers["classes"])}
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        problem = f"{path} does not describe its samples; an older version may have written it"
        remedy = "continue its run with more rounds (restart RUN --rounds N) and load that checkpoint"
        raise CheckpointError(problem, remedy) from error


def method_of(settings: Config, facts: Mapping[str, Any]) -> Algorithm:
    """Return the method; without counts of samples, which no prediction needs."""
    never, late = facts["absent"] or (frozenset(), frozenset())
    model = settings.model
    # No method needs counts for a prediction, so they take no memory.
    counts = np.broadcast_to(np.int64(0), (settings.clients, facts["classes"]))
    task = Task(
        settings,
        facts["shape"],
        facts["classes"],
        counts,
        model.pool,
        model.shared,
        model.dim,
        never,
        late,
        facts["vocabulary"],
    )
    return algorithms.load(settings.algorithm)(task)


def _names(facts: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Return the classes' names; empty if these are numbers, and in files of an earlier version."""
    names = facts.get("class_names") or ()
    if not all(isinstance(name, str) for name in names) or len(names) not in {0, classes}:
        raise ValueError("class_names is not a name for every class")
    return tuple(names)
