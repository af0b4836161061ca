"""A client: its number, its samples, and one vector with all its private state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.parts import Spec


@dataclass
class Client:
    """A client of the federation, in hand for its turn or its evaluation.

    `vector` (layout of `spec`,) is on the CPU; while another rank trains the client it is empty. Only a
    completed client step replaces its values, so an abandoned step has no effect.
    """

    id: int
    spec: Spec
    vector: Tensor
    splits: dict[str, Split]  # train, validation, test

    @property
    def samples(self) -> int:
        """Number of training samples, n_k."""
        return len(self.splits["train"])
