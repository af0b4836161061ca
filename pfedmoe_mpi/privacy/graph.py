"""Who masks with whom in a round: everybody with everybody, or a sparse graph with few neighbours each."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np

Graph = Mapping[int, Sequence[int]]  # the neighbours of each member, ascending


def draw(members: Sequence[int], neighbours: int, generator: np.random.Generator) -> Graph:
    """Return the graph of a round's members.

    With 0 neighbours, or as many as there are other members, it is complete, as in Bonawitz et al. 2017.
    Otherwise the members sit on a ring in random order, and each is the neighbour of the k/2 next to it on
    either side: a k-regular Harary graph, as in Bell et al. 2020, algorithm 1.

    Args:
        members: ascending.
        neighbours: k, even.
    """
    size = len(members)
    if not 0 < neighbours < size - 1:
        return {member: [other for other in members if other != member] for member in members}
    ring = generator.permutation(np.array(members)).tolist()
    steps = [step for step in range(-neighbours // 2, neighbours // 2 + 1) if step]
    near = {member: sorted(ring[(at + step) % size] for step in steps) for at, member in enumerate(ring)}
    return {member: near[member] for member in members}


def holders(graph: Graph, member: int) -> list[int]:
    """Return who holds shares of a member's secrets, ascending: its neighbours and itself."""
    return sorted([*graph[member], member])


def threshold(number: int) -> int:
    """Return how many of `number` holders open a secret: t = ⌊2n/3⌋ + 1, at least 2.

    With t above 2n/3, no two sets of t holders can be told different stories by a server that has fewer than
    a third of the holders on its side (Bonawitz et al. 2017, section 6.2). At least 2, because the sum over a
    cohort of one member is that member's contribution.
    """
    return max(2, 2 * number // 3 + 1)


def can_open(graph: Graph, survivors: Container[int]) -> bool:
    """Return whether the survivors hold enough shares of every member's secrets.

    Then the survivors are connected: the server learns one sum, not those of several groups. To part a ring,
    k/2 members in a row must be gone on both sides of a group. A survivor beside such a gap has at most
    k/2 + 1 of its k + 1 holders left, which is less than ⌊2 (k + 1) / 3⌋ + 1 for every k ≥ 2.
    """
    for member in graph:
        held = holders(graph, member)
        if sum(holder in survivors for holder in held) < threshold(len(held)):
            return False
    return bool(graph)
