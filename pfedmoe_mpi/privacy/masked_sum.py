"""Masked sums: the server learns the sum of a cohort's contributions and no single one of them.

After Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017,
figure 4, on a complete graph or on the sparse one of Bell et al., CCS 2020 (`graph.py`). In every round

1. each member draws two key pairs and sends the public keys to its neighbours, through the server;
2. it draws the seed of a self mask, cuts this seed and the private key of its masks into shares, and sends
   each neighbour its two shares, sealed; it keeps one of each;
3. it sends its contribution plus its self mask plus, for each neighbour, a mask of the seed that the two
   agree on: added by the one with the lower client number, subtracted by the other, all modulo 2^64;
4. for each member in the sum, the others in the sum send the server their share of its self mask's seed; for
   each member missing in the sum, their share of its key. Never both: together they open a contribution.

The masks of two members that are both in the sum cancel. The server computes the others and takes them off.

Range. A contribution is int64: weights, and numbers encoded with shares of the cohort that add up to at most
1 (`core/fixedpoint.py`). There each |value| · 2^scale is below 2^62, so a member's number is at most
share · 2^62 + 1/2, and rounding to float64 adds at most 2^10. The total of a cohort of n is then at most
2^62 + n · (2^10 + 1/2), which is below 2^63 for n < 2^51. Weights add up to a number of samples. So every
total lies in [-2^63, 2^63), where a residue modulo 2^64 belongs to one int64: what is left when the masks
are off is the sum of the unmasked run, bit for bit.

Threat model: the server and the members follow the protocol and share what they see. The server, with fewer
than t of the holders of a member's shares, learns nothing of that member's contribution but the sum. A
server that lies is not covered: the signatures and the consistency check of figure 4 are left out.

What is simulated: keys are drawn by address from the run's seed, so that a run repeats, and a restart
continues an interrupted round without a key on the disk. Whoever knows the seed knows all masks, and two runs
with one seed and other settings use the same masks for other vectors. In a deployment the operating system
draws the keys, and a client keeps them until the round ends. Ranks play the
clients that they train, and all of them play the server. The arithmetic, the messages, their bytes and their
time are real. The members' flags and metrics (loss, accuracy, bytes) beside a contribution are the
simulation's own measurements.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.privacy import agreement, secret_sharing, stream
from pfedmoe_mpi.privacy.graph import Graph, holders, threshold
from pfedmoe_mpi.privacy.secret_sharing import SHARE

SEALED = 2 * SHARE + agreement.TAG  # bytes of a message with two shares


class Member:
    """A member of a cohort in one round; messages are bytes."""

    def __init__(self, seed: int, round: int, client: int, graph: Graph) -> None:
        self.client = client
        self._graph = graph
        self._round = round
        self._share_key, self._mask_key, self._self_mask, self._random = (
            seeds.key(seed, f"masked sum: {what}", round, client)
            for what in ("key of shares", "key of masks", "self mask", "polynomials")
        )

    @cached_property
    def public(self) -> bytes:
        """Message 1: the public keys of shares and of masks."""
        return agreement.public(self._share_key) + agreement.public(self._mask_key)

    @cached_property
    def secret_shares(self) -> dict[int, bytes]:
        """By holder, the share of the self mask's seed and that of the key of masks."""
        held = holders(self._graph, self.client)
        needed = threshold(len(held))
        # One member alone has a threshold above the number of its holders: nobody opens its secrets.
        random = stream.numbers(self._random, 2, needed - 1, secret_sharing.DIGITS)
        points = [holder + 1 for holder in held]
        both = [
            secret_sharing.split(secret, needed, points, drawn)
            for secret, drawn in zip((self._self_mask, self._mask_key), random, strict=True)
        ]
        return {holder: own + key for holder, own, key in zip(held, *both, strict=True)}

    def seal_key(self, other: int, publics: Mapping[int, bytes]) -> bytes:
        """Return the key of the messages 2 between this member and a neighbour."""
        return agreement.agreed(self._share_key, publics[other][: agreement.KEY], f"shares {self._round}")

    def shares(self, publics: Mapping[int, bytes]) -> bytes:
        """Return message 2: for each neighbour, ascending, its two shares, sealed for it."""
        return b"".join(
            agreement.seal(self.seal_key(other, publics), self.client, self.secret_shares[other])
            for other in self._graph[self.client]
        )

    def mask(self, contribution: np.ndarray, publics: Mapping[int, bytes]) -> None:
        """Make message 3 of a contribution, uint64 (numbers,), in place; to any sum that it is added to."""
        stream.add_mask(contribution, self._self_mask)
        for other in self._graph[self.client]:
            seed = pair_seed(self._mask_key, publics[other], self._round)
            stream.add_mask(contribution, seed, negative=self.client > other)

    def reveal(
        self, survivors: Collection[int], sealed: Mapping[int, bytes], publics: Mapping[int, bytes]
    ) -> bytes:
        """Return message 4: one share of each member's secrets that this one holds.

        Args:
            survivors: the members in the sum.
            sealed: message 2 of every member.
        """
        shares = []
        for owner in holders(self._graph, self.client):
            if owner == self.client:
                both = self.secret_shares[owner]
            else:
                at = bisect_left(self._graph[owner], self.client) * SEALED
                key = self.seal_key(owner, publics)
                both = agreement.unseal(key, owner, sealed[owner][at : at + SEALED])
            shares.append(both[:SHARE] if owner in survivors else both[SHARE:])
        return b"".join(shares)


def pair_seed(private: bytes, public: bytes, round: int) -> bytes:
    """Return the seed of the mask that the owners of a key and of message 1 share in a round."""
    return agreement.agreed(private, public[agreement.KEY :], f"mask {round}")


class Server:
    """What the server does with message 4 of every member in the sum."""

    def __init__(
        self,
        graph: Graph,
        round: int,
        publics: Mapping[int, bytes],
        survivors: Collection[int],
        revealed: Mapping[int, bytes],
    ) -> None:
        self._graph = graph
        self._round = round
        self._publics = publics
        self._survivors = survivors
        self._revealed = revealed

    def take_off(self, total: np.ndarray, members: Sequence[int]) -> None:
        """Take what these members left in a sum off it, uint64 (numbers,), in place."""
        for member in members:
            for seed, negative in self._left_by(member):
                stream.add_mask(total, seed, not negative)

    def _left_by(self, member: int) -> Iterator[tuple[bytes, bool]]:
        """Yield the seeds of a member's masks in the sum, and whether they were subtracted."""
        secret = self._open(member)
        if member in self._survivors:
            yield secret, False
            return
        assert agreement.public(secret) == self._publics[member][agreement.KEY :], "another member's key"
        for other in self._graph[member]:
            if other in self._survivors:
                yield pair_seed(secret, self._publics[other], self._round), other > member

    def _open(self, member: int) -> bytes:
        """Return the secret of a member of which the survivors revealed shares."""
        held = holders(self._graph, member)
        chosen = [holder for holder in held if holder in self._survivors][: threshold(len(held))]
        shares = []
        for holder in chosen:
            # Its place among the neighbours of the holder and the holder itself, ascending.
            at = SHARE * (bisect_left(self._graph[holder], member) + (holder < member))
            shares.append(self._revealed[holder][at : at + SHARE])
        return secret_sharing.combine([holder + 1 for holder in chosen], shares)
