"""Rows reserved for the server, and clients that never train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pfedmoe_mpi.core.rows import Rows
from pfedmoe_mpi.core.seeds import numpy_generator
from pfedmoe_mpi.data.partition import Partition
from pfedmoe_mpi.errors import PartitionError

MIN_RESERVED = 10  # rows: 8 to train, 2 to test


def reserve_rows(
    rows: int, share: float, seed: int, partition_rest: Callable[[np.ndarray], Partition]
) -> Partition:
    """Draw a share of all rows for the server and partition the rest.

    Args:
        partition_rest: returns a partition of the given rows (ascending), which it numbers from 0.

    Raises:
        PartitionError: the share is above 0, but gives fewer than `MIN_RESERVED` rows.
    """
    number = int(share * rows + 0.5)
    if share and number < MIN_RESERVED:
        raise PartitionError(
            f"a share of {share:g} of {rows} rows reserves {number} rows for the server, which needs "
            f"{MIN_RESERVED}",
            f"raise the share to {MIN_RESERVED / rows:.3g} or more, or use a larger data set",
        )
    reserved = numpy_generator(seed, "reserve").permutation(rows)[:number]
    kept = np.ones(rows, bool)
    kept[reserved] = False
    rest = np.flatnonzero(kept)
    partition = partition_rest(rest)
    train, validation, test = (
        Rows(rest[part.flat], part.offsets)
        for part in (partition.train, partition.validation, partition.test)
    )
    return Partition(train, validation, test, reserved=np.sort(reserved))


def choose_unseen(
    partition: Partition, labels: np.ndarray, wanted: int, seed: int, by: str = "labels"
) -> Partition:
    """Choose `wanted` clients that never train.

    By `client` any clients are drawn. By `labels` no other client has their combinations of labels: clients
    with equal combinations stay together, and whole groups are drawn as long as they fit.

    Raises:
        PartitionError: none of a bounded number of draws gives exactly `wanted` clients.
    """
    generator = numpy_generator(seed, "unseen")
    if by == "client":
        drawn = generator.choice(partition.clients, wanted, replace=False)
        return replace(partition, unseen=frozenset(drawn.tolist()))
    groups: dict[frozenset[int], list[int]] = defaultdict(list)
    for client, rows in enumerate(partition.train):
        groups[frozenset(labels[rows].tolist())].append(client)
    members = list(groups.values())
    for _ in range(100):
        chosen: list[int] = []
        for number in generator.permutation(len(members)):
            if len(chosen) + len(members[number]) <= wanted:
                chosen += members[number]
        if len(chosen) == wanted:
            return replace(partition, unseen=frozenset(chosen))
    raise PartitionError(
        f"unseen.clients = {wanted}: no choice of clients has label combinations that no other client has; "
        f"the {partition.clients} clients have {len(members)} combinations",
        "set --unseen.by client to draw any clients, or --partition.kind pathological, which gives many "
        "combinations, or change --unseen.clients or --partition.classes",
    )
