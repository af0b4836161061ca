"""What a data set is, whatever it was read from, and the checks every source shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.resize import resize
from pfedmoe_mpi.errors import DataError

if TYPE_CHECKING:
    from pfedmoe_mpi.data.partition import Partition

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RowStore(Protocol):
    """Where samples lie: in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""

    @property
    def dtype(self) -> np.dtype:
        """uint8 or float32; int32 where samples are tokens."""

    @property
    def distributed(self) -> bool:
        """Whether every rank opens the store by itself and reads just the rows it asks for."""

    def read(self, index: np.ndarray) -> np.ndarray:
        """Rows `index` (m,) in the order asked, as (m, *shape), contiguous."""

    def close(self) -> None:
        """Give back what is held open."""


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Samples in memory, (n, *shape) uint8, float32 or int32."""

    x: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @property
    def distributed(self) -> bool:
        return False

    def read(self, index: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.x[index])

    def close(self) -> None:
        pass


@dataclass(frozen=True, eq=False)
class ResizedRows:
    """Images of another store, brought to size × size pixels as they are read."""

    store: RowStore
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.store.shape[0], self.size, self.size)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype

    @property
    def distributed(self) -> bool:
        return self.store.distributed

    def read(self, index: np.ndarray) -> np.ndarray:
        return resize(self.store.read(index), self.size)

    def close(self) -> None:
        self.store.close()


class Fit(Protocol):
    """What a source can do only when it is known which rows train whom: impute, standardise, number words.

    It learns from training rows alone. Only the root calls it; like all of a `Dataset` but rows, it is sent
    to the other ranks.
    """

    def __call__(self, data: Dataset, partition: Partition) -> Dataset:
        """The data as their clients use them; rows and their owners stay the same."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a source gives before the common checks; `where` names it in messages."""

    name: str
    where: str
    store: RowStore
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    client: np.ndarray | None = None
    official_test: np.ndarray | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    client_names: tuple[str, ...] = ()
    proposals: Mapping[str, Any] = field(default_factory=dict)
    fit: Fit | None = None
    ordered: bool = False


@dataclass(frozen=True, eq=False)
class Dataset:
    """n labelled samples.

    `shape` is (C, H, W), (features,) or (tokens,); `labels` (n,) int64 in 0..classes-1, every class present;
    `client` (n,) int64 where the data have natural clients; `official_test` (n,) bool where they have a test
    part of their own. `mean` and `std` hold one number per channel (per feature), meant for x / 255 when
    `dtype` is uint8 and for x itself when it is float32; empty means no normalisation.

    `client_names` name the natural clients where they have names, such as hospitals. `proposals` are settings
    by dotted name that suit the data, for those the user has not given. With a `fit` the data are not ready
    before `fitted`: samples may hold NaN. `vocabulary` is the number of tokens there may be, 0 where samples
    are no tokens. `ordered` rows overlap those that follow them: parts are cut from their end and not drawn.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    labels: np.ndarray
    class_names: tuple[str, ...]
    client: np.ndarray | None
    official_test: np.ndarray | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: np.dtype
    store: RowStore = field(repr=False)
    client_names: tuple[str, ...] = ()
    proposals: Mapping[str, Any] = field(default_factory=dict)
    fit: Fit | None = None
    vocabulary: int = 0
    ordered: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def distributed(self) -> bool:
        """True: every rank opens the data and reads its rows; False: only the root does, and sends rows."""
        return self.store.distributed

    @property
    def tokens(self) -> bool:
        """Whether samples are texts: (length,) tokens, 0 for padding."""
        return self.dtype == np.int32

    def fitted(self, partition: Partition) -> Dataset:
        """The data as their clients use them, once it is known which rows train whom."""
        return replace(self.fit(self, partition), fit=None) if self.fit else self

    def without_rows(self) -> Dataset:
        """All that is known of the data but the rows themselves."""
        return replace(self, store=HeldRows(np.empty((0, *self.shape), self.dtype)))

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Samples `index` (m,) in the order asked: (m, *shape), of `dtype`, contiguous.

        Raises:
            DataError: the file cannot be read any more, or holds a NaN or an infinity in one of these rows.
        """
        return self.store.read(np.asarray(index, dtype=np.int64))

    def close(self) -> None:
        """Close the file behind the rows, if any."""
        self.store.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(loaded: Loaded, settings: Data) -> Dataset:
    """The data set of a source after the common checks; the user's settings win over its constants.

    Raises:
        DataError: labels with gaps, arrays of unlike lengths, `data.size` or `data.mean` that do not fit.
    """
    store = _sized(loaded, settings)
    classes = check_labels(loaded.labels, loaded.where)
    names = loaded.class_names or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise DataError(
            f"{loaded.where} names {len(names)} classes and has rows of {classes}",
            "give one name per class, and rows of every class",
        )
    mean, std = _normalisation(loaded, settings, store)
    return Dataset(
        name=loaded.name,
        shape=store.shape,
        classes=classes,
        labels=np.asarray(loaded.labels, dtype=np.int64),
        class_names=names,
        client=loaded.client,
        official_test=loaded.official_test,
        mean=mean,
        std=std,
        dtype=store.dtype,
        store=store,
        client_names=loaded.client_names,
        proposals=loaded.proposals,
        fit=loaded.fit,
        ordered=loaded.ordered,
    )


