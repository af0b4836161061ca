"""TensorFlow Federated's HDF5 files: clients as groups `examples/CLIENT`, in one file per part.

A client has images, `pixels` (or `image`) and `label`, or a text, `snippets` (Shakespeare) or `tokens` (Stack
Overflow). Source: its simulation data sets, such as `fed_emnist_train.h5` and `fed_emnist_test.h5`, or those
of `fed_cifar100`, `shakespeare` and `stackoverflow`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, MemoryRows, SourceData, check_finite
from pfedmoe_mpi.data.sources.client_parts import Block, join_blocks
from pfedmoe_mpi.data.sources.hdf5_table import check_chunks, find_table, most_unpacked
from pfedmoe_mpi.data.sources.leaf import character_names
from pfedmoe_mpi.data.sources.numbering import renumber
from pfedmoe_mpi.data.sources.tff_text import TEXTS, TextClient, load_texts, read_text
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage import untrusted_hdf5
from pfedmoe_mpi.storage.untrusted_json import UnusableError

_GROUP = "examples"
_SAMPLES = ("pixels", "image")
_TRAIN, _TEST = "_train.h5", "_test.h5"
_LAYOUT = (
    "give examples/CLIENT/pixels (n, height, width) or image (n, height, width, channels), and label (n,), or"
    " the texts, examples/CLIENT/snippets or tokens (n,)"
)
_COPY = "download it again"


@dataclass(frozen=True, eq=False)
class _Client:
    """One client of one file: images (n, channels, height, width) and labels (n,)."""

    block: Block
    path: Path
    x: np.ndarray
    y: np.ndarray


def load_tff(path: Path, settings: Data) -> SourceData:
    """Read all clients of a folder's two files, or of one file, into memory.

    Texts become windows of `data.length` characters (of Stack Overflow words), whose class is the next one.

    Raises:
        DataError: no such files, or one that is damaged or of another layout; names file and client.
    """
    files, left_out = _files(path)
    read = [client for file, test in files for client in _read_file(file, test)]
    texts = [client for client in read if isinstance(client, TextClient)]
    images = [client for client in read if isinstance(client, _Client)]
    if texts and images:
        problem = f"{path}: client '{texts[0].name}' has a text, and others have images"
        raise DataError(problem, "give all clients data of one kind")
    name = files[0][0].stem.removesuffix("_train")
    return (
        load_texts(path, name, texts, left_out, settings)
        if texts
        else _images_of(path, name, images, left_out)
    )


def _images_of(path: Path, name: str, read: Sequence[_Client], left_out: Sequence[str]) -> SourceData:
    """Return the images of all clients."""
    clients = join_blocks([client.block for client in read], str(path))
    read = [read[place] for place in clients.kept]
    first = read[0].x
    for client in read:
        if (client.x.shape[1:], client.x.dtype) != (first.shape[1:], first.dtype):
            raise DataError(
                f"{client.path}: client '{client.block.client}' has {client.x.dtype} {client.x.shape[1:]}, "
                f"others {first.dtype} {first.shape[1:]}",
                "give all clients images of one shape and type",
            )
    given = np.concatenate([client.y for client in read])
    classes, names = renumber(np.unique(given).tolist())
    coloured = first.shape[1] == 3
    return SourceData(
        name=name,
        where=str(path),
        store=MemoryRows(np.concatenate([client.x for client in read])),
        labels=np.array([classes[label] for label in given.tolist()], np.int64),
        class_names=character_names(names) if first.shape[1:] == (1, 28, 28) else names,
        client=clients.client,
        client_names=clients.names,
        official_test=clients.official_test,
        mean=IMAGENET_MEAN if coloured and first.dtype == np.uint8 else (),
        std=IMAGENET_STD if coloured and first.dtype == np.uint8 else (),
        proposals=clients.proposals,
        left_out=(*left_out, *clients.left_out),
    )


def _files(path: Path) -> tuple[list[tuple[Path, bool]], list[str]]:
    """Return the files, each with whether it is the test part, and what is left out."""
    if not path.is_dir():
        other = path.with_name(path.name.removesuffix(_TRAIN) + _TEST)
        beside = path.name.endswith(_TRAIN) and other.exists()
        return [(path, False)], [f"{other.name}, because data.path names one file"] if beside else []
    train = sorted(path.glob(f"*{_TRAIN}"))
    if len(train) != 1:
        raise DataError(
            f"{path} has {len(train)} files *{_TRAIN}, expected 1",
            "set --data.path to a folder of one data set: fed_emnist_train.h5 and fed_emnist_test.h5",
        )
    test = train[0].with_name(train[0].name.removesuffix(_TRAIN) + _TEST)
    return [(train[0], False), *([(test, True)] if test.exists() else [])], []


def _read_file(path: Path, test: bool) -> Iterator[_Client | TextClient]:
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        remedy = untrusted_hdf5.opening_remedy(error, path, _COPY)
        raise DataError(f"{path} cannot be opened as HDF5: {error}", remedy) from error
    try:
        with file:
            untrusted_hdf5.check_heaps(file, path)
            yield from _read_clients(file, path, test)
    except UnusableError as error:
        raise DataError(f"{path}: {error}", _LAYOUT) from error
    except untrusted_hdf5.FROM_HDF5 as error:
        raise DataError(f"{path} cannot be read: {error}", _COPY) from error


def _read_clients(file: Any, path: Path, test: bool) -> Iterator[_Client | TextClient]:
    """Yield the clients in the order of their names; all of them together unpack to a plausible size."""
    left = most_unpacked(path)
    for name in _client_names(file, path):
        key = f"{_GROUP}/{name}"
        group = file[key]
        kinds = [kind for kind in (*_SAMPLES, *TEXTS) if group.id.links.exists(kind.encode())]
        kind = kinds[0] if kinds else _SAMPLES[0]
        if kind in TEXTS:
            text = read_text(file, f"{key}/{kind}", path, _LAYOUT, left)
            left -= len(text)
            yield TextClient(name, test, kind, text)
            continue
        x, y = (find_table(file, f"{key}/{part}", path, _LAYOUT) for part in (kind, "label"))
        left -= x.size * x.dtype.itemsize + y.size * y.dtype.itemsize
        if left < 0:
            raise DataError(f"{path} claims to unpack to far more than its length", _COPY)
        where = f"{path}: client '{name}'"
        _check(x, y, where)
        for table in (x, y):
            check_chunks(table, where)
        images = _images(x[()])
        check_finite(images, np.arange(len(images)), where)
        yield _Client(Block(name, test, len(images)), path, images, y[()].reshape(-1).astype(np.int64))


def _client_names(file: Any, path: Path) -> list[str]:
    """Return the names of the clients' groups; refuse links."""
    links = file.id.links
    if not links.exists(_GROUP.encode()):
        raise DataError(f"{path} has no group '{_GROUP}'", _LAYOUT)
    if links.get_info(_GROUP.encode()).type != h5py.h5l.TYPE_HARD or not isinstance(file[_GROUP], h5py.Group):
        raise UnusableError(f"{_GROUP} is not a group of this file")
    group, names = file[_GROUP], []
    for name in group:
        untrusted_hdf5.check_utf8(name, "the name of a client")
        hard = group.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD
        if not hard or group.get(name, getclass=True) is not h5py.Group:
            raise UnusableError(f"{_GROUP}/{name} is not a group of this file")
        names.append(name)
    if not names:
        raise DataError(f"{path} has no client in '{_GROUP}'", _LAYOUT)
    return sorted(names)


def _check(x: Any, y: Any, where: str) -> None:
    """Refuse samples that are not images, and labels that are not one integer per image."""
    if len(x.shape) not in {3, 4} or (x.dtype != np.uint8 and x.dtype.kind != "f"):
        raise DataError(f"{where} has samples of {x.dtype} {x.shape}, which are not images", _LAYOUT)
    if 0 in x.shape[1:] or (len(x.shape) == 4 and x.shape[3] not in {1, 3}):
        raise DataError(f"{where} has images of shape {x.shape[1:]}", _LAYOUT)
    if y.shape not in {x.shape[:1], (*x.shape[:1], 1)} or y.dtype.kind not in "iu":
        raise DataError(f"{where} has {x.shape[0]} images, and labels of {y.dtype} {y.shape}", _LAYOUT)


def _images(raw: np.ndarray) -> np.ndarray:
    """Return images (n, channels, height, width), uint8 or float32, of (n, height, width[, channels])."""
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is refused
        x = raw.astype(np.uint8 if raw.dtype == np.uint8 else np.float32, copy=False)
    return np.ascontiguousarray(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2))
