"""What was seen of the models of a run, as plain arrays, and its embedding in the plane."""

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
class Looked:
    """Of n drawn test samples: `clients`, `labels` (n,), `alpha` (n,) or None, `raw` (n, *shape), and
    `representations` (n, d) by label. Of N clients: accuracy on their `own` test rows and on `shared` ones,
    NaN where unknown. `samples`: how many test samples there are; `round`: of the checkpoint.
    """

    round: int
    samples: int
    clients: np.ndarray
    labels: np.ndarray
    alpha: np.ndarray | None
    raw: np.ndarray
    representations: Mapping[str, np.ndarray]
    shared_rows: int
    shared: np.ndarray
    own: np.ndarray
    seed: int

    @property
    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """The places of the samples with the highest α, falling, and with the lowest, rising."""
        assert self.alpha is not None
        order = np.argsort(self.alpha, kind="stable")
        number = min(EXTREMES, len(order) // 2)
        return order[::-1][:number], order[:number]

    @property
    def images(self) -> bool:
        """Whether samples can be shown as pictures."""
        return self.raw.ndim == 4 and self.raw.shape[1] in {1, 3}

    def picture(self, place: int) -> np.ndarray:
        """(height, width[, 3]) from 0 to 1; numbers that are no bytes are stretched."""
        raw = self.raw[place].astype(float)
        low, high = (0.0, 255.0) if self.raw.dtype == np.uint8 else (raw.min(), raw.max())
        shown = (raw - low) / max(high - low, 1e-12)
        return shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0)

    @property
    def method(self) -> str:
        """How the plane is found: t-SNE where there are samples enough and scikit-learn is, else PCA."""
        return "t-SNE" if len(self.labels) >= ENOUGH and find_spec("sklearn") else "PCA"

    @cached_property
    def embeddings(self) -> dict[str, np.ndarray]:
        """Each representation in the plane, (n, 2)."""
        place = self._neighbours if self.method == "t-SNE" else principal
        return {name: place(table.astype(float)) for name, table in self.representations.items()}

    def _neighbours(self, table: np.ndarray) -> np.ndarray:
        from sklearn.manifold import TSNE

        made = TSNE(perplexity=30, init="pca", random_state=self.seed)
        return np.asarray(made.fit_transform(principal(table, min(DIMENSIONS, *table.shape))), float)


def principal(table: np.ndarray, number: int = 2) -> np.ndarray:
    """(n, number) principal components; each with its largest weight positive, so that it has one sign."""
    centred = table - table.mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    found = (left * values * signs)[:, :number]
    return np.pad(found, ((0, 0), (0, max(0, number - found.shape[1]))))
