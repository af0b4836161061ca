"""The answer of a method with a gate: experts' outputs, combined by weights per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class Mixture:
    """The mixture that answers a batch of samples.

    The experts are evaluated once, when an answer is asked for first, and what that took is let go: answers
    under other weights take only `combine`.
    """

    def __init__(
        self,
        weights: Tensor,
        evaluate: Callable[[], Sequence[Tensor]],
        combine: Callable[[Sequence[Tensor], Tensor], Tensor],
        private: int = 0,
        evaluated: Sequence[int] | None = None,
    ) -> None:
        """Keep what the mixture is made of.

        Args:
            weights: the gate's weights (B, experts).
            evaluate: returns the experts' outputs.
            combine: maps these and any weights (B, experts) to logits (B, classes).
            private: how many experts are the client's own; they are the last ones.
            evaluated: the experts that have outputs, default all; the others count for nothing in any answer.
        """
        self.weights = weights
        self.private = private
        self.evaluated = range(weights.shape[1]) if evaluated is None else evaluated
        self._evaluate: Callable[[], Sequence[Tensor]] | None = evaluate
        self._combine = combine
        self._outputs: Sequence[Tensor] = ()

    def answer(self, weights: Tensor | None = None) -> Tensor:
        """Return the logits (B, classes) under other weights (B, experts), by default the gate's."""
        if self._evaluate:
            self._outputs, self._evaluate = self._evaluate(), None
        return self._combine(self._outputs, self.weights if weights is None else weights)

    @property
    def shared(self) -> Tensor | None:
        """The weights of the experts that are not the client's own, float64 (B, shared); None without own."""
        return self.weights[:, : -self.private].double() if self.private else None
