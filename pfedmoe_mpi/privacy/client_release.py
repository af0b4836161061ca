"""The mean of a round's clipped updates with noise (`privacy.unit` = client).

McMahan, Ramage, Talwar, Zhang: "Learning Differentially Private Recurrent Language Models", ICLR 2018,
Algorithm 1 with the fixed denominator. Member k's update Δ_k is what its contribution changes of the server's
state, all blocks together; m is the number of members that the round expects, and is public:

    mean = (Σ_k Δ_k · min(1, C / ‖Δ_k‖₂) + N(0, z²C²)) / m

Members weigh equally, because n_k is private and would raise the sensitivity. Lost members and those drawn
beyond m leave the denominator as it is.

The sum is one of integers: an update is multiplied by 2^s / m and cut off towards zero, so that no rounding
makes it longer than C·2^s / m. The noise is a discrete Gaussian of z times this length. It is added after the
sum over the ranks, so that no checkpoint of a stopped round has it twice, and has the address of round and
block, so that all ranks add the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Block, Mean
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.fixedpoint import SCALE, NotFiniteError
from pfedmoe_mpi.privacy import discrete_gaussian

SHORTER = 1 - 2.0**-40  # more than the error of a norm in float64


def length(clip: float, expected: float) -> float:
    """Return the largest L2 norm of a contribution as integers."""
    return clip * 2.0**SCALE / expected


@dataclass(frozen=True)
class ClientRelease:
    """How one round turns contributions into integers, and their sum into means.

    `expected` is m, `state` has the server's vector of each block, (rows · size,).
    """

    clip: float
    noise: float
    expected: float
    seed: int
    round: int
    payload: Mapping[str, Block]
    state: Mapping[str, Tensor]

    def encode(self, values: Mapping[str, Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return a member's weights (rows,) and clipped integers (rows · size,) by block.

        Raises:
            NotFiniteError: a value is NaN or infinite.
        """
        updates = {name: self._update(name, value) for name, value in values.items()}
        norm = float(sum(float(update.square().sum()) for update in updates.values()) ** 0.5)
        if not norm < float("inf"):
            raise NotFiniteError("a value is not finite")
        factor = min(1.0, self.clip / norm if norm else 1.0) * SHORTER * 2.0**SCALE / self.expected
        return {
            name: (np.ones(self.payload[name].rows, np.int64), (update * factor).trunc().long().numpy())
            for name, update in updates.items()
        }

    def _update(self, name: str, value: Tensor) -> Tensor:
        """Return a member's change of the state, float64 (rows · size,)."""
        flat = value.detach().cpu().double().reshape(-1)
        return flat if self.payload[name].update else flat - self.state[name].double()

    def mean(self, name: str, total: Tensor) -> Mean:
        """Return a block's mean; its weight is m in every row, though no member may have come.

        Args:
            total: the sum of all members' integers, int64 (rows, size).
        """
        block = self.payload[name]
        if self.noise:
            total = total + torch.from_numpy(self._drawn(name, total.numel())).view(total.shape)
        update = total.double() * 2.0**-SCALE
        before = 0.0 if block.update else self.state[name].double().view(total.shape)
        return Mean((before + update).float(), torch.full((block.rows,), self.expected, dtype=torch.float64))

    def _drawn(self, name: str, size: int) -> np.ndarray:
        """Return the noise of a block, int64 (size,)."""
        generator = seeds.numpy_generator(self.seed, f"client noise {name}", self.round)
        sigma = self.noise * length(self.clip, self.expected)
        return discrete_gaussian.sample(sigma, size, generator)
