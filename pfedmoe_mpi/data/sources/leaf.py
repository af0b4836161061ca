"""LEAF's JSON files: images, texts or features of natural clients, in `train/` and `test/`.

Source: S. Caldas et al., LEAF: A Benchmark for Federated Settings, arXiv 1812.01097. A file is as its
`preprocess.sh` writes it: `users`, `num_samples`, and `user_data` with `x` and `y` of every user.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import IMAGENET_MEAN, IMAGENET_STD, Fit, MemoryRows, SourceData, check_finite
from pfedmoe_mpi.data.sources.client_parts import Block, join_blocks
from pfedmoe_mpi.data.sources.folder import describe_conversions, read_images
from pfedmoe_mpi.data.sources.next_word import last_fifth
from pfedmoe_mpi.data.sources.numbering import as_number, renumber
from pfedmoe_mpi.data.sources.tokens import Vocabulary, number_words, pad, read_texts
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage.untrusted_json import UnusableError, parse

_LONGEST = 1 << 30  # bytes of a file
_IMAGES = ("raw", "img_align_celeba")  # where LEAF's script for CelebA puts the images
_PICTURES = (".jpg", ".jpeg", ".png")
_TEXT = 4  # place of the text in a tweet of Sent140: id, date, query, user, text
_FEMNIST = (28, 28)
_CHARACTERS = [*string.digits, *string.ascii_uppercase, *(f"small {c}" for c in string.ascii_lowercase)]
_REMEDY = "write the folder again with LEAF's preprocess.sh"


@dataclass(frozen=True, eq=False)
class _User:
    """One user of one file: samples (n, features) float32 or n texts, and n labels."""

    block: Block
    path: Path
    x: Any
    y: Sequence[Any]


@dataclass(frozen=True, eq=False)
class _Samples:
    """What the kept users' samples are once they are read."""

    x: np.ndarray
    fit: Fit | None = None
    ordered: bool = False
    coloured: bool = False
    files: Sequence[str] = ()
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def load_leaf(root: Path, settings: Data) -> SourceData:
    """Read all users into memory; every user is a client.

    784 numbers are an image of 28 × 28 (FEMNIST), and other numbers are features (Synthetic). Names of image
    files are images (CelebA), tweets are texts of words (Sent140), and other texts are texts of characters,
    of which the last `data.length` count (Shakespeare).

    Raises:
        DataError: no such files, or one that LEAF does not write; names file and user.
    """
    users = list(_users(root))
    clients = join_blocks([user.block for user in users], str(root))
    users = [users[place] for place in clients.kept]
    samples = _read_samples(root, users, settings)
    classes, names = renumber({label for user in users for label in user.y})
    labels = np.array([classes[label] for user in users for label in user.y], np.int64)
    proposals, official = clients.proposals, clients.official_test
    if samples.ordered:
        proposals |= {"partition.pool": "official", "model.shared": "lstm3"}
        if official is None:
            official = np.concatenate([last_fifth(user.block.rows) for user in users])
    return SourceData(
        name=root.resolve().name if root.name != "data" else root.resolve().parent.name,
        where=f"LEAF folder {root}",
        store=MemoryRows(samples.x),
        labels=labels,
        class_names=character_names(names) if samples.x.shape[1:] == (1, *_FEMNIST) else names,
        client=clients.client,
        client_names=clients.names,
        official_test=official,
        mean=IMAGENET_MEAN if samples.coloured else (),
        std=IMAGENET_STD if samples.coloured else (),
        proposals=proposals,
        fit=samples.fit,
        ordered=samples.ordered,
        files=samples.files,
        left_out=(*clients.left_out, *samples.left_out),
        warnings=samples.warnings,
    )


def _users(root: Path) -> Iterator[_User]:
    """Yield the users of all files, in the order of their names; refuse a user who is twice in a part."""
    parts = {False: sorted((root / "train").glob("*.json")), True: sorted((root / "test").glob("*.json"))}
    if not parts[False]:
        parts = {False: sorted(root.glob("*.json")), True: []}
    if not parts[False]:
        raise DataError(
            f"{root} has no file train/*.json",
            "set --data.path to the folder that LEAF's preprocess.sh writes, such as leaf/data/femnist/data",
        )
    met: dict[tuple[str, bool], Path] = {}
    for test, files in parts.items():
        for path in files:
            for name, x, y in _read_file(path):
                other = met.setdefault((name, test), path)
                if other != path:
                    problem = f"user '{name}' is in {other} and in {path}"
                    raise DataError(problem, "remove files of an earlier run of preprocess.sh")
                yield _User(Block(name, test, len(y)), path, x, y)


