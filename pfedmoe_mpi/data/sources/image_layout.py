"""The layout of an image folder: its official parts, its class folders and the images in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pfedmoe_mpi.data.sources.numbering import sort_names
from pfedmoe_mpi.data.sources.official_parts import role
from pfedmoe_mpi.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_OTHER_ENDINGS = (".jfif", ".jpe", ".jp2", ".avif", ".heic", ".heif", ".tga", ".svg", ".dcm", ".npy")
_SHOWN = 10  # names of folders in a warning
_CLASS_REMEDY = "set --data.path to a folder with one folder of images per class"
_SYSTEM = {
    *("__macosx", "system volume information", "$recycle.bin", "lost+found", "__pycache__"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),  # of network storage
}
_WORD = "train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?"
_PART = re.compile(rf"({_WORD})[ _-]?(?:set|data|images)?")
_RESEMBLES_PART = re.compile(rf"(?<![a-z])(?:{_WORD})(?:set|data|images)?(?![a-z])")


@dataclass(frozen=True, eq=False)
class Layout:
    """The images in the order of parts, class names and paths.

    `labels` are (n,) int64; `official_test` is (n,) bool, or None without a test part. `warnings` name what
    is not read and what could be meant otherwise.
    """

    files: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    official_test: np.ndarray | None
    warnings: tuple[str, ...]


def read_layout(root: Path) -> Layout:
    """List the images of every class in the official training part, then in the test part, or in the root.

    Raises:
        DataError: a folder cannot be listed, has no class folders or an empty one, parts have unlike classes,
            or folders look like official parts under names that leave open which is which.
    """
    parts, warnings = _parts(root)
    names = _class_names(parts[0])
    files: list[str] = []
    labels: list[int] = []
    starts: list[int] = []
    skipped: list[str] = []
    for part in parts:
        starts.append(len(files))
        skipped += [e.path for e in _entries(part) if not _is_folder(e) and e.name.lower().endswith(ENDINGS)]
        if _class_names(part) != names:
            differing = sorted(set(names) ^ set(_class_names(part)))
            raise DataError(
                f"{parts[0]} and {part} differ in class {differing[0]}",
                "give both the same class folders: add images of this class, or remove it from both",
            )
        for label, name in enumerate(names):
            inside = sorted(_files(part / name))
            images = [file for file in inside if file.lower().endswith(ENDINGS)]
            skipped += [file for file in inside if file.lower().endswith(_OTHER_ENDINGS)]
            if not images:
                raise DataError(
                    f"{part / name} holds no image",
                    f"add images ({', '.join(ENDINGS)}), or remove "
                    f"{' and '.join(str(each / name) for each in parts)}",
                )
            files += images
            labels += [label] * len(images)
    if skipped:
        warnings.append(
            f"images that are not read: {len(skipped)}, for example {min(skipped)}; images lie in a class "
            f"folder and end in {', '.join(ENDINGS)}"
        )
    official = np.arange(len(files)) >= starts[1] if len(parts) == 2 else None
    return Layout(files, np.array(labels, np.int64), names, official, tuple(warnings))


def _parts(root: Path) -> tuple[list[Path], list[str]]:
    """Return the training part and the test part, if any, or else the root; and warnings.

    Raises:
        DataError: a test part without a training part, two folders for one part, or unfamiliar names.
    """
    folders = _subfolders(root)
    roles = {name: match[1] for name in folders if (match := _PART.fullmatch(name.lower()))}
    if len(roles) == 1 < len(folders) and not _subfolders(root / next(iter(roles))):
        roles = {}  # a class such as `train` beside `bus`: it holds images, as the others do
    if not roles:
        return [root], _unfamiliar(root, folders)
    by_role: dict[str, str] = {}
    for name, word in roles.items():
        other = by_role.setdefault(role(word), name)
        if other != name:
            raise DataError(
                f"{root} holds two {role(word)} parts, {other} and {name}", "merge them, or move one away"
            )
    if "train" not in by_role:
        raise DataError(
            f"{root} holds {' and '.join(roles)}, but no training part",
            f"name it train; --data.path {root / next(iter(roles))} reads one part alone",
        )
    read = [by_role[role] for role in ("train", "test") if role in by_role]
    return [root / name for name in read], _unread(root, read, by_role.get("validation"), folders)


def _unread(root: Path, read: Sequence[str], validation: str | None, folders: Sequence[str]) -> list[str]:
    """Return a warning that names the folders beside the official parts."""
    unread = [name for name in folders if name not in read]
    if not unread:
        return []
    more = f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
    text = f"data.path = {root}: read {' and '.join(read)}, not {', '.join(unread[:_SHOWN])}{more}"
    if validation and len(read) == 1:
        text += f"; to use {validation} as official test part, rename it to test"
    elif validation:
        text += "; validation rows come from the training rows, for example --partition.validation 0.1"
    return [text]


def _unfamiliar(root: Path, folders: Sequence[str]) -> list[str]:
    """Return a warning if all class folders hold the same folders, which may then be the real classes.

    Raises:
        DataError: such folders have names that resemble an official part, or there is only one folder.
    """
    inside = {name: _subfolders(root / name) for name in folders}
    if len(folders) == 1 and inside[folders[0]]:
        raise DataError(f"{root} holds a single folder, {folders[0]}", f"--data.path {root / folders[0]}")
    suspects = [n for n in folders if _RESEMBLES_PART.search(re.sub("(?<=[a-z])(?=[A-Z])", " ", n).lower())]
    for name in suspects:
        others = [other for other in folders if other != name and set(inside[other]) & set(inside[name])]
        if others:
            raise DataError(
                f"{root / name} looks like an official part: {others[0]} also holds a folder "
                f"{min(set(inside[others[0]]) & set(inside[name]))}",
                "name the official parts train and test",
            )
    if len(folders) > 1 and len(inside[folders[0]]) > 1 and len(set(inside.values())) == 1:
        return [
            f"data.path = {root}: its {len(folders)} folders are read as classes, but all of them hold "
            f"folders {', '.join(inside[folders[0]][:3])}; if these are the classes, set --data.path to "
            f"{root / folders[0]}, or name the official parts train and test"
        ]
    return []


def _class_names(part: Path) -> tuple[str, ...]:
    """Return the names of the class folders, sorted as numbers if all of them are numbers."""
    names = tuple(sort_names(_subfolders(part)))
    if not names:
        raise DataError(
            f"{part} has no class folders",
            "put the images of each class into a folder of its own, or set --data.path to a folder that has "
            "class folders",
        )
    return names


def _subfolders(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders in a folder, sorted, without links to a folder that contains it."""
    around = {_identity(folder), *_around(folder)}
    folders = [entry for entry in _entries(folder) if _is_folder(entry)]
    return tuple(sorted(e.name for e in folders if not (e.is_symlink() and _identity(e.path) in around)))


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a class folder; each folder is read once, links or not."""
    visited = _around(folder)
    left = [str(folder)]
    while left:
        parent = left.pop()
        if _identity(parent) in visited:
            continue
        visited.add(_identity(parent))
        for entry in sorted(_entries(parent), key=lambda entry: entry.name, reverse=True):
            if _is_folder(entry):
                left.append(entry.path)
            else:
                yield entry.path


def _around(folder: Path) -> set[tuple[int, int]]:
    """Return the identities of the folders above a folder, and above the one it links to."""
    return {_identity(parent) for path in (folder.absolute(), folder.resolve()) for parent in path.parents}


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return what a folder and a link to it have in common."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield what a folder holds, except hidden names and what operating systems put there."""
    try:
        with os.scandir(folder) as entries:
            yield from (e for e in entries if e.name[0] != "." and e.name.lower() not in _SYSTEM)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}", _CLASS_REMEDY) from error
