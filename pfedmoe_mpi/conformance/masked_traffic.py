"""What ranks send in a round with masked sums: computed again, with the members' secrets, to be compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.privacy import graph
from pfedmoe_mpi.privacy.masked_sum import Member

TAKEN_OFF, SECONDS = "masks to take off", "seconds of the server"


class MaskedTraffic:
    """The messages and masks of a round's cohort, of which this rank keeps some."""

    def __init__(self, federation: Federation, rank: int, cohort: Sequence[int], round: int) -> None:
        seed, neighbours = federation.config.seed, federation.config.privacy.neighbours
        draw = seeds.numpy_generator(seed, "masked sum: graph", round)
        self._graph = graph.draw(cohort, neighbours, draw)
        self._members = {k: Member(seed, round, k, self._graph) for k in cohort}
        self._own = [k for k in cohort if federation.home[k] == rank]

    @cached_property
    def _publics(self) -> Mapping[int, bytes]:
        return {k: member.public for k, member in self._members.items()}

    @cached_property
    def _sealed(self) -> Mapping[int, bytes]:
        return {k: member.shares(self._publics) for k, member in self._members.items()}

    def add(self, client: int, contribution: np.ndarray) -> None:
        """Add a member's masks to its contribution, uint64 (numbers,), in place."""
        self._members[client].mask(contribution, self._publics)

    def opens(self, survivors: Collection[int]) -> bool:
        """Return whether the members in the sum can open it."""
        return graph.can_open(self._graph, survivors)

    def messages(self, purpose: str, survivors: Collection[int]) -> Any:
        """Return what this rank may gather for a purpose; None for a purpose that is not of masks.

        Args:
            survivors: the members in the sum, once it is reduced.
        """
        if purpose == "keys of masks":
            return {k: self._publics[k] for k in self._own}
        if purpose == "shares of keys":
            return {k: self._sealed[k] for k in self._own}
        if purpose != "shares of survivors":
            return None
        revealing = [k for k in self._own if k in survivors] if self.opens(survivors) else []
        return {k: self._members[k].reveal(survivors, self._sealed, self._publics) for k in revealing}
