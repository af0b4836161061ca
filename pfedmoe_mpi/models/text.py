"""Extractors for texts: fastText, LSTM, GRU and a small Transformer, each with an embedding of its own.

Samples are tokens (B, length), int32, 0 for padding at the end. No paper of the methods gives these widths;
all embeddings are 64 wide, and every extractor ends in a linear layer and ReLU, as the CNNs do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoe_mpi.models.names import EMBEDDING, RECURRENT

HEADS = 4
DEVIATION = 0.02  # of fresh embeddings; see `TextExtractor`


class TextExtractor(nn.Module):
    """Tokens (B, length) to representations (B, dim), by what stands between embedding and last layer.

    Embeddings start small and are normalised (LayerNorm) wherever they are read, so that a step of plain SGD
    turns those of the few words it saw by much: without it they hardly move in the steps a client has.

    Raises:
        ValueError: samples are no tokens (`vocabulary` 0).
    """

    def __init__(self, vocabulary: int, width: int, dim: int) -> None:
        super().__init__()
        if not vocabulary:
            raise ValueError("this model takes tokens")
        self.embedding = nn.Embedding(vocabulary, EMBEDDING, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=DEVIATION)
        self.norm = nn.LayerNorm(EMBEDDING)
        self.last = nn.Linear(width, dim)

    def words(self, x: Tensor) -> Tensor:
        """Normalised embeddings (B, length, 64)."""
        normalised: Tensor = self.norm(self.embedding(x))
        return normalised

    def embedded(self, x: Tensor) -> Tensor:
        """The embeddings of a text as one, (B, 64)."""
        return pooled(self.words(x), x)

    def encoded(self, x: Tensor) -> Tensor:
        """(B, width)."""
        return self.embedded(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.encoded(x)))


def pooled(values: Tensor, x: Tensor, power: float = 0.5) -> Tensor:
    """Σ values / n^power over the n tokens of x (B, length) that are no padding.

    With ½ its size does not depend on the length of a text where words have little in common, and its
    gradient does not vanish with it as a mean's does; a mean, with 1, is for values that share much.

    Args:
        values: (B, length, width).
    """
    held = (x != 0).unsqueeze(2)
    return (values * held).sum(1) / held.sum(1).clamp_min(1) ** power


class FastText(TextExtractor):
    """The embeddings of a text as one, and no more.

    Source: Joulin, Grave, Bojanowski, Mikolov: "Bag of Tricks for Efficient Text Classification", EACL 2017.
    Departure: words only, no n-grams; a hidden layer, for a representation of the common length.
    """

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__(vocabulary, EMBEDDING, dim)


class Recurrent(TextExtractor):
    """One layer of LSTM or GRU; its outputs as one and its last output, side by side."""

    def __init__(self, name: str, vocabulary: int, dim: int) -> None:
        kind, width = RECURRENT[name]
        super().__init__(vocabulary, 2 * width, dim)
        self.recurrent: nn.RNNBase = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](
            EMBEDDING, width, batch_first=True
        )

    def encoded(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(self.words(x))
        end = ((x != 0).sum(1) - 1).clamp_min(0)
        last = outputs[torch.arange(len(x), device=x.device), end]
        return torch.cat([pooled(outputs, x), last], 1)


class Transformer(TextExtractor):
    """One block of self-attention and its two-layer perceptron, normalised before each; the mean output.

    Source: Vaswani et al., NeurIPS 2017, encoder; positions are learned, and there is no dropout.
    """

    def __init__(self, vocabulary: int, length: int, dim: int) -> None:
        super().__init__(vocabulary, EMBEDDING, dim)
        self.position = nn.Embedding(length, EMBEDDING)
        nn.init.normal_(self.position.weight, std=DEVIATION)
        self.norm1, self.norm2 = nn.LayerNorm(EMBEDDING), nn.LayerNorm(EMBEDDING)
        self.query_key_value = nn.Linear(EMBEDDING, 3 * EMBEDDING)
        self.joined = nn.Linear(EMBEDDING, EMBEDDING)
        self.wide, self.narrow = nn.Linear(EMBEDDING, 2 * EMBEDDING), nn.Linear(2 * EMBEDDING, EMBEDDING)

    def encoded(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.position.weight
        h = h + self._attention(self.norm1(h), x)
        h = h + self.narrow(F.relu(self.wide(self.norm2(h))))
        return pooled(h, x, power=1.0)

    def _attention(self, h: Tensor, x: Tensor) -> Tensor:
        """Every token's mixture of the others (B, length, 64); nobody looks at padding."""
        batch, length = x.shape
        by_head = self.query_key_value(h).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        looked_at = x != 0
        looked_at[:, 0] = True  # a text without words has something to look at
        query, key, value = by_head.unbind(0)
        mask = looked_at[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended: Tensor = self.joined(mixed.transpose(1, 2).reshape(batch, length, -1))
        return attended


def build_text(name: str, length: int, dim: int, vocabulary: int) -> TextExtractor:
    """The extractor `name`, (B, length) tokens below `vocabulary` → (B, dim)."""
    if name == "fasttext":
        return FastText(vocabulary, dim)
    if name == "transformer":
        return Transformer(vocabulary, length, dim)
    return Recurrent(name, vocabulary, dim)
