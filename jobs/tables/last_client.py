"""pFedMoE without the sum: the server keeps the extractor of one client of each round, drawn at random.

pFedMoE is arXiv 2402.01350. The released code of two other methods by its authors (`LipingYi/pFedAFM`,
`LipingYi/FedMRL`) keeps references to the one set of tensors in which a round's clients train in turn. Their
weighted mean is then θ_k of who trained last, and the order is drawn. This file does that to pFedMoE, so that
`sum-or-last.toml` can show what the sum gives.

Shared: as pFedMoE, but only the last client sends.

Departure from that code: θ's momentum begins at zero in every client; there it goes on from client to client.
"""

from collections.abc import Mapping

from torch import Tensor

from pfedmoe_mpi.algorithms.pfedmoe import Options, PFedMoE
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.turn import Turn

__all__ = ["LastClient", "Options"]  # the options are pFedMoE's


class LastClient(PFedMoE):
    def client_step(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train θ, ω_k and φ_k as pFedMoE does; return θ_k of the last client, and nothing of the others."""
        values = super().client_step(turn)
        return values if turn.client == self._last(turn.round) else {}

    def _last(self, round: int) -> int:
        """Return the client of the round's cohort that trains last where clients train in turn."""
        members = [client for client, _ in self.cohort(round)]
        draw = seeds.numpy_generator(self.task.config.seed, "last client", round)
        return members[int(draw.integers(len(members)))]
