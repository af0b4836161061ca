"""Reconstruction: what the server can rebuild of a client's samples from a single contribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.attack import contribution, images
from pfedmoe_mpi.attack.contribution import PURPOSE, Contribution
from pfedmoe_mpi.attack.images import Likeness
from pfedmoe_mpi.attack.inversion import invert
from pfedmoe_mpi.attack.target import shared_parts
from pfedmoe_mpi.core.seeds import numpy_generator, torch_generator
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.loop import Loop

MOST_SHOWN = 8  # images in the result
MOST_VALUES = 100_000  # of the images in the result
MEAN_ROWS = 1000  # test rows whose mean is the guess of an attacker that knows the kind of data only


def check(loop: Loop, client: int | None, samples: int) -> tuple[int, str]:
    """Return the attacked client and its role in the next round; by default the first of the cohort.

    Raises:
        ConfigError: the method, the data or the client cannot be attacked.
    """
    federation, round = loop.federation, loop.round + 1
    config, task = federation.config, federation.task
    if task.vocabulary:
        raise ConfigError(
            "--kind reconstruction needs images or features, and the samples are texts",
            "--kind membership attacks models of texts",
        )
    if not shared_parts(federation):
        raise ConfigError(
            f"clients of {config.method} send no gradient of a model that takes samples",
            "--kind membership attacks their models",
        )
    if config.train.optimiser != "sgd":
        raise ConfigError(
            f"train.optimiser = {config.train.optimiser}: its first step is not along the gradient",
            "--train.optimiser sgd attacks the same models with a step of SGD",
        )
    if client is not None and client >= task.clients:
        problem = f"--client {client}: the run has clients 0 to {task.clients - 1}"
        raise ConfigError(problem, f"--client {task.clients - 1}")
    cohort = dict(federation.method.cohort(round))
    if not cohort:
        problem = f"no client was drawn into the cohort of round {round}, the next one (privacy.sampling)"
        raise ConfigError(problem, "name the checkpoint of another round")
    chosen = min(cohort) if client is None else client
    if chosen not in cohort:
        some = ", ".join(map(str, sorted(cohort)[:8]))
        problem = f"--client {chosen} does not train in round {round}; clients that do: {some}"
        raise ConfigError(problem, f"--client {min(cohort)}")
    if samples > images.MOST:
        problem = f"--samples {samples}: expected at most {images.MOST} in a batch"
        raise ConfigError(problem, f"--samples {images.MOST}")
    rows = len(federation.clients[chosen].splits["train"])
    if samples > rows:
        problem = f"--samples {samples}, but client {chosen} has {rows} training rows"
        raise ConfigError(problem, f"--samples {rows}, or another --client")
    return chosen, cohort[chosen]


def attack(loop: Loop, client: int, role: str, samples: int, trials: int, steps: int) -> dict[str, Any]:
    """Rebuild the samples of `trials` steps of a client, each with its own batch, and compare.

    `attack`: the reconstruction; `mean`: the mean of test rows in its place; `guess`: drawn test rows.
    """
    federation = loop.federation
    low, high = _bounds(federation)
    shown: list[dict[str, Any]] = []
    values: dict[str, list[Likeness]] = {"attack": [], "mean": [], "guess": []}
    distances = []
    for trial in range(trials):
        target = contribution.take(loop, client, role, samples, trial)
        found, distance = _inverted(loop, client, target, (low, high), steps, trial)
        distances.append(distance)
        true = (target.x - low) / (high - low)
        found = images.matched(((found - low) / (high - low)).cpu(), true.cpu())
        true = true.cpu()
        guesses = {"attack": found, **_baselines(federation, (low, high), true, trial)}
        for name, guess in guesses.items():
            values[name].append(images.likeness(guess, true))
        room = MOST_VALUES // max(1, 2 * true[0].numel())
        for one, other in zip(true, found, strict=True):
            if true.ndim == 4 and len(shown) < min(MOST_SHOWN, room):
                shown.append({"true": _bytes(one), "found": _bytes(other)})
    return {
        "client": client,
        "part": target.part,
        "samples": samples,
        "trials": trials,
        "steps": steps,
        "distance": float(np.mean(distances)),
        **{name: _mean(each) for name, each in values.items()},
        "images": shown,
    }


def _inverted(
    loop: Loop, client: int, target: Contribution, bounds: tuple[Tensor, Tensor], steps: int, trial: int
) -> tuple[Tensor, float]:
    """Return what the attack finds, in normalised samples, and how well it explains the gradient."""
    federation = loop.federation
    parts = federation.workbench.parts((federation.method.state(), loop.state))
    generator = torch_generator(federation.config.seed, f"{PURPOSE}/start", trial, client)
    module, parameters = parts.modules()[target.part], parts.parameters(target.part)
    return invert(module, parameters, target.gradient, bounds, len(target.x), steps, generator)


def _bounds(federation: Federation) -> tuple[Tensor, Tensor]:
    """Return the least and the largest normalised sample, each (1, *shape).

    Bytes lie in 0 to 255; other numbers in the range of test rows, by feature or channel.
    """
    data = federation.dataset
    if data.dtype == np.uint8:
        ends = [np.full((1, *data.shape), value, np.uint8) for value in (0, 255)]
    else:
        rows = _test_rows(federation)
        axes = (0, *range(2, rows.ndim))
        least, most = (
            np.broadcast_to(of(rows, axis=axes, keepdims=True), (1, *data.shape)) for of in (np.min, np.max)
        )
        ends = [least, np.where(most > least, most, least + 1)]
    normalise, device = federation.engine.normalise, federation.engine.device
    low, high = (normalise(torch.from_numpy(np.ascontiguousarray(end)).to(device)) for end in ends)
    return low, high


def _test_rows(federation: Federation) -> np.ndarray:
    """Return at most MEAN_ROWS drawn test rows of all clients."""
    rows = np.sort(federation.partition.test.flat)
    draw = numpy_generator(federation.config.seed, "attack/known rows")
    rows = np.sort(draw.choice(rows, min(MEAN_ROWS, len(rows)), replace=False))
    return federation.dataset.rows(rows)


def _baselines(
    federation: Federation, bounds: tuple[Tensor, Tensor], true: Tensor, trial: int
) -> dict[str, Tensor]:
    """Return the mean of test rows, and drawn ones in their best order, as values in [0, 1]."""
    low, high = bounds
    known = federation.engine.normalise(torch.from_numpy(_test_rows(federation)).to(low.device))
    known = ((known - low) / (high - low)).cpu()
    draw = numpy_generator(federation.config.seed, "attack/guess", trial)
    guess = known[torch.from_numpy(draw.integers(len(known), size=len(true)))]
    return {"mean": known.mean(0, keepdim=True).expand_as(true), "guess": images.matched(guess, true)}


def _mean(values: list[Likeness]) -> dict[str, float | None]:
    """Return the means over trials; null where undefined."""
    means = {
        name: float(np.mean([getattr(each, name) for each in values])) for name in ("mse", "psnr", "ssim")
    }
    return {name: None if np.isnan(value) else value for name, value in means.items()}


def _bytes(image: Tensor) -> list[Any]:
    """Return an image (C, H, W) as nested lists of 0 to 255."""
    listed: list[Any] = (image * 255).round().clamp(0, 255).int().tolist()
    return listed
