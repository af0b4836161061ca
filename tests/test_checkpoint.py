"""Checkpoints: what is written is read, what is damaged is refused, what is interrupted leaves no trace."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from checkpoint_driver import content, flip, shared_out, vector
from drivers import HERE, mpirun

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, Content
from pfedmoe_mpi.comm import Comm
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.flat import Layout
from pfedmoe_mpi.sparse import SparseFile


@pytest.fixture(scope="module")
def alone() -> Comm:
    """A world of one rank."""
    from mpi4py import MPI

    return Comm(MPI.COMM_SELF)


def write(alone: Comm, path: Path, whole: Content) -> None:
    home, mine = shared_out(alone, whole)
    checkpoint.write(alone, path, whole, mine, home)


@pytest.fixture(scope="module")
def sealed(alone: Comm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """A small checkpoint with everything in it."""
    path, whole = tmp_path_factory.mktemp("sealed") / "round-000004-partial.h5", content(partial=True)
    write(alone, path, whole)
    return path, whole


@pytest.fixture
def copy(sealed: tuple[Path, Content], tmp_path: Path) -> Path:
    return Path(shutil.copy(sealed[0], tmp_path))


def bits(array: np.ndarray) -> list[int]:
    return array.view(np.uint32).tolist()


# Writing and reading


@pytest.mark.parametrize(
    "whole",
    [
        content(),
        content(partial=True),
        content(clients=1),
        content(sizes=(0,)),
        content(state=0),
        content(sizes=(0,), state=0),
        content(clients=400, sizes=(100, 3)),
        replace(content(), history=[]),
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
    ],
)
def test_what_is_written_is_read(alone: Comm, tmp_path: Path, whole: Content) -> None:
    path = tmp_path / "round-000003.h5"
    write(alone, path, whole)
    assert os.listdir(tmp_path) == [path.name]
    clients = len(whole.client_layouts)
    for rank in range(3):
        checkpoint.verify(path, rank, 3)
    with Checkpoint(path) as loaded:
        assert (loaded.round, loaded.config, loaded.history) == (
            whole.round,
            whole.config,
            list(whole.history),
        )
        assert loaded.identity == whole.identity
        assert bits(loaded.state) == bits(whole.state) and loaded.state.dtype == np.float32
        assert loaded.state_layout == whole.state_layout
        assert loaded.clients == clients
        for client in range(clients):
            assert bits(loaded.vector(client)) == bits(vector(whole, client))
            assert loaded.layout(client) == whole.client_layouts[client]
        for split, rows in whole.partition.items():
            assert [r.tolist() for r in loaded.partition(split)] == [r.tolist() for r in rows]
        if whole.partial is None:
            assert loaded.partial is None
        else:
            assert np.array_equal(loaded.partial, whole.partial) and loaded.finished == [1, 4]


def test_any_tool_finds_the_clients_bytes_where_the_table_says(sealed: tuple[Path, Content]) -> None:
    path, whole = sealed
    raw = path.read_bytes()
    with open(path, "rb") as file:
        _, start, table, _ = checkpoint._read_seal(file, path, "")
    assert raw[start : start + 8] == b"\x89HDF\r\n\x1a\n"
    with h5py.File(path, "r") as opened:
        assert opened.userblock_size == start
        found = []
        for client, layout in enumerate(whole.client_layouts):
            dataset = opened[f"clients/{client:06d}"]
            assert (dataset.shape, dataset.dtype, dataset.chunks) == ((layout.size,), np.dtype("<f4"), None)
            assert bits(dataset[()]) == bits(vector(whole, client)), (
                "the offset counts from the file's beginning"
            )
            if layout.size:
                offset = dataset.id.get_offset()
                assert raw[offset : offset + 4 * layout.size] == vector(whole, client).tobytes()
                assert offset % 4096 == 0, "ranks on different hosts share no page"
                found.append((offset, 4 * layout.size))
    assert sorted(found) == [(offset, size) for offset, size, _ in table]


@pytest.mark.skipif(not shutil.which("h5dump"), reason="h5dump is not installed")
def test_h5dump_reads_it(sealed: tuple[Path, Content]) -> None:
    dump = subprocess.run(
        ["h5dump", "-H", sealed[0]], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert 'DATASET "000011"' in dump and 'DATASET "state"' in dump


def test_a_user_block_has_room_for_any_number_of_clients(alone: Comm, tmp_path: Path) -> None:
    for clients in (83, 84, 85):  # 24 + 84 entries of 48 + 64 bytes still fit into 4096
        path = tmp_path / f"round-{clients:06d}.h5"
        write(alone, path, content(clients=clients, sizes=(2,)))
        checkpoint.verify(path)
        with h5py.File(path, "r") as opened:
            assert opened.userblock_size == (4096 if clients <= 83 else 8192)


def test_ranks_write_one_file_together(tmp_path: Path) -> None:
    ended = mpirun("checkpoint_driver.py", "write_together", str(tmp_path), ranks=3)
    assert ended.code == 0, ended.output
    checkpoint.verify(tmp_path / "round-000003.h5")


def test_the_newest_comes_first(tmp_path: Path) -> None:
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


# Damage


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.verify(path)
    assert "remedy: " in str(caught.value) and str(path) in str(caught.value)


def regions(path: Path, whole: Content) -> dict[str, tuple[int, int]]:
    """First and last byte of everything a checkpoint is made of."""
    with open(path, "rb") as file:
        length, start, table, _ = checkpoint._read_seal(file, path, "")
    sealed = checkpoint._HEADER.size + 48 * len(table)
    named = {
        "magic": (0, 7),
        "version": (8, 11),
        "entries": (12, 15),
        "length": (16, 23),
        "table": (24, sealed - 1),
        "digest of the rest": (sealed, sealed + 31),
        "padding of the user block": (sealed + 32, start - 33),
        "digest of the user block": (start - 32, start - 1),
        "superblock": (start, start + 47),
        "metadata": (start + 48, table[0][0] - 1),
    }
    for (offset, size, _), (after, *_) in zip(table, [*table[1:], (length,)], strict=True):
        named[f"client at {offset}"] = (offset, offset + size - 1)
        if after > offset + size:
            named[f"behind client at {offset}"] = (offset + size, after - 1)
    named["end"] = (length - 1, length - 1)
    return named


def test_a_flipped_bit_anywhere_is_noticed(sealed: tuple[Path, Content], copy: Path) -> None:
    draw = random.Random(7)
    places = regions(copy, sealed[1])
    positions = [p for first, last in places.values() for p in (first, last, draw.randint(first, last))]
    positions += range(24)
    positions += [draw.randrange(copy.stat().st_size) for _ in range(300)]
    for position in positions:
        bit = draw.randrange(8)
        flip(copy, position, bit)
        refused(copy)
        flip(copy, position, bit)
    checkpoint.verify(copy)


def test_every_bit_of_the_header_is_noticed_at_once(copy: Path) -> None:
    for position in range(24):
        for bit in range(8):
            flip(copy, position, bit)
            refused(copy)
            flip(copy, position, bit)


def test_truncation_at_any_length_is_noticed(copy: Path) -> None:
    whole, draw = copy.read_bytes(), random.Random(3)
    lengths = {
        0,
        1,
        7,
        8,
        23,
        24,
        25,
        4095,
        4096,
        4097,
        len(whole) - 1,
        *(draw.randrange(len(whole)) for _ in range(80)),
    }
    for length in sorted(lengths, reverse=True):
        os.truncate(copy, length)
        refused(copy, "truncated|not a finished checkpoint")


def test_appended_and_swapped_bytes_are_noticed(sealed: tuple[Path, Content], copy: Path) -> None:
    whole = copy.read_bytes()
    for more in (b"\0", b"\0" * 4096, whole):
        copy.write_bytes(whole + more)
        refused(copy, "is too long")
    with open(copy, "rb") as file:
        copy.write_bytes(whole)
        _, _, table, _ = checkpoint._read_seal(file, copy, "")
    equal = [(offset, size) for offset, size, _ in table if size == 6000]
    (one, size), (other, _) = equal[:2]
    swapped = bytearray(whole)
    swapped[one : one + size], swapped[other : other + size] = (
        whole[other : other + size],
        whole[one : one + size],
    )
    assert swapped != whole
    copy.write_bytes(swapped)
    refused(copy, "a client's bytes")


def test_one_rank_finds_the_damage_in_its_share(sealed: tuple[Path, Content], copy: Path) -> None:
    with open(copy, "rb") as file:
        _, _, table, _ = checkpoint._read_seal(file, copy, "")
    flip(copy, table[1][0] + 1)
    checkpoint.verify(copy, 0, 3)
    checkpoint.verify(copy, 2, 3)
    with pytest.raises(CheckpointError):
        checkpoint.verify(copy, 1, 3)


def test_damage_seen_by_one_rank_is_heard_by_all(tmp_path: Path) -> None:
    ended = mpirun("checkpoint_driver.py", "damaged_for_one", str(tmp_path))
    assert ended.code == 0, ended.output


def test_another_format_version_is_named(copy: Path) -> None:
    with open(copy, "r+b") as file:
        file.seek(8)
        file.write((9).to_bytes(4, "little"))
    refused(copy, f"has format version 9, this program reads {checkpoint.FORMAT}")


def _hdf5(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=4096) as file:
        file["x"] = np.arange(10)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b""), "not a finished checkpoint"),
        (lambda path: path.write_bytes(os.urandom(10000)), "not a finished checkpoint"),
        (lambda path: path.write_bytes(b"\0" * 10000), "not a finished checkpoint"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: None, "there is no checkpoint"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (_hdf5, "not a finished checkpoint"),
        (lambda path: path.write_bytes(b"pfedmoe\0\1\0\0\0" + b"\xff" * 12), "truncated"),
        (lambda path: path.write_bytes(b"pfedmoe\0\1\0\0\0" + b"\xff" * 4 + b"\x18" + b"\0" * 7), "seal"),
    ],
    ids=["empty", "garbage", "zeros", "folder", "missing", "loop", "other hdf5", "header", "huge table"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    path = tmp_path / "round-000001.h5"
    make(path)
    refused(path, says)


# Failures while writing


def test_an_unsealed_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "round-000001.h5"
    checkpoint._lay_out(path, content())
    with h5py.File(path, "r") as opened:
        assert opened.attrs["round"] == 3
    refused(path, "not a finished checkpoint")


def test_an_error_on_one_rank_is_an_error_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    ended = mpirun("checkpoint_driver.py", "write_fails", str(tmp_path), ranks=3)
    assert ended.code == 0, ended.output
    assert "Exception ignored" not in ended.output


def test_no_room_at_any_length_is_one_clean_error(tmp_path: Path) -> None:
    ended = mpirun("checkpoint_driver.py", "write_limited", str(tmp_path), ranks=1)
    assert ended.code == 0, ended.output
    assert "Exception ignored" not in ended.output, "HDF5 has met the full disk"


def test_a_folder_that_is_gone_is_told_with_the_remedy(alone: Comm, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No such file") as caught:
        write(alone, tmp_path / "gone" / "round-000001.h5", content())
    assert "remedy" in str(caught.value)


def test_leftovers_of_a_killed_writer_are_cleared_away(alone: Comm, tmp_path: Path) -> None:
    for name in (".round-000003.h5.tmp", ".round-000002-partial.h5.tmp"):
        (tmp_path / name).write_bytes(b"x" * 1_000_000)
    write(alone, tmp_path / "round-000003.h5", content())
    assert os.listdir(tmp_path) == ["round-000003.h5"]
    checkpoint.verify(tmp_path / "round-000003.h5")


def test_a_writer_killed_at_any_moment_leaves_only_good_checkpoints(tmp_path: Path) -> None:
    seed = str(random.randrange(10**6))
    job = subprocess.run(
        [sys.executable, str(HERE / "checkpoint_driver.py"), "writer_killed", str(tmp_path), seed, "10"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert job.returncode == 0, f"seed {seed}: {job.stdout}{job.stderr}"
    print(f"seed {seed}: {job.stdout}")
    assert int(job.stdout.split(", ")[1].split()[0]) > 0, "no kill was in the middle of a checkpoint"


# The file in memory


def test_a_sparse_file_is_a_file(tmp_path: Path) -> None:
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


def test_a_layout_of_a_terabyte_costs_no_memory_and_no_disk(tmp_path: Path) -> None:
    layout = Layout.join({"model": Layout.of_tensor((1 << 36,))})
    whole = replace(content(clients=4), client_layouts=[layout] * 4)
    path = tmp_path / "file"
    offsets = checkpoint._lay_out(path, whole)
    assert path.stat().st_size > 1 << 40 and path.stat().st_blocks * 512 < 1 << 21
    assert offsets[1] - offsets[0] >= 4 << 36
