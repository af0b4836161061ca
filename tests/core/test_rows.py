"""Row numbers of many clients in two arrays, and the clients' samples as views of a rank's."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.core.batches import SPLITS
from pfedmoe_mpi.core.rows import Rows, ranges
from pfedmoe_mpi.data import Partition
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.federation.distribute import data_digest, distribute
from support.checkpoint_files import single_rank


def drawn_parts(clients: int) -> list[list[np.ndarray]]:
    """Return disjoint rows by split and client, some without any."""
    draw = np.random.default_rng(0)
    pieces = np.split(draw.permutation(900), np.sort(draw.integers(0, 900, 3 * clients - 1)))
    return [[np.sort(piece) for piece in pieces[split::3]] for split in range(3)]


def test_rows_are_a_sequence_of_arrays() -> None:
    given = drawn_parts(9)[0]
    rows = Rows.of(given)
    for same in (rows, Rows.of(rows), rows[:]):
        assert len(same) == 9 and same.sizes.tolist() == [len(own) for own in given]
        assert all(np.array_equal(a, b) for a, b in zip(same, given, strict=True))
    assert np.array_equal(rows[-1], given[8]) and [len(own) for own in rows[3:5]] == [*map(len, given[3:5])]
    assert np.array_equal(rows.flat[rows.owners == 4], given[4]) and len(Rows.of(())) == 0
    assert ranges(np.array([5, 9, 0]), np.array([2, 0, 3])).tolist() == [5, 6, 0, 1, 2]


def test_counts_and_digest_are_those_of_the_clients_one_by_one() -> None:
    parts = drawn_parts(7)
    partition, labels = Partition(*parts), np.arange(900) % 4
    expected = [np.bincount(labels[rows], minlength=4).tolist() for rows in parts[0]]
    assert partition.counts(labels, 4).tolist() == expected
    state = sha256()
    for part in parts:
        for rows in part:
            state.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
    assert partition.digest() == state.hexdigest()


def test_clients_have_their_samples_and_the_digest_of_all() -> None:
    parts = drawn_parts(8)
    dataset = open_dataset(Data(source="digits"), 0, clients=8)
    shards = distribute(single_rank(), dataset, Partition(*parts), [0] * 8, torch.device("cpu"), False)
    whole = sha256()
    for client in range(8):
        own = sha256()
        for split, part in zip(SPLITS, parts, strict=True):
            x, y = shards[client][split].x.numpy(), shards[client][split].y.numpy()
            assert np.array_equal(x, dataset.rows(part[client]))
            assert np.array_equal(y, dataset.labels[part[client]])
            for kind, array in (("uint8", x), ("int64", y)):
                own.update(f"torch.{kind}{array.shape}".encode() + array.tobytes())
        whole.update(own.digest())
    assert [*shards] == list(range(8)) and data_digest(single_rank(), shards) == whole.hexdigest()
