"""The `Dataset` that every source returns, and the checks that all sources share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.class_names import name_warnings
from pfedmoe_mpi.data.normalisation import check_constants
from pfedmoe_mpi.data.resize import resize
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.names import check_text

if TYPE_CHECKING:
    from pfedmoe_mpi.data.partition import Partition

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RowStore(Protocol):
    """The samples of a data set, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    @property
    def dtype(self) -> np.dtype:
        """uint8 or float32; int32 if samples are tokens."""

    @property
    def distributed(self) -> bool:
        """Whether every rank opens the store itself and reads only the rows it needs."""

    def read(self, index: np.ndarray) -> np.ndarray:
        """Return rows `index` (m,) in that order, as a contiguous array (m, *shape)."""

    def close(self) -> None:
        """Close the file behind the samples, if any."""


@dataclass(frozen=True, eq=False)
class MemoryRows:
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
class ChangedRows:
    """Samples of another store that `read`, which a subclass defines, changes."""

    store: RowStore

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype

    @property
    def distributed(self) -> bool:
        return self.store.distributed

    def close(self) -> None:
        self.store.close()


@dataclass(frozen=True, eq=False)
class ResizedRows(ChangedRows):
    """Images of another store, resized to size × size pixels when they are read."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.store.shape[0], self.size, self.size)

    def read(self, index: np.ndarray) -> np.ndarray:
        return resize(self.store.read(index), self.size)


class Fit(Protocol):
    """The step that needs the partition: impute, standardise, build a vocabulary.

    It learns from training rows alone. Only the root calls it. Like everything in a `Dataset` except the
    rows, it is sent to the other ranks.
    """

    def __call__(self, data: Dataset, partition: Partition) -> Dataset:
        """Return the data that clients train on; the rows and their owners stay the same."""


@dataclass(frozen=True, eq=False)
class SourceData:
    """The data of one source before the common checks; `where` names the source in messages.

    `files` names the file of every row, if each has one.
    """

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
    vocabulary: int = 0
    ordered: bool = False
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    files: Sequence[Any] = ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """n labelled samples.

    `shape` is (C, H, W), (features,) or (tokens,). `labels` are (n,) int64 in 0..classes-1, and every class
    occurs. `client` is (n,) int64, or None if the data have no natural clients. `official_test` is (n,) bool,
    or None if the data have no test part. `mean` and `std` hold one number per channel (per feature); they
    apply to x / 255 if `dtype` is uint8 and to x itself if it is float32. Empty means no normalisation.

    `client_names` are the names of the natural clients, such as hospitals, if they have names. `proposals`
    maps dotted names of settings to values that suit the data; they replace defaults, not the user's values
    (`federation.effective.proposals` adds what follows from them).
    If `fit` is set, samples may hold NaN until `fitted` is called. `vocabulary` is the number of possible
    tokens, 0 if samples are not tokens. `ordered` means that each row overlaps the rows after it: parts are
    then cut from the end and not drawn at random. `left_out` names what of the data is not read, and why.
    `summary` are lines on what the source took the data to be, before a fit. `warnings` say what a user
    should know of the data although they can be used.
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
    left_out: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def distributed(self) -> bool:
        """True: every rank opens the data and reads its rows. False: the root reads all and sends rows."""
        return self.store.distributed

    @property
    def tokens(self) -> bool:
        """Whether samples are texts: (length,) tokens, with 0 as padding."""
        return self.dtype == np.int32

    def fitted(self, partition: Partition) -> Dataset:
        """Return the data that clients train on, after the source's `fit` to this partition, if any."""
        return replace(self.fit(self, partition), fit=None) if self.fit else self

    def without_rows(self) -> Dataset:
        """Return a copy that keeps everything except the samples."""
        return replace(self, store=MemoryRows(np.empty((0, *self.shape), self.dtype)))

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Return samples `index` (m,) in that order, as a contiguous array (m, *shape) of `dtype`.

        Raises:
            DataError: the file can no longer be read, or one of these rows holds a NaN or an infinity.
        """
        return self.store.read(np.asarray(index, dtype=np.int64))

    def close(self) -> None:
        """Close the file behind the rows, if any."""
        self.store.close()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_dataset(source: SourceData, settings: Data) -> Dataset:
    """Return the data set of a source after the common checks; `data.mean` and `data.std` override its own.

    Raises:
        DataError: labels with gaps, arrays of different lengths, `data.size`, mean or std that do not fit,
            or a name that is not whole text.
    """
    store = _resized_store(source, settings)
    classes = check_labels(source.labels, source.where)
    names = source.class_names or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise DataError(
            f"{source.where} has {len(names)} class names but rows of {classes} classes",
            "give one name per class, and rows of every class",
        )
    for name in (source.name, *names, *source.client_names):
        check_text(f"{source.where}: the name", name, DataError)
    mean, std = _normalisation(source, settings, store)
    named = () if source.ordered else names  # the classes of next words are words
    return Dataset(
        name=source.name,
        shape=store.shape,
        classes=classes,
        labels=np.asarray(source.labels, dtype=np.int64),
        class_names=names,
        client=source.client,
        official_test=source.official_test,
        mean=mean,
        std=std,
        dtype=store.dtype,
        store=store,
        client_names=source.client_names,
        proposals=source.proposals,
        fit=source.fit,
        vocabulary=source.vocabulary,
        ordered=source.ordered,
        left_out=source.left_out,
        warnings=(*source.warnings, *name_warnings(named, source.where)),
    )


def _resized_store(source: SourceData, settings: Data) -> RowStore:
    """Return the samples at `data.size`, or unchanged if it is 0."""
    shape, size = source.store.shape, settings.size
    if not size or shape[1:] == (size, size):
        return source.store
    if len(shape) != 3:
        raise DataError(
            f"data.size = {size} needs images, but a sample of {source.where} has shape {shape}",
            "remove --data.size",
        )
    return ResizedRows(source.store, size)


def _normalisation(
    source: SourceData, settings: Data, store: RowStore
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std), one number per channel each, or two empty tuples."""
    if source.fit and (settings.mean or settings.std):
        raise DataError(
            f"data.mean and data.std do not apply to {source.where}: its samples are prepared from each "
            "client's training rows",
            "remove --data.mean and --data.std",
        )
    given = settings.mean or settings.std
    mean, std = (settings.mean, settings.std) if given else (source.mean, source.std)
    names = "data.mean and data.std" if given else f"mean and std of {source.where}"
    if store.dtype == np.int32 and mean:
        raise DataError(f"{names} do not apply to tokens", "remove them")
    check_constants(mean, std, store.shape, store.dtype, names)
    if not mean and store.dtype == np.uint8:
        mean = std = (0.5,) * store.shape[0]
    return mean, std


