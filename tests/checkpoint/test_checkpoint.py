"""Checkpoints: written content is read back, damage is refused, an interrupted write leaves no file."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, Content, writer
from pfedmoe_mpi.checkpoint.memory_file import SparseFile
from pfedmoe_mpi.config import recorded
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.federation import metrics
from support.checkpoint_checks import client_vector, sample_content, sample_row
from support.checkpoint_files import read_ranges, write_alone
from support.mpi_job import run_module
from support.paths import with_support


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """A small checkpoint with everything in it."""
    path, whole = tmp_path_factory.mktemp("sealed") / "round-000004-partial.h5", sample_content(partial=True)
    return write_alone(path, whole), whole


def bits(array: np.ndarray) -> list[int]:
    return array.view(np.uint32).tolist()


# Writing and reading


@pytest.mark.parametrize(
    "whole",
    [
        sample_content(),
        sample_content(partial=True),
        sample_content(clients=1),
        sample_content(sizes=(0,)),
        sample_content(state=0),
        sample_content(sizes=(0,), state=0),
        sample_content(clients=400, sizes=(100, 3)),
        replace(sample_content(), round=0, history=[]),
        replace(sample_content(), round=1, history=[{**sample_row(1), "clients": {"accuracy": [None, 0.5]}}]),
    ],
    ids=[
        "whole",
        "partial",
        "one client",
        "nothing private",
        "no state",
        "neither",
        "many clients",
        "before round 1",
        "rows of an earlier version",
    ],
)
def test_written_content_is_read_back(tmp_path: Path, whole: Content) -> None:
    path = tmp_path / "round-000003.h5"
    write_alone(path, whole)
    assert os.listdir(tmp_path) == [path.name]
    clients = len(whole.client_layouts)
    for rank in range(3):
        checkpoint.verify(path, rank, 3)
    with Checkpoint(path) as loaded:
        assert (loaded.round, loaded.config, loaded.history) == (
            whole.round,
            recorded.complete(whole.config),
            list(whole.history),
        )
        assert json.dumps([metrics.learning(row) for row in loaded.history], sort_keys=True) == json.dumps(
            [metrics.learning(row) for row in whole.history], sort_keys=True
        ), "whole numbers stay whole"
        assert loaded.identity == whole.identity
        assert bits(loaded.state) == bits(whole.state) and loaded.state.dtype == np.float32
        assert bits(loaded.moments) == bits(whole.moments) and loaded.moments.dtype == np.float32
        assert len(loaded.moments) == (1400 if whole.partial is not None else 0)
        assert loaded.state_layout == whole.state_layout
        assert loaded.clients == clients
        for client in range(clients):
            assert bits(loaded.vector(client)) == bits(client_vector(whole, client))
            assert loaded.layout(client) == whole.client_layouts[client]
        for split, rows in whole.partition.items():
            assert [r.tolist() for r in loaded.partition(split)] == [r.tolist() for r in rows]
        if whole.partial is None:
            assert loaded.partial is None
        else:
            assert np.array_equal(loaded.partial, whole.partial) and loaded.finished == [1, 4]


def test_seal_table_gives_the_offset_of_every_client(sealed: tuple[Path, Content]) -> None:
    path, whole = sealed
    raw = path.read_bytes()
    sealed_ranges, start = read_ranges(path)
    assert raw[start : start + 8] == b"\x89HDF\r\n\x1a\n"
    with h5py.File(path, "r") as opened:
        assert opened.userblock_size == start
        for client, layout in enumerate(whole.client_layouts):
            dataset = opened[f"clients/{client:06d}"]
            assert (dataset.shape, dataset.dtype, dataset.chunks) == ((layout.size,), np.dtype("<f4"), None)
            assert bits(dataset[()]) == bits(client_vector(whole, client)), (
                "the offset counts from the file's beginning"
            )
            if layout.size:
                offset = dataset.id.get_offset()
                assert raw[offset : offset + 4 * layout.size] == client_vector(whole, client).tobytes()
                assert offset % 4096 == 0, "ranks on different hosts share no page"
                assert sealed_ranges.pop(f"clients/{client:06d}") == (offset, 4 * layout.size)
        for name, (offset, size) in sealed_ranges.items():
            stored = opened[name]
            assert raw[offset : offset + size] == stored[()].tobytes().ljust(size, b"\0"), name
        assert {"config", "history", "server/state", "server/moments", "partial/sum"} <= {*sealed_ranges}


@pytest.mark.skipif(not shutil.which("h5dump"), reason="h5dump is not installed")
def test_h5dump_reads_a_checkpoint(sealed: tuple[Path, Content]) -> None:
    dump = subprocess.run(
        ["h5dump", "-H", sealed[0]], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert 'DATASET "000011"' in dump and 'DATASET "state"' in dump


def test_user_block_fits_any_number_of_clients(tmp_path: Path) -> None:
    lengths = set()
    for clients in (1, 20, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 300):
        path = tmp_path / f"round-{clients:06d}.h5"
        write_alone(path, sample_content(clients=clients, sizes=(2,)))
        checkpoint.verify(path)
        ranges, start = read_ranges(path)
        needed = 32 + 48 * len(ranges) + len("\n".join(ranges)) + 64
        assert start == max(4096, 1 << (needed - 1).bit_length())
        with h5py.File(path, "r") as opened:
            assert opened.userblock_size == start
        lengths.add(start)
    assert len(lengths) == 3


def test_ranks_write_one_file_together(tmp_path: Path) -> None:
    ended = run_module("checkpoint_checks", "write_together", str(tmp_path), ranks=3)
    assert ended.code == 0, ended.output
    checkpoint.verify(tmp_path / "round-000003.h5")


def test_newest_checkpoint_comes_first(tmp_path: Path) -> None:
    order = [
        *("round-1000000.h5", "round-000021.h5", "round-000021-partial.h5", "round-000020.h5"),
        *("round-000020-partial.h5", "round-000003.h5", "round-000000.h5"),
    ]
    others = [
        "best.h5",
        ".round-000099.h5.tmp",
        "round-000050 (copy).h5",
        "round-000050-old.h5",
        "round-5x.h5",
    ]
    for name in [*reversed(order), *others]:
        (tmp_path / name).touch()
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == order
    assert checkpoint.newest_first(tmp_path / "nowhere") == []
    assert (
        checkpoint.name(20, False) == "round-000020.h5"
        and checkpoint.name(20, True) == "round-000021-partial.h5"
    )


# Failures while writing


def test_unsealed_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "round-000001.h5"
    writer._lay_out(path, sample_content())
    with h5py.File(path, "r") as opened:
        assert opened.attrs["round"] == 3
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        checkpoint.verify(path)


def test_write_error_on_one_rank_reaches_all_and_leaves_no_file(tmp_path: Path) -> None:
    ended = run_module("checkpoint_checks", "write_fails", str(tmp_path), ranks=3)
    assert ended.code == 0, ended.output
    assert "Exception ignored" not in ended.output


def test_full_disk_at_any_length_is_one_error(tmp_path: Path) -> None:
    ended = run_module("checkpoint_checks", "write_limited", str(tmp_path), ranks=1)
    assert ended.code == 0, ended.output
    assert "Exception ignored" not in ended.output, "HDF5 wrote to the full disk"


def test_missing_folder_is_reported_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No such file") as caught:
        write_alone(tmp_path / "gone" / "round-000001.h5", sample_content())
    assert "remedy" in str(caught.value)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    for name in (".round-000003.h5.tmp", ".round-000002-partial.h5.tmp"):
        (tmp_path / name).write_bytes(b"x" * 1_000_000)
    write_alone(tmp_path / "round-000003.h5", sample_content())
    assert os.listdir(tmp_path) == ["round-000003.h5"]
    checkpoint.verify(tmp_path / "round-000003.h5")


def test_killed_writer_leaves_only_good_checkpoints(tmp_path: Path) -> None:
    seed = str(random.randrange(10**6))
    job = subprocess.run(
        [sys.executable, "-m", "support.checkpoint_checks", "writer_killed", str(tmp_path), seed, "10"],
        env=with_support(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert job.returncode == 0, f"seed {seed}: {job.stdout}{job.stderr}"
    print(f"seed {seed}: {job.stdout}")
    assert int(job.stdout.split(", ")[1].split()[0]) > 0, "no kill was in the middle of a checkpoint"


# The file in memory


def test_memory_file_behaves_like_a_file(tmp_path: Path) -> None:
    draw, file, path = random.Random(2), SparseFile(), tmp_path / "plain"
    with open(path, "w+b") as plain:
        for _ in range(200):
            at = draw.choice([0, 5, 65530, 65536, 131072, 400_000, draw.randrange(500_000)])
            data = draw.randbytes(draw.choice([1, 7, 70_000]))
            for each in (file, plain):
                assert each.seek(at) == at
                assert each.write(data) == len(data)
                assert each.tell() == at + len(data)
            assert file.seek(0, os.SEEK_END) == plain.seek(0, os.SEEK_END)
            at = draw.randrange(300_000)
            file.seek(at), plain.seek(at)
            wanted = plain.read(100)
            assert file.read(100)[: len(wanted)] == wanted
        for each in (file, plain):
            each.truncate(450_000)
    file.save(tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == path.read_bytes()


def test_terabyte_layout_takes_neither_memory_nor_disk(tmp_path: Path) -> None:
    layout = Layout.join({"model": Layout.of_tensor((1 << 36,))})
    whole = replace(sample_content(clients=4), client_layouts=[layout] * 4)
    path = tmp_path / "file"
    table = writer._lay_out(path, whole)
    assert path.stat().st_size > 1 << 40 and path.stat().st_blocks * 512 < 1 << 21
    assert table["clients/000001"][0] - table["clients/000000"][0] >= 4 << 36
