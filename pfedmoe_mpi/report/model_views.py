"""Gate weights, representations and accuracies of a run's models as plain arrays; embedding in the plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import numpy as np

ENOUGH = 100  # samples for t-SNE, whose perplexity is 30
DIMENSIONS = 50  # principal components that t-SNE gets; van der Maaten and Hinton, JMLR 2008, section 4.2
EXTREMES = 8  # samples with the highest and the lowest gate weights
MOST_PLANES = 4  # clients whose own representations are drawn


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
        private: the labels of representations that involve a client's own extractor. Two clients' vectors
            then have no common coordinates, so they never share a plane.
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
    private: frozenset[str]
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
    def shared(self) -> tuple[str, ...]:
        """The labels of the representations that all clients' samples have in common."""
        return tuple(name for name in self.representations if name not in self.private)

    @property
    def drawn_clients(self) -> tuple[int, ...]:
        """The clients whose own representations are drawn: at most MOST_PLANES, with the most samples."""
        numbers, counts = np.unique(self.clients, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:MOST_PLANES]
        return tuple(sorted(int(number) for number in numbers[most]))

    def rows_of(self, client: int) -> np.ndarray:
        """Return the indices of a client's samples."""
        return np.flatnonzero(self.clients == client)

    @cached_property
    def embeddings(self) -> dict[str, np.ndarray]:
        """Each shared representation in the plane, (n, 2)."""
        embed = self._embedding(len(self.labels))
        return {name: embed(self.representations[name].astype(float)) for name in self.shared}

    @cached_property
    def own_embeddings(self) -> dict[tuple[str, int], np.ndarray]:
        """Each private representation of each drawn client's samples in a plane of its own, by both."""
        embed = self._embedding(self._fewest)
        return {
            (name, client): embed(self.representations[name][self.rows_of(client)].astype(float))
            for name in self.representations
            if name in self.private
            for client in self.drawn_clients
        }

    @property
    def method(self) -> str:
        """The method of `embeddings`: t-SNE with ENOUGH samples and scikit-learn installed, else PCA."""
        return _method(len(self.labels))

    @property
    def own_method(self) -> str:
        """The method of `own_embeddings`, the same for all of them."""
        return _method(self._fewest)

    @property
    def _fewest(self) -> int:
        return min(len(self.rows_of(client)) for client in self.drawn_clients)

    def _embedding(self, samples: int) -> Callable[[np.ndarray], np.ndarray]:
        return self._embed_tsne if _method(samples) == "t-SNE" else principal_components

    def _embed_tsne(self, table: np.ndarray) -> np.ndarray:
        from sklearn.manifold import TSNE

        tsne = TSNE(perplexity=30, init="pca", random_state=self.seed)
        reduced = principal_components(table, min(DIMENSIONS, *table.shape))
        return np.asarray(tsne.fit_transform(reduced), float)


def _method(samples: int) -> str:
    return "t-SNE" if samples >= ENOUGH and find_spec("sklearn") else "PCA"


def principal_components(table: np.ndarray, number: int = 2) -> np.ndarray:
    """Return (n, number) principal components, zero where there are fewer.

    The largest weight of each component is positive, so that its sign is determined.
    """
    centred = table - table.mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    components = (left * values * signs)[:, :number]
    return np.pad(components, ((0, 0), (0, max(0, number - components.shape[1]))))
