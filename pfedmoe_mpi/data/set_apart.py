"""Rows and clients set apart: what the server keeps for itself, and clients that never train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.errors import PartitionError

LEAST = 10  # reserved rows: 8 to train, 2 to test


def with_reserve(rows: int, share: float, seed: int, deal: Callable[[np.ndarray], Partition]) -> Partition:
    """Keep a share of all rows apart, drawn, and deal the rest.

    Args:
        deal: makes a partition of the rows given (ascending), numbered from 0.

    Raises:
        PartitionError: the share is not nothing, yet hardly a row.
    """
    number = int(share * rows + 0.5)
    if share and number < LEAST:
        raise PartitionError(
            f"a share of {share:g} of {rows} rows reserves {number} for the server, which needs {LEAST}",
            f"raise the share to {LEAST / rows:.3g} or more, or take larger data",
        )
    reserved = numpy_generator(seed, "reserve").permutation(rows)[:number]
    rest = np.setdiff1d(np.arange(rows), reserved)
    dealt = deal(rest)
    train, validation, test = (
        tuple(rest[own] for own in part) for part in (dealt.train, dealt.validation, dealt.test)
    )
    return Partition(train, validation, test, reserved=np.sort(reserved))


def choose_unseen(partition: Partition, labels: np.ndarray, wanted: int, seed: int) -> Partition:
    """Name `wanted` clients that never train, whose combinations of labels no other client has.

    Clients with equal combinations stay together: whole groups are taken, drawn, as long as they fit.

    Raises:
        PartitionError: there is no such choice among a bounded number of draws.
    """
    groups: dict[frozenset[int], list[int]] = defaultdict(list)
    for client, rows in enumerate(partition.train):
        groups[frozenset(labels[rows].tolist())].append(client)
    members = list(groups.values())
    generator = numpy_generator(seed, "unseen")
    for _ in range(100):
        chosen: list[int] = []
        for number in generator.permutation(len(members)):
            if len(chosen) + len(members[number]) <= wanted:
                chosen += members[number]
        if len(chosen) == wanted:
            return replace(partition, unseen=frozenset(chosen))
    raise PartitionError(
        f"{wanted} unseen clients cannot have label combinations of their own: {partition.clients} clients "
        f"have {len(members)} combinations",
        "--partition.kind pathological gives many, or change --unseen.clients or --partition.classes",
    )
