"""Natural clients in a training and a test part, as LEAF and TensorFlow Federated store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pfedmoe_mpi.config.partition_settings import PartitionSettings
from pfedmoe_mpi.data.sources.numbering import renumber
from pfedmoe_mpi.errors import DataError

_TRAIN, _ALL = 2, 3  # the fewest training rows, and rows, of a client: batches of one have no variance


@dataclass(frozen=True)
class Block:
    """The samples of one client in one part: how many, and whether the part is the test part."""

    client: str
    test: bool
    rows: int


@dataclass(frozen=True, eq=False)
class Clients:
    """The owner (n,) of the rows of the `kept` blocks, and which are test rows, if there is a split."""

    kept: tuple[int, ...]
    client: np.ndarray
    names: tuple[str, ...]
    official_test: np.ndarray | None
    left_out: tuple[str, ...]

    @property
    def proposals(self) -> dict[str, Any]:
        """The natural partition, and a lower bound of a client's rows where its default is above them."""
        fewest = int(np.bincount(self.client).min())
        least = PartitionSettings().min_samples
        few = {"partition.min_samples": fewest} if fewest < least else {}
        return {"partition.kind": "natural", **few}


def join_blocks(blocks: Sequence[Block], where: str, remedy: str = "give clients more rows") -> Clients:
    """Return the clients of these blocks, sorted by name; each has one block per part at most.

    The test part is official if it has training clients. If no client is in both parts, its rows are ordinary
    ones. Clients with too few rows to train and to test are left out.

    Args:
        remedy: what to do if no client has enough rows.

    Raises:
        DataError: no client has enough rows.
    """
    train, test = (
        {block.client: block.rows for block in blocks if block.test is part and block.rows}
        for part in (False, True)
    )
    official = bool(train.keys() & test.keys())
    if official:
        few = {c for c in (block.client for block in blocks) if train.get(c, 0) < _TRAIN or c not in test}
        reason = f"without {_TRAIN} training rows and a test row"
    else:
        rows = {block.client: 0 for block in blocks} | train | test
        few = {client for client, number in rows.items() if number < _ALL}
        reason = f"with fewer than {_ALL} rows"
    kept = [place for place, block in enumerate(blocks) if block.client not in few and block.rows]
    if not kept:
        raise DataError(f"{where} has only clients {reason}", remedy)
    numbers, names = renumber({blocks[place].client for place in kept})
    sizes = [blocks[place].rows for place in kept]
    left_out = []
    if few:
        left_out.append(f"{len(few)} clients {reason}, such as {min(few)}")
    if test and train and not official:
        left_out.append("the official split, because no client is in both parts")
    return Clients(
        kept=tuple(kept),
        client=np.repeat(np.array([numbers[blocks[place].client] for place in kept], np.int64), sizes),
        names=names,
        official_test=np.repeat([blocks[place].test for place in kept], sizes) if official else None,
        left_out=tuple(left_out),
    )


def keep_clients(
    owner: np.ndarray, names: Sequence[str], test: np.ndarray | None, where: str
) -> tuple[np.ndarray, Clients]:
    """Return a mask (n,) of the rows of clients with enough rows, and these clients, of rows in any order.

    Args:
        owner: the client of every row (n,), a place in `names`.
        test: which rows are test rows (n,), if there is an official test part.

    Raises:
        DataError: no client has enough rows.
    """
    marks = np.zeros(len(owner), bool) if test is None else test
    counts = {part: np.bincount(owner[marks == part], minlength=len(names)) for part in (False, True)}
    blocks = [Block(name, part, int(counts[part][k])) for part in counts for k, name in enumerate(names)]
    clients = join_blocks(blocks, where)
    places, _ = renumber({blocks[place].client for place in clients.kept})  # `clients.names` may be shorter
    numbers = np.array([places.get(name, -1) for name in names])[owner]
    kept = numbers >= 0
    official = marks[kept] if clients.official_test is not None else None
    return kept, replace(clients, client=numbers[kept], official_test=official)
