"""Damaged checkpoints are refused whatever happened to their bytes, and the message says where."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, seal
from pfedmoe_mpi.commands.inspect import digest
from pfedmoe_mpi.errors import CheckpointError
from support.checkpoint_checks import sample_content
from support.checkpoint_files import read_ranges, regions, write_alone, write_leaning
from support.files import flip_bit
from support.mpi_job import run_module


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with everything in it."""
    return write_alone(
        tmp_path_factory.mktemp("sealed") / "round-000004-partial.h5", sample_content(partial=True)
    )


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sealed, tmp_path))


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.verify(path)
    assert "remedy: " in str(caught.value) and str(path) in str(caught.value)


def test_flipped_bit_is_located(copy: Path) -> None:
    """The message names the dataset, HDF5's structure or the seal."""
    draw = random.Random(7)
    datasets, start = read_ranges(copy)
    for name, (first, last) in regions(copy).items():
        says = "checkpoint|damaged|truncated|format" if last < 32 else "its seal does not match"
        says = "HDF5's own structure has changed" if first >= start else says
        says = f"the bytes of {name} have changed" if name in datasets else says
        for position in (first, last, *(draw.randint(first, last) for _ in range(6))):
            bit = draw.randrange(8)
            flip_bit(copy, position, bit)
            refused(copy, says)
            flip_bit(copy, position, bit)
    checkpoint.verify(copy)


def test_every_flipped_header_bit_is_detected(copy: Path) -> None:
    for position in range(32):
        for bit in range(8):
            flip_bit(copy, position, bit)
            refused(copy)
            flip_bit(copy, position, bit)


def test_truncation_at_any_length_is_detected(copy: Path) -> None:
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