def _read_file(path: Path) -> Iterator[tuple[str, Any, list[Any]]]:
    """Yield (name, x, y) of every user of a file; x is an array of float32, or a list of texts."""
    try:
        size = path.stat().st_size
        if size > _LONGEST:
            raise DataError(f"{path} has {size:,} bytes, more than {_LONGEST:,}", "split it by users")
        content = parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check --data.path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", _REMEDY) from error
    except UnusableError as error:
        raise DataError(str(error), "copy the file again") from error
    users, sizes, data = (
        content.get(name) if isinstance(content, dict) else None
        for name in ("users", "num_samples", "user_data")
    )
    if not (isinstance(users, list) and isinstance(sizes, list) and isinstance(data, dict)):
        raise DataError(f"{path} has no users, num_samples and user_data", _REMEDY)
    if len(users) != len(sizes) or len(set(map(str, users))) < len(users):
        raise DataError(f"{path}: users and num_samples do not fit, or a user is there twice", _REMEDY)
    for user, size in zip(users, sizes, strict=True):
        samples = data.get(user) if isinstance(user, str) else None
        x, y = (samples.get(name) if isinstance(samples, dict) else None for name in ("x", "y"))
        if not isinstance(x, list) or not isinstance(y, list) or not len(x) == len(y) == size:
            raise DataError(
                f"{path}: user '{user}' does not have num_samples = {size} samples x and y", _REMEDY
            )
        if not all(_is_label(label) for label in y):
            raise DataError(f"{path}: user '{user}' has labels that are not integers or texts", _REMEDY)
        yield user, _converted(x, f"{path}: user '{user}'"), y


def _is_label(label: Any) -> bool:
    """Return whether a label is a text or a whole number; CelebA's are 0.0 and 1.0."""
    return isinstance(label, str) or (isinstance(label, int | float) and isinstance(as_number(label), int))


def _converted(x: list[Any], where: str) -> Any:
    """Return samples as float32 (n, features), or as texts."""
    if all(isinstance(sample, str) for sample in x):
        return x
    if all(isinstance(sample, list) and len(sample) > _TEXT and _are_texts(sample) for sample in x):
        return [_Tweet(sample[_TEXT]) for sample in x]
    try:
        numbers = np.array(x)
    except ValueError:  # of different lengths
        numbers = np.empty(0)
    if numbers.ndim != 2 or numbers.dtype.kind not in "iuf":
        problem = f"{where} has samples that are neither lists of as many numbers, texts nor tweets"
        raise DataError(problem, "FEMNIST, CelebA, Shakespeare, Sent140 and Synthetic can be read")
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is refused
        numbers = numbers.astype(np.float32)
    check_finite(numbers, np.arange(len(numbers)), where)
    return numbers


class _Tweet(str):
    """A text of words, where other texts are of characters."""

    __slots__ = ()


def _are_texts(sample: list[Any]) -> bool:
    return all(isinstance(value, str) for value in sample)


def _read_samples(root: Path, users: Sequence[_User], settings: Data) -> _Samples:
    """Return all samples (n, …) as the first one's kind."""
    kind = _kind(users[0])
    for user in users:
        if _kind(user) != kind:
            problem = f"{user.path}: user '{user.block.client}' has {_kind(user)}, and others have {kind}"
            raise DataError(problem, "give a folder of one data set")
    if not isinstance(users[0].x, list):
        x = np.concatenate([user.x for user in users])
        image = x.shape[1] == np.prod(_FEMNIST)
        return _Samples(x.reshape(-1, 1, *_FEMNIST) if image else x)
    texts = list(chain.from_iterable(user.x for user in users))
    if kind == "image files":
        return _read_pictures(root, texts, settings)
    if kind == "tweets":
        x, fit, warnings = read_texts(texts, settings, str(root))
        return _Samples(x, fit, warnings=warnings)
    if settings.tokens == "word":
        problem = f"data.tokens = word, but the class of a sample in {root} is the next character"
        raise DataError(problem, "remove --data.tokens")
    longest = max(map(len, texts))
    cut = max(0, longest - settings.length)
    rows, words = number_words(text[-settings.length :] for text in texts)
    return _Samples(
        pad(rows, settings.length),
        Vocabulary(len(words), settings.vocabulary),
        ordered=True,
        left_out=(f"the first {cut} of {longest} characters: data.length = {settings.length}",)
        if cut
        else (),
    )


def _kind(user: _User) -> str:
    """Return in words what the samples of a user are."""
    if not isinstance(user.x, list):
        return f"{user.x.shape[1]} numbers"
    if all(isinstance(text, _Tweet) for text in user.x):
        return "tweets"
    return "image files" if all(text.lower().endswith(_PICTURES) for text in user.x) else "texts"


def _read_pictures(root: Path, names: Sequence[str], settings: Data) -> _Samples:
    """Return the images of these names in LEAF's folder of raw images."""
    folder = root.joinpath(*_IMAGES)
    outside = next((name for name in names if Path(name).name != name or "\0" in name), None)
    if outside is not None:
        raise DataError(f"{root}: the image name {outside!a} leads out of {folder}", _REMEDY)
    if not folder.is_dir():
        raise DataError(f"{root} names images, and there is no folder {folder}", f"put them there: {folder}")
    files = [str(folder / name) for name in names]
    x, conversions = read_images(files, settings.size)
    return _Samples(
        x, coloured=x.shape[1] == 3, files=files, warnings=tuple(describe_conversions(files, conversions))
    )


def character_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return FEMNIST's characters for its labels 0 to 61; other labels stay as they are."""
    known = {str(place): character for place, character in enumerate(_CHARACTERS)}
    return tuple(known.get(name, name) for name in names)
