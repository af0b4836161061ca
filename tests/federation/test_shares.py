"""Shares of the clients: each is at least one client, of as many clients as the data have."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest

from support.data_files import random_images, write_h5
from support.launcher import Result


@pytest.mark.parametrize("name", ["unseen.clients", "join.share", "faults.straggler"])
def test_share_of_no_client_is_refused(
    assert_refused: Callable[..., str], run_command: Callable[..., Result], name: str
) -> None:
    """Such a share would silently have no effect; the smallest one that has an effect is named."""
    flags = ("--clients", "7", "--partition.kind", "pathological", "--dry", "true")
    message = assert_refused(
        f"{name} = 0.07 of 7 clients is less than half a client", *flags, f"--{name}", "0.07"
    )
    assert f"set --{name} 0.143 or more" in message
    for share in ("0.143", "0"):
        run_command(*flags, f"--{name}", share)


def test_number_of_unseen_clients_is_whole(assert_refused: Callable[..., str]) -> None:
    message = assert_refused("unseen.clients = 2.7: expected a whole number", "--unseen.clients", "2.7")
    assert "--unseen.clients 3" in message


def test_unseen_clients_are_of_the_clients_of_the_data(
    assert_refused: Callable[..., str], run_command: Callable[..., Result], tmp_path: Path
) -> None:
    """A file names 30 clients, more than the default of `clients`."""
    pairs = np.array([*islice(combinations(range(9), 2), 30)])  # no two clients have the same two classes
    labels, client = np.repeat(pairs, 10, axis=1).ravel(), np.repeat(np.arange(30), 20)
    h5 = write_h5(tmp_path / "d.h5", x=random_images(600, 1, 4, 4), y=labels, client=client)
    flags = ("--algorithm", "fedavg", "--data.source", "hdf5", "--data.path", h5, "--dry", "true")
    run_command(*flags, "--unseen.clients", "25")
    assert_refused(
        "unseen.clients = 30 leaves no client to train, as clients = 30", *flags, "--unseen.clients", "30"
    )
