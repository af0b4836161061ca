"""Streams: a client's mix of classes drifts over the rounds, from its first concept to its second.

A draw divides every client's classes into two concepts. In a round where the second concept has share w, a
client trains on each row of the first concept with probability 1 − w and of the second with w. Each row is
drawn once, so that rows enter and leave one by one as w changes. Test rows do not change, and accuracy is
measured on each concept separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pfedmoe_mpi.config.sections import StreamSettings
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.seeds import numpy_generator


class Stream:
    """The training rows that count in each round; a pure function of settings, seed and labels.

    Args:
        labels: of every client's training rows, in the order of its split.
    """

    def __init__(
        self, settings: StreamSettings, seed: int, labels: Sequence[np.ndarray], classes: int
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._labels = labels
        self._classes = classes
        self._second = [self._draw_second(client) for client in range(len(labels))]

    def _draw_second(self, client: int) -> np.ndarray:
        """Draw a client's second concept, (classes,) bool: half of its classes, rounded down."""
        present = np.unique(self._labels[client])
        chosen = numpy_generator(self._seed, "concepts", 0, client).permutation(present)[: len(present) // 2]
        return np.isin(np.arange(self._classes), chosen)

    def share(self, round: int) -> float:
        """Return w, the share of the second concept."""
        at = self._settings.round
        if self._settings.kind == "recurring":
            return float((round - 1) // at % 2)
        if self._settings.kind == "gradual":
            return float(np.clip((round - at) / at, 0.0, 1.0))
        return float(self._settings.kind == "abrupt" and round >= at)

    def _active(self, client: int, round: int) -> np.ndarray:
        """Return which training rows count, (n,) bool; all, if fewer than two would."""
        labels, share = self._labels[client], self.share(round)
        second = self._second[client][labels]
        draw = numpy_generator(self._seed, "stream", 0, client).random(len(labels))
        active = np.where(second, draw < share, draw >= share)
        return active if self._second[client].any() and active.sum() >= 2 else np.ones_like(active)

    def counts(self, round: int) -> np.ndarray:
        """Return the numbers of training samples that count, (N, classes) int64."""
        active = [labels[self._active(client, round)] for client, labels in enumerate(self._labels)]
        return np.stack([np.bincount(labels, minlength=self._classes) for labels in active])

    def of(self, client: Client, round: int) -> Client:
        """Return the client with the training rows that count in a round; it shares the vector."""
        active = torch.from_numpy(self._active(client.id, round))
        return replace(client, splits={**client.splits, "train": _rows(client.splits["train"], active)})

    def concepts(self, client: Client) -> tuple[Split, Split]:
        """Return the client's test rows of its first and of its second concept."""
        test = client.splits["test"]
        second = torch.from_numpy(self._second[client.id])[test.y.cpu()]
        return _rows(test, ~second), _rows(test, second)


def _rows(split: Split, chosen: torch.Tensor) -> Split:
    return split.rows(chosen.nonzero().view(-1))