def check_labels(labels: np.ndarray, where: str) -> int:
    """Return the number of classes of `labels` (n,).

    Raises:
        DataError: no labels, not integers, negative, gaps in 0..classes-1, or fewer than two classes.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels of {where} are {labels.dtype} of shape {labels.shape}",
            "give one integer label per sample, (n,)",
        )
    if not len(labels):
        raise DataError(f"{where} is empty", "give at least one sample of every class")
    return _check_numbers(labels, f"labels of {where}", "class")


def check_clients(client: np.ndarray, rows: int, where: str) -> np.ndarray:
    """Return `client` (n,) as int64 once it is checked: clients counted from 0, without gaps.

    Raises:
        DataError: another shape, not integers, negative, or a client without rows.
    """
    if client.shape != (rows,) or not np.issubdtype(client.dtype, np.integer):
        raise DataError(
            f"client of {where} is {client.dtype} of shape {client.shape}",
            f"give one integer client per sample, ({rows},)",
        )
    _check_numbers(client, f"client of {where}", "client", least=1)
    return client.astype(np.int64)


def _check_numbers(numbers: np.ndarray, where: str, noun: str, least: int = 2) -> int:
    """Return how many different numbers there are; refuse negative ones, gaps, and fewer than `least`."""
    values = np.unique(numbers)
    remedy = f"number every {noun} from 0, without gaps"
    if values[0] < 0:
        raise DataError(f"{where}: row {int(np.argmin(numbers))} has {values[0]}", remedy)
    missing = np.flatnonzero(values != np.arange(len(values)))
    if len(missing):
        consecutive = values[-1] - values[0] == len(values) - 1
        raise DataError(
            f"{where} run from {values[0]} to {values[-1]}, but {noun} {missing[0]} has no row",
            f"subtract {values[0]} from each" if consecutive else remedy,
        )
    if len(values) < least:
        raise DataError(f"{where} hold one class only", f"give rows of {least} classes or more")
    return len(values)


def sample_shape(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return the shape of a sample, (C, H, W) or (features,), of x (n, C, H, W), (n, H, W) or (n, features).

    Raises:
        DataError: no rows, another number of dimensions, a dimension of 0, or channels as the last dimension.
    """
    remedy = "give images as (n, channels, height, width) or (n, height, width), features as (n, features)"
    if len(shape) not in {2, 3, 4}:
        raise DataError(f"x of {where} has shape {shape}", remedy)
    if 0 in shape:
        raise DataError(f"x of {where} is empty (shape {shape})", "give at least one sample of every class")
    if len(shape) == 4 and shape[3] in {1, 3, 4} and shape[1] > 4:
        raise DataError(
            f"x of {where} has shape {shape}, with channels as the last dimension",
            "transpose it: x.transpose(0, 3, 1, 2)",
        )
    return (1, *shape[1:]) if len(shape) == 3 else tuple(shape[1:])


def check_finite(x: np.ndarray, row_numbers: np.ndarray, where: str) -> None:
    """Check rows `x` (m, ...) for NaN and infinities.

    Raises:
        DataError: a row holds one; names the first such row by its number in `row_numbers` (m,).
    """
    if x.dtype == np.uint8 or np.isfinite(x).all():
        return
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    raise DataError(
        f"{where}: row {row_numbers[np.argmax(bad)]} holds a NaN or an infinity",
        "replace such values or remove the rows",
    )


def user_path(settings: Data) -> Path:
    """Return `data.path` as a path that exists.

    Raises:
        DataError: nothing exists at this path, or it cannot be accessed.
    """
    path = Path(settings.path).expanduser()
    try:
        path.stat()
    except OSError as error:
        raise DataError(f"data.path = {path}: {error.strerror}", "check --data.path") from error
    return path
