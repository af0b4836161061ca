"""`partition.noise`: noise on the samples, stronger from client to client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.config.partition_settings import PartitionSettings
from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data import Dataset, Partition, make_partition
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData, build_dataset
from pfedmoe_mpi.data.noise import with_noise
from support import launcher, text_files

LABELS = np.arange(80) % 4


def noisy(
    x: np.ndarray, sigma: float, seed: int = 0, std: tuple[float, ...] = ()
) -> tuple[Dataset, Partition]:
    """Return samples `x` (80, …) of four clients with noise, and their partition."""
    mean = tuple(0.0 for _ in std)
    data = build_dataset(SourceData("name", "where", MemoryRows(x), LABELS, mean=mean, std=std), Data())
    partition = make_partition(PartitionSettings(kind="iid", validation=0.2), LABELS, 4, 4, seed)
    return with_noise(data, partition, sigma, seed), partition


def rows_of(partition: Partition, client: int) -> np.ndarray:
    return np.concatenate([part[client] for part in (partition.train, partition.validation, partition.test)])


def test_noise_grows_from_client_to_client() -> None:
    """In units of the range 0 to 1: the std of client k is 0.2 · k / 4, in every part."""
    for x, unit in (
        (np.full((80, 3, 16, 16), 128, np.uint8), 255),
        (np.zeros((80, 1, 32, 32), np.float32), 1),
    ):
        data, partition = noisy(x, 0.2)
        for client in range(4):
            for part in (partition.train, partition.validation, partition.test):
                added = data.rows(part[client]).astype(float) / unit - x[0, 0, 0, 0] / unit
                assert added.std() == pytest.approx(0.05 * client, rel=0.04)
                assert abs(added.mean()) < 0.01
        assert np.array_equal(data.rows(partition.train[0]), x[partition.train[0]]), "client 0 has none"


def test_images_keep_their_type_and_range() -> None:
    x = np.random.default_rng(0).choice([0, 255], (80, 1, 8, 8)).astype(np.uint8)
    data, partition = noisy(x, 0.2)
    changed, kept = data.rows(rows_of(partition, 3)), x[rows_of(partition, 3)]
    assert changed.dtype == np.uint8 and data.dtype == np.uint8
    assert (abs(changed.astype(int) - kept) < 200).all(), "nothing goes round from 0 to 255"
    assert changed.mean() < 160 and (changed != kept).mean() > 0.4


def test_noise_of_features_is_in_units_of_their_std() -> None:
    x = np.zeros((80, 400), np.float32)
    data, partition = noisy(x, 1.0, std=(0.1,) * 200 + (50.0,) * 200)
    added = data.rows(rows_of(partition, 2))
    assert added[:, :200].std() == pytest.approx(0.05, rel=0.05)
    assert added[:, 200:].std() == pytest.approx(25, rel=0.05)


def test_noise_of_a_row_is_its_own() -> None:
    """It depends neither on the rows read with it nor on their order, and leaves the source as it is."""
    x = np.zeros((80, 20), np.float32)
    data, partition = noisy(x, 1.0)
    rows = rows_of(partition, 3)
    together = data.rows(rows)
    assert np.array_equal(data.rows(rows[::-1])[::-1], together)
    assert np.array_equal(np.concatenate([data.rows(rows[i : i + 1]) for i in range(len(rows))]), together)
    assert len(np.unique(together[:, 0])) == len(rows) and not x.any()
    other, _ = noisy(x, 1.0, seed=1)
    assert not np.array_equal(other.rows(rows), together)


def test_rows_without_a_client_have_no_noise() -> None:
    data, partition = noisy(np.zeros((80, 20), np.float32), 0.0)
    three = Partition(partition.train[:3], partition.validation[:3], partition.test[:3])
    again = with_noise(data, three, 1.0, 0)
    assert not again.rows(rows_of(partition, 3)).any() and again.rows(rows_of(partition, 2)).any()


def test_run_with_noise_has_the_same_bits_on_any_ranks_and_store(
    session: launcher.Session, tmp_path: Path
) -> None:
    """Rank 0 sends the digits; of an HDF5 file every rank reads its own."""
    flags = (*launcher.SMALL_RUN[6:], "--clients", "4", "--partition.noise", "0.3", "--rounds", "1")
    digits = ("--data.source", "digits", "--data.size", "8")
    file = ("--data.source", "hdf5", "--data.path", "digits.h5")
    assert session("data", "prepare", "digits.h5", *digits, cwd=tmp_path).code == 0
    runs = {
        "one": session(*digits, *flags, "--run.dir", "one", cwd=tmp_path),
        "clean": session(*digits, *flags, "--partition.noise", "0", "--run.dir", "clean", cwd=tmp_path),
        "file": launcher.shared_session(3)(*file, *flags, "--run.dir", "file", cwd=tmp_path),
        "sent": launcher.shared_session(2)(*digits, *flags, "--run.dir", "sent", cwd=tmp_path),
    }
    for result in runs.values():
        assert result.code == 0, result.err
    assert launcher.checkpoint_digest(tmp_path / "one", 1) == launcher.checkpoint_digest(tmp_path / "sent", 1)
    data = {name: data_digest(tmp_path / name) for name in runs}
    assert data["one"] == data["file"] == data["sent"] != data["clean"], "the digest is of the noisy samples"
    newest = f"one/checkpoints/{checkpoint.name(1, partial=False)}"
    evaluated = json.loads(session("evaluate", newest, "--json", "true", cwd=tmp_path).out)
    assert not evaluated["other_data"]


def data_digest(run: Path) -> str:
    with checkpoint.Checkpoint(run / "checkpoints" / checkpoint.name(1, partial=False)) as loaded:
        return str(loaded.identity["data_digest"])


def test_noise_on_texts_is_refused(assert_refused: Callable[..., str], tmp_path: Path) -> None:
    path = text_files.write_news(tmp_path / "news.csv")
    flags = ("--data.source", "text", "--data.path", path, "--partition.noise", "0.1", "--dry")
    assert_refused("partition.noise = 0.1 needs images or features(.|\n)*remove --partition.noise", *flags)