def _sized(loaded: Loaded, settings: Data) -> RowStore:
    shape, size = loaded.store.shape, settings.size
    if not size or shape[1:] == (size, size):
        return loaded.store
    if len(shape) != 3:
        raise DataError(
            f"data.size {size} is for images, but a sample of {loaded.where} has shape {shape}",
            "leave out --data.size",
        )
    return ResizedRows(loaded.store, size)


def _normalisation(
    loaded: Loaded, settings: Data, store: RowStore
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = store.shape[0]
    if loaded.fit and settings.mean:
        raise DataError(
            f"data.mean and data.std do not apply to {loaded.where}, whose samples are made ready by what "
            "clients train on",
            "leave them out",
        )
    mean, std = (settings.mean, settings.std) if settings.mean else (loaded.mean, loaded.std)
    if not mean and store.dtype == np.uint8:
        mean = std = (0.5,) * channels
    if len(mean) != channels and mean:
        origin = "data.mean and data.std" if settings.mean else f"mean and std of {loaded.where}"
        raise DataError(
            f"{origin} have {len(mean)} numbers, a sample has {channels} channels (shape {store.shape})",
            f"give {channels} numbers each, one per channel",
        )
    return mean, std


def check_labels(labels: np.ndarray, where: str) -> int:
    """The number of classes of `labels` (n,).

    Raises:
        DataError: none, not integers, negative, not counted from 0 without gaps, or fewer than two classes.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels of {where} are {labels.dtype} of shape {labels.shape}",
            "give one integer per sample, (n,)",
        )
    if not len(labels):
        raise DataError(f"{where} is empty", "give at least one sample of every class")
    return _check_numbers(labels, f"labels of {where}", "class")


def check_clients(client: np.ndarray, rows: int, where: str) -> np.ndarray:
    """`client` (n,) as int64, clients counted from 0 without gaps."""
    if client.shape != (rows,) or not np.issubdtype(client.dtype, np.integer):
        raise DataError(
            f"client of {where} is {client.dtype} of shape {client.shape}",
            f"give one integer per sample, ({rows},)",
        )
    _check_numbers(client, f"client of {where}", "client", least=1)
    return client.astype(np.int64)


def _check_numbers(numbers: np.ndarray, where: str, noun: str, least: int = 2) -> int:
    found = np.unique(numbers)
    if found[0] < 0:
        raise DataError(
            f"{where}: row {int(np.argmin(numbers))} has {found[0]}",
            f"number every {noun} from 0, without gaps",
        )
    missing = np.flatnonzero(found != np.arange(len(found)))
    if len(missing):
        remedy = f"number every {noun} from 0, without gaps"
        raise DataError(
            f"{where} run from {found[0]} to {found[-1]}, but {noun} {missing[0]} has no row",
            f"subtract {found[0]} from each" if found[-1] - found[0] == len(found) - 1 else remedy,
        )
    if len(found) < least:
        raise DataError(f"{where} hold one class only", f"give rows of {least} classes or more")
    return len(found)


def sample_shape(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """(C, H, W) or (features,) of an array (n, C, H, W), (n, H, W) or (n, features).

    Raises:
        DataError: no rows, another number of dimensions, a dimension of 0, or channels in the last place.
    """
    remedy = "give images as (n, channels, height, width) or (n, height, width), features as (n, features)"
    if len(shape) not in {2, 3, 4}:
        raise DataError(f"x of {where} has shape {shape}", remedy)
    if 0 in shape:
        raise DataError(f"x of {where} is empty (shape {shape})", "give at least one sample of every class")
    if len(shape) == 4 and shape[3] in {1, 3, 4} and shape[1] > 4:
        raise DataError(
            f"x of {where} has shape {shape}, its channels in the last place",
            "transpose it: x.transpose(0, 3, 1, 2)",
        )
    return (1, *shape[1:]) if len(shape) == 3 else tuple(shape[1:])


def check_finite(x: np.ndarray, row_numbers: np.ndarray, where: str) -> None:
    """Refuse NaN and infinities in rows `x` (m, ...), naming the first of `row_numbers` (m,) with one."""
    if x.dtype == np.uint8 or np.isfinite(x).all():
        return
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    raise DataError(
        f"{where}: row {row_numbers[np.argmax(bad)]} holds a NaN or an infinity",
        "replace such values or leave the rows out",
    )


def user_path(settings: Data) -> Path:
    """`data.path` as a path that exists.

    Raises:
        DataError: there is nothing.
    """
    path = Path(settings.path).expanduser()
    try:
        path.stat()
    except OSError as error:
        raise DataError(f"data.path {path}: {error.strerror}", "check --data.path") from error
    return path