def test_truncation_names_the_first_missing_part(copy: Path) -> None:
    ranges, start = read_ranges(copy)
    ordered = sorted(ranges.items(), key=lambda item: item[1], reverse=True)
    assert len(ordered) > 15
    for name, (offset, size) in ordered:
        for length in (offset + size - 1, offset + size // 2, offset):
            os.truncate(copy, length)
            refused(copy, rf"truncated: {length} of \d+ bytes; the first incomplete part is {name}\n")
    os.truncate(copy, start - 1)
    refused(copy, "truncated: .*, and its seal is incomplete")


def test_cut_behind_the_last_dataset_is_structure_damage(tmp_path: Path) -> None:
    path = tmp_path / "round-000003.h5"
    write_alone(path, sample_content(clients=1, sizes=(0,)))
    last = max(offset + size for offset, size in read_ranges(path)[0].values())
    assert last < path.stat().st_size
    os.truncate(path, path.stat().st_size - 1)
    refused(path, "the first incomplete part is HDF5's own structure")


def test_appended_and_swapped_bytes_are_detected(copy: Path) -> None:
    whole = copy.read_bytes()
    for more in (b"\0", b"\0" * 4096, whole):
        copy.write_bytes(whole + more)
        refused(copy, "is too long")
    copy.write_bytes(whole)
    equal = [(offset, size) for name, (offset, size) in read_ranges(copy)[0].items() if size == 6000]
    (one, size), (other, _) = equal[:2]
    swapped = bytearray(whole)
    swapped[one : one + size], swapped[other : other + size] = (
        whole[other : other + size],
        whole[one : one + size],
    )
    assert swapped != whole
    copy.write_bytes(swapped)
    refused(copy, "the bytes of clients/00000. have changed")


def test_each_rank_finds_the_damage_in_its_share(copy: Path) -> None:
    """Every dataset belongs to one rank; rank 0 has all that is not a client's."""
    finders = set()
    for name, (offset, _) in read_ranges(copy)[0].items():
        flip_bit(copy, offset)
        found = []
        for rank in range(3):
            try:
                checkpoint.verify(copy, rank, 3)
            except CheckpointError:
                found.append(rank)
        refused(copy, f"the bytes of {name} have changed")
        flip_bit(copy, offset)
        assert found == [0] or (len(found) == 1 and name.startswith("clients/")), name
        finders |= {*found}
    assert finders == {0, 1, 2}


def test_damage_found_by_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    ended = run_module("checkpoint_checks", "damaged_for_one", str(tmp_path))
    assert ended.code == 0, ended.output


def test_other_format_version_is_named(copy: Path) -> None:
    with open(copy, "r+b") as file:
        file.seek(8)
        file.write((9).to_bytes(4, "little"))
    refused(copy, f"has format version 9, this program reads {seal.FORMAT}")


def _hdf5(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=4096) as file:
        file["x"] = np.arange(10)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b""), "not a finished checkpoint"),
        (lambda path: path.write_bytes(os.urandom(10000)), "not a finished checkpoint"),
        (lambda path: path.write_bytes(b"\0" * 10000), "not a finished checkpoint"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: None, "there is no checkpoint"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (_hdf5, "not a finished checkpoint"),
        (lambda path: path.write_bytes(b"pfedmoe\0\2\0\0\0" + b"\xff" * 20), "truncated"),
        (
            lambda path: path.write_bytes(b"pfedmoe\0\2\0\0\0" + b"\xff" * 12 + b"\x20" + b"\0" * 7),
            "its seal does not match",
        ),
        (lambda path: path.write_bytes(b"pfedmoe\0\1\0\0\0" + bytes(20)), "format version 1, this program"),
        (os.mkfifo, "not a finished checkpoint"),
    ],
    ids=[
        *("empty", "garbage", "zeros", "folder", "missing", "loop", "other hdf5", "header", "huge table"),
        *("version 1", "pipe"),
    ],
)
def test_file_that_is_not_a_checkpoint_is_refused(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "round-000001.h5"
    make(path)
    refused(path, says)


# Campaign


def flipped(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    for _ in range(draw.choice([1, 1, 1, 3, 20])):
        raw[draw.choice([at, draw.randrange(len(raw))])] ^= 1 << draw.randrange(8)


def overwritten(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    size = min(size, len(raw) - at)
    raw[at : at + size] = draw.randbytes(size)


def zeroed(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    size = min(size, len(raw) - at)
    raw[at : at + size] = bytes(size)


def cut(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    del raw[at:]


def removed(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    del raw[at : at + size]


def inserted(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    raw[at:at] = draw.choice([bytes(size), draw.randbytes(size)])


def appended(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    raw += draw.choice([bytes(size), draw.randbytes(size), raw[at : at + size]])


def repeated(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    """One stretch written over another of the same length."""
    size = min(size, len(raw) - at)
    to = draw.randrange(len(raw) - size + 1)
    raw[to : to + size] = raw[at : at + size]


def swapped(draw: random.Random, raw: bytearray, at: int, size: int) -> None:
    size = min(size, len(raw) // 2)
    one, other = sorted((draw.randrange(len(raw) // 2 - size + 1), len(raw) // 2 + draw.randrange(size)))
    other = min(other, len(raw) - size)
    raw[one : one + size], raw[other : other + size] = raw[other : other + size], raw[one : one + size]


MUTATIONS = (flipped, overwritten, zeroed, cut, removed, inserted, appended, repeated, swapped)
SAYS = re.compile(
    r"the bytes of (\S+) have changed|the first incomplete part is (.+)|(HDF5's own structure) has changed|"
    r"(its seal|not a finished checkpoint|format version|too long)|relies on (\S+\.h5)"
)


def judged(path: Path, good: str) -> str:
    """Return the region that the error names, or `harmless`."""
    try:
        checkpoint.verify(path)
        with Checkpoint(path) as loaded:
            assert digest(loaded) == good, "a wrong resume"
        return "harmless"
    except CheckpointError as error:
        said = str(error)
    named = SAYS.search(said)
    assert named and "remedy: " in said and str(path) in said, said
    return next(group for group in named.groups() if group)


def campaign(paths: list[Path], folder: Path, times: int) -> Counter[str]:
    """Return the outcomes of mutations of every kind; half of them hit parts other than vectors.

    Every third mutation of a checkpoint that relies on another one hits that one, in which most bytes count.
    """
    seed = random.randrange(10**6)
    draw, outcomes, seen = random.Random(seed), Counter[str](), set()
    good = {}
    for path in paths:
        with Checkpoint(path) as loaded:
            good[path] = digest(loaded)
    for number in range(times):
        whole = source = paths[number % len(paths)]
        needed = [source.with_name(name) for name in checkpoint.files_needed(source)]
        if needed and draw.random() < 1 / 3:
            source = needed[0]
        for other in (whole, *needed):
            shutil.copyfile(other, folder / other.name)
        raw = bytearray(source.read_bytes())
        spots = [draw.randint(*place) for place in regions(source).values()]
        mutate = MUTATIONS[number // len(paths) % len(MUTATIONS)]
        mutate(draw, raw, draw.choice([draw.choice(spots), draw.randrange(len(raw))]), draw.choice(SIZES))
        path = folder / source.name
        path.write_bytes(raw)
        says = judged(folder / whole.name, good[whole])
        unchanged = raw == source.read_bytes()
        fits = says == "harmless" or not unchanged if source != whole else (says == "harmless") == unchanged
        assert fits, f"seed {seed}, number {number}: {says}"
        outcomes[re.sub(r"[0-9a-f]{64}|\d{6}", "…", says)] += 1
        seen.add(mutate)
    print(f"{times} mutations, seed {seed}: {dict(outcomes.most_common())}")
    assert seen == set(MUTATIONS)
    return outcomes


SIZES = (1, 4, 32, 48, 512, 4096, 20_000)


def test_hundred_mutations_are_refused_or_harmless(sealed: Path, tmp_path: Path) -> None:
    whole = write_alone(tmp_path / "round-000003.h5", sample_content())
    for name in ("mutated", "leaning", "mutated/leaning"):
        (tmp_path / name).mkdir()
    outcomes = campaign([sealed, whole], tmp_path / "mutated", 90)
    outcomes += campaign([write_leaning(tmp_path / "leaning")], tmp_path / "mutated" / "leaning", 10)
    assert len(outcomes) > 4


@pytest.mark.campaign
def test_thousand_mutations_are_refused_or_harmless(sealed: Path, trained: Path, tmp_path: Path) -> None:
    """Of a small partial checkpoint, a small complete one, a trained run's and one that relies on another."""
    sources = [sealed, write_alone(tmp_path / "round-000003.h5", sample_content())]
    sources.append(trained / "checkpoints" / "round-000002.h5")
    for name in ("mutated", "leaning", "mutated/leaning"):
        (tmp_path / name).mkdir()
    outcomes = campaign(sources, tmp_path / "mutated", 900)
    outcomes += campaign([write_leaning(tmp_path / "leaning")], tmp_path / "mutated" / "leaning", 100)
    assert outcomes.total() == 1000 and {"its seal", "clients/…", "HDF5's own structure"} <= {*outcomes}
