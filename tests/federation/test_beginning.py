"""Clients that never trained: drawn where they are needed, in no checkpoint, the same for every reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.federation import rebuilt
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.run.identity import run_identity
from support.small_federation import build_loop, write_data

DITTO = "ditto"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "small.h5", 8)


def loop_of(data: Path, method: str, folder: Path, **changes: object) -> Loop:
    """Return a federation of which one client trains per round, with checkpoints in a folder."""
    loop = build_loop(data, method, participation=0.34, **changes)
    loop.saver._folder = folder
    loop.saver.identity = run_identity(loop.federation)
    return loop


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ("pfedmoe", "own"),
        ("pfedmoe", "one"),
        ("standalone", "architecture"),
        ("fedavg", "own"),
        (DITTO, "own"),
    ],
)
def test_client_that_never_trained_is_drawn_by_every_reader(
    data: Path, tmp_path: Path, method: str, start: str
) -> None:
    model = {"model__pool": "mlp5", "model__shared": "mlp5", "model__start": start}
    loop = loop_of(data, method, tmp_path, rounds=1, **model)
    assert loop.run()
    (trained,) = (client for client, _ in loop.federation.method.cohort(1))
    path = tmp_path / checkpoint.name(1, partial=False)
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        assert loaded.trained == ([trained] if loaded.layout(trained).size else [])
        assert len(loaded.first_state) == (loop.federation.state_layout.size if method == DITTO else 0)
        read, again = rebuilt.vectors(loaded), loop_of(data, method, tmp_path, run__memory=0.0, **model)
        torch.manual_seed(3)
        again.resume(loaded)
        for client in range(3):
            values = loop.federation.store.values(client)
            assert np.array_equal(read(client), values)
            assert np.array_equal(again.federation.store.values(client), values)
            if method == DITTO and client != trained:
                assert np.array_equal(values, loaded.first_state) and not np.array_equal(values, loaded.state)


def test_values_of_a_file_are_in_the_first_checkpoint(data: Path, tmp_path: Path) -> None:
    """A restart does not read the file of weights, so clients that begin with it have their vectors."""
    before = build_loop(data, "standalone", model__pool="mlp5", model__shared="mlp5")
    views = before.federation.client_layouts[0].views(before.federation.clients[0].vector)
    torch.save(
        {name.removeprefix("model/"): view + 1 for name, view in views.items()}, tmp_path / "weights.pt"
    )
    chosen = {"model__pool": "mlp5", "model__shared": "mlp5", "model__weights": str(tmp_path / "weights.pt")}
    loop = loop_of(data, "standalone", tmp_path, rounds=1, **chosen)
    assert loop.run()
    with Checkpoint(tmp_path / checkpoint.name(1, partial=False)) as loaded:
        assert loaded.trained == [0, 1, 2]
        assert all(np.array_equal(loaded.vector(k), loop.federation.store.values(k)) for k in range(3))


def test_equal_clients_share_their_descriptions(data: Path) -> None:
    federation = build_loop(data, "pfedmoe", model__pool="mlp5,mlp4", model__shared="mlp5").federation
    assert federation.specs[0] is federation.specs[2] and federation.specs[0] is not federation.specs[1]
    assert federation.client_layouts[0] is federation.client_layouts[2]
