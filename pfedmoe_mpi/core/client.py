"""A client: its number, its samples, and one vector that holds everything private."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.parts import Spec


@dataclass
class Client:
    """`vector` (layout of `spec`,) is on the CPU, in pinned memory where there is a GPU.

    It is replaced only by a completed client step, so a step that is abandoned leaves no trace.
    """

    id: int
    spec: Spec
    vector: Tensor
    splits: dict[str, Split]  # train, validation, test

    @property
    def samples(self) -> int:
        """n_k: training samples."""
        return len(self.splits["train"])
