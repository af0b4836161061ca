"""The store of clients' vectors: the same values with any memory budget, and nothing left behind."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pfedmoe_mpi.federation.store import Store

SIZES = (1, 1000, 1024, 5000, 0)
ALL = 1e9


def drawn(client: int) -> Tensor:
    """Return the vector with which a client begins."""
    return torch.full((SIZES[client % len(SIZES)],), -1.0 - client)


@pytest.mark.parametrize("budget", [0.0, 20_000.0, ALL])
def test_values_do_not_depend_on_the_budget(tmp_path: Path, budget: float) -> None:
    draw, store = random.Random(5), Store(drawn, budget, tmp_path)
    expected = {client: drawn(client) for client in range(20)}
    for step in range(300):
        client = draw.randrange(20)
        if draw.random() < 0.4:
            expected[client] = torch.full_like(expected[client], float(step))
            store.put(client, expected[client].clone())
        elif draw.random() < 0.1:
            expected[client] = drawn(client)
            store.forget(client)
        assert torch.equal(store.get(client), expected[client])
        if step % 30 == 0:
            walked = list(store.walk(range(20)))
            assert sorted(walked) == list(range(20))
            for number in store.walk(walked):
                assert torch.equal(store.get(number), expected[number]), "read ahead"
    assert not store.problem
    assert os.listdir(tmp_path) == [], "the file has no name"


def test_oldest_vectors_go_to_the_file_and_drawn_ones_are_dropped(tmp_path: Path) -> None:
    number = [0]

    def counted(client: int) -> Tensor:
        number[0] += 1
        return torch.zeros(1024)

    store = Store(counted, 4096 * 4, tmp_path)
    for _ in range(2):
        [store.get(client) for client in (10, 11)]
    assert number[0] == 3, "one stays, in a quarter of the budget"
    for client in range(6):
        store.put(client, torch.full((1024,), float(client)))
    before = number[0]
    store.get(10), store.get(10)
    assert number[0] == before + 2, "no space: drawn again"
    assert list(store.walk([3, 1, 4, 0, 10])) == [3, 4, 10, 0, 1], (
        "what is in the file comes last, in its order"
    )
    assert torch.equal(store.get(0), torch.zeros(1024)) and float(store.get(4)[0]) == 4
    for client in range(6):
        store.put(client, store.get(client))
    assert store._file._end == 2 * 4096, "the file is as long as what is beyond the budget"


def test_vectors_elsewhere_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """In the given order, the next one ahead; a client that trains again has its vector here."""
    reads: list[int] = []

    def read(client: int) -> Tensor:
        reads.append(client)
        return torch.full((1024,), float(client))

    store = Store(drawn, 4096 * 4, tmp_path)
    store.get(1)
    store.rely([3, 1, 2], read)
    assert reads == [] and [store.holds(client) for client in (1, 4)] == [True, False]
    for number, client in enumerate(store.walk([1, 2, 3, 4])):
        assert client == [4, 3, 1, 2][number]
        assert torch.equal(store.get(client), drawn(4) if client == 4 else torch.full((1024,), float(client)))
    assert reads == [3, 1, 2]
    store.get(3), store.put(1, torch.zeros(1024)), store.forget(2)
    assert reads == [3, 1, 2], "one stays in memory, in a quarter of the budget"
    assert float(store.get(1)[0]) == 0 and torch.equal(store.get(2), drawn(2)) and {*store.relied} == {3}


def test_full_scratch_folder_keeps_vectors_in_memory_and_says_why(tmp_path: Path) -> None:
    store = Store(drawn, 0.0, tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, unlimited[1]))
    try:
        for client in range(4):
            store.put(client, torch.full_like(drawn(client), float(client)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "File too large" in store.problem and str(tmp_path) in store.problem
    for client in range(4):
        assert torch.equal(store.get(client), torch.full_like(drawn(client), float(client)))
    gone = Store(drawn, 0.0, tmp_path / "gone")
    gone.put(1, drawn(1))
    assert "No such file" in gone.problem and torch.equal(gone.get(1), drawn(1))
