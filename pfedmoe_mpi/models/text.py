"""Extractors for texts: fastText, LSTM, GRU and a small Transformer, each with its own embedding.

Samples are tokens (B, length), int32, with 0 for padding at the end. No paper of the methods gives these
widths. All embeddings have width 64, and every extractor ends in a linear layer and ReLU, as the CNNs do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedmoe_mpi.models.names import EMBEDDING, RECURRENT

HEADS = 4
DEVIATION = 0.02  # standard deviation of new embeddings; see `TextExtractor`


class TextExtractor(nn.Module):
    """Extractor from tokens (B, length) to representations (B, dim): embedding, `encoded`, last layer.

    Embeddings start small and are normalised (LayerNorm) wherever they are read, so that one step of plain
    SGD changes the direction of a few words' embeddings a lot. Otherwise they hardly change in a client's few
    steps.

    Raises:
        ValueError: the samples are not tokens (`vocabulary` 0).
    """

    def __init__(self, vocabulary: int, width: int, dim: int) -> None:
        super().__init__()
        if not vocabulary:
            raise ValueError("this model needs tokens")
        self.embedding = nn.Embedding(vocabulary, EMBEDDING, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=DEVIATION)
        self.norm = nn.LayerNorm(EMBEDDING)
        self.last = nn.Linear(width, dim)

    def words(self, x: Tensor) -> Tensor:
        """Return the normalised embeddings (B, length, 64)."""
        normalised: Tensor = self.norm(self.embedding(x))
        return normalised

    def embed(self, x: Tensor) -> Tensor:
        """Return the pooled embeddings of each text (B, 64)."""
        return pooled(self.words(x), x)

    def encoded(self, x: Tensor) -> Tensor:
        """Return the input of the last layer (B, width)."""
        return self.embed(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.encoded(x)))


def pooled(values: Tensor, x: Tensor, power: float = 0.5) -> Tensor:
    """Return Σ values / n^power over the n tokens of x (B, length) that are not padding: (B, width).

    With power ½ the result's size does not depend on the length of a text if its words are nearly
    independent, and the gradient does not vanish with the length as a mean's does. Power 1, the mean, is for
    correlated values.

    Args:
        values: (B, length, width).
    """
    is_token = (x != 0).unsqueeze(2)
    return (values * is_token).sum(1) / is_token.sum(1).clamp_min(1) ** power


class FastText(TextExtractor):
    """Extractor that only pools the embeddings of a text.

    Source: Joulin, Grave, Bojanowski, Mikolov: "Bag of Tricks for Efficient Text Classification", EACL 2017.
    Departures: words only, no n-grams; a hidden layer, so that the representation has the common length.
    """

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__(vocabulary, EMBEDDING, dim)


class Recurrent(TextExtractor):
    """Extractor with one layer of LSTM or GRU; its pooled outputs and its last output are concatenated."""

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
    """Extractor with one block of self-attention and a two-layer perceptron, pre-normalised; mean output.

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
        """Return every token's mixture of all tokens (B, length, 64), without attention to padding."""
        batch, length = x.shape
        by_head = self.query_key_value(h).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended_to = x != 0
        attended_to[:, 0] = True  # a text without words needs at least one token for the softmax
        query, key, value = by_head.unbind(0)
        mask = attended_to[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended: Tensor = self.joined(mixed.transpose(1, 2).reshape(batch, length, -1))
        return attended


def build_text(name: str, length: int, dim: int, vocabulary: int) -> TextExtractor:
    """Build the extractor `name`: tokens (B, length) below `vocabulary` → (B, dim)."""
    if name == "fasttext":
        return FastText(vocabulary, dim)
    if name == "transformer":
        return Transformer(vocabulary, length, dim)
    return Recurrent(name, vocabulary, dim)
