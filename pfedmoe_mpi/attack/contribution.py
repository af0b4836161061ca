"""One client step of one batch, and what the server receives of it: the target of a reconstruction.

The step and its contribution are those of the method; a batch of a few samples takes the place of the epochs.
What the server learns from it is the change that `server_update` would make with this contribution alone,
less weight decay, which it knows unless a clip has shortened the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.attack.protection import protected
from pfedmoe_mpi.attack.target import shared_parts
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.loop import Loop

PURPOSE = "attack/reconstruction"


@dataclass(frozen=True)
class Contribution:
    """What the server receives of one step, and the samples that an attack would like to have.

    `gradient` (size,) is that of the vector of `part` up to a factor: the change of the vector, turned round,
    without weight decay. `x` (B, *shape) are the samples as the model saw them, normalised.
    """

    part: str
    gradient: Tensor
    x: Tensor


def settings_of_step(samples: int) -> dict[str, object]:
    """Return the settings under which a client step is one update with one batch."""
    return {
        "train.epochs": 1,
        "train.steps": 0,
        "train.batch": max(2, samples),
        "train.accumulate": 1,
        "train.augment": (),
        "train.schedule": "constant",
        "train.warmup": 0,
    }


def take(loop: Loop, client: int, role: str, samples: int, trial: int) -> Contribution:
    """Let a client train one drawn batch from the loop's state, and return what the server receives.

    Raises:
        ConfigError: the models cannot be trained with so few samples, or the step is not finite.
    """
    federation, round = loop.federation, loop.round + 1
    whole = federation.clients[client]
    train = whole.splits["train"]
    draw = numpy_generator(federation.config.seed, PURPOSE, trial, client)
    rows = torch.from_numpy(np.sort(draw.choice(len(train), samples, replace=False)))
    chosen = train.rows(rows)
    one = replace(whole, splits={**whole.splits, "train": chosen})
    try:
        values = _step(loop, one, role)
        position = federation.method.cohort(round).index((client, role))
        total = protected(loop, position, values, trial)
    except NotFiniteError as error:
        raise ConfigError(
            f"the step of client {client} in round {round}: {error}", "use a lower --train.lr"
        ) from error
    except ValueError as error:  # of batch normalisation
        raise ConfigError(
            f"the models of {federation.config.method} cannot train on {samples} sample(s): {error}",
            f"--samples {samples + 1}",
        ) from error
    after = loop.state.clone()
    vectors = {name: after[place] for name, place in federation.state_layout.parts.items()}
    federation.method.server_update(vectors, total.means(), round)
    changes = (after - loop.state).nan_to_num()
    places = {name: federation.state_layout.parts[name] for name in shared_parts(federation)}
    part = next((name for name, place in places.items() if bool(changes[place].any())), None)
    if part is None:
        raise ConfigError(
            f"the step of client {client} in round {round} changes no shared model", "attack another --client"
        )
    x = next(iter(federation.engine.batches(chosen))).x
    gradient = -changes[places[part]] - _decay(loop, role, part) * loop.state[places[part]]
    return Contribution(part, gradient, x)


def _decay(loop: Loop, role: str, part: str) -> float:
    """Return the share by which weight decay shortens a part in one step, which the settings tell."""
    phases = loop.federation.method.phases(role)
    return sum(phase.lr[part] * phase.weight_decay for phase in phases if part in phase.lr)


def _step(loop: Loop, client: Client, role: str) -> Mapping[str, Tensor]:
    """Return the payload's values of a client step."""
    federation = loop.federation
    parts = federation.parts(client, loop.state)
    turn = Turn(federation.engine, federation.method.loss, client, parts, loop.round + 1, role)
    return {name: value.clone() for name, value in federation.method.client_step(turn).items()}
