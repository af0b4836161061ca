"""Gate weights, representations and accuracies of a run's models as plain arrays; embedding in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import numpy as np

ENOUGH = 100  # samples for t-SNE, whose perplexity is 30
DIMENSIONS = 50  # principal components that t-SNE gets; van der Maaten and Hinton, JMLR 2008, section 4.2
EXTREMES = 8  # samples with the highest and the lowest gate weights


@dataclass(frozen=True, eq=False)
class ModelViews:
    """The models of one checkpoint on n sampled test samples, and the accuracy of each of the N clients.

    Attributes:
        round: the checkpoint's round.
        samples: the number of test samples of all clients, of which n were drawn.
        clients: (n,) the client of each sample.
        labels: (n,) the class of each sample.
        alpha: (n,) weight of the shared expert, or None for a method without a gate.
        raw: (n, *shape) the samples before normalisation.
        representations: (n, d) by label.
        shared_rows: the number of rows of the shared test set.
        accuracy_shared: (N,) accuracy on the shared test set, NaN where unknown.
        accuracy_own: (N,) accuracy on the client's own test rows, NaN where unknown.
        seed: of the t-SNE embedding.
    """

    round: int
    samples: int
    clients: np.ndarray
    labels: np.ndarray
    alpha: np.ndarray | None
    raw: np.ndarray
    representations: Mapping[str, np.ndarray]
    shared_rows: int
    accuracy_shared: np.ndarray
    accuracy_own: np.ndarray
    seed: int

    @property
    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the samples with the highest α, falling, and with the lowest α, rising."""
        assert self.alpha is not None
        order = np.argsort(self.alpha, kind="stable")
        number = min(EXTREMES, len(order) // 2)
        return order[::-1][:number], order[:number]

    @property
    def images(self) -> bool:
        """Whether the samples are images of one or three channels."""
        return self.raw.ndim == 4 and self.raw.shape[1] in {1, 3}

    def picture(self, index: int) -> np.ndarray:
        """Return a sample as (height, width[, 3]) from 0 to 1: bytes over 255, other values stretched."""
        raw = self.raw[index].astype(float)
        low, high = (0.0, 255.0) if self.raw.dtype == np.uint8 else (raw.min(), raw.max())
        scaled = (raw - low) / max(high - low, 1e-12)
        return scaled[0] if len(scaled) == 1 else scaled.transpose(1, 2, 0)

    @property
    def method(self) -> str:
        """The embedding's method: t-SNE with at least ENOUGH samples and scikit-learn installed, else PCA."""
        return "t-SNE" if len(self.labels) >= ENOUGH and find_spec("sklearn") else "PCA"

    @cached_property
    def embeddings(self) -> dict[str, np.ndarray]:
        """Each representation in the plane, (n, 2)."""
        embed = self._embed_tsne if self.method == "t-SNE" else principal_components
        return {name: embed(table.astype(float)) for name, table in self.representations.items()}

    def _embed_tsne(self, table: np.ndarray) -> np.ndarray:
        from sklearn.manifold import TSNE

        tsne = TSNE(perplexity=30, init="pca", random_state=self.seed)
        reduced = principal_components(table, min(DIMENSIONS, *table.shape))
        return np.asarray(tsne.fit_transform(reduced), float)


def principal_components(table: np.ndarray, number: int = 2) -> np.ndarray:
    """Return (n, number) principal components, zero where there are fewer.

    The largest weight of each component is positive, so that its sign is determined.
    """
    centred = table - table.mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    components = (left * values * signs)[:, :number]
    return np.pad(components, ((0, 0), (0, max(0, number - components.shape[1]))))
