"""The files of a table: one file, a folder's shards, or what Hugging Face's `datasets` saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedmoe_mpi.data.sources import arrow_file
from pfedmoe_mpi.data.sources.official_parts import role, role_of_file, unread_validation
from pfedmoe_mpi.errors import DataError
from pfedmoe_mpi.storage.untrusted_json import UnusableError, parse

TEXT = {".csv", ".tsv", ".tab"}
_SAVED, _SPLITS = "state.json", "dataset_dict.json"  # as `save_to_disk` writes them
_LONGEST = 1 << 20  # bytes of such a file
_SHOWN = 10  # names in a message


@dataclass(frozen=True)
class Files:
    """Files in the order of their rows: of the training part, then of the official test part."""

    train: Sequence[Path]
    test: Sequence[Path] = ()
    left_out: tuple[str, ...] = ()


def find_files(path: Path, source: str) -> Files:
    """Return the files of `data.path` for the source `table` or `hf`.

    A folder holds a file or several shards in itself, in `data`, or in a folder per part. A part is named by
    the file (`train-00000-of-00002.parquet`, `mnist_test.csv`) or its folder.

    Raises:
        DataError: no such file, files of several kinds, or parts that leave open which is which.
    """
    try:
        return _find(path, source)
    except OSError as error:
        raise DataError(f"{path} cannot be listed: {error.strerror}", "check --data.path") from error


def _find(path: Path, source: str) -> Files:
    if not path.is_dir():
        if source == "hf" and path.suffix.lower() not in arrow_file.PARQUET | arrow_file.STREAM:
            problem = f"{path} is not a file of Hugging Face, which end in .parquet and .arrow"
            raise DataError(problem, "--data.source table reads .csv and .tsv")
        return Files([path], left_out=_beside(path))
    if source == "table" and ((path / _SPLITS).exists() or (path / _SAVED).exists()):
        raise DataError(f"{path} is a data set that Hugging Face's library saved", "--data.source hf")
    if (path / _SPLITS).exists():
        splits = _json(path / _SPLITS).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise DataError(f"{path / _SPLITS} names no splits", "save the data set again with save_to_disk")
        return _choose(path, {name: _saved(path / _plain(path, name)) for name in splits})
    if (path / _SAVED).exists():
        return Files(_saved(path))
    return _shards(path, arrow_file.PARQUET if source == "hf" else TEXT | arrow_file.PARQUET)


def _beside(path: Path) -> tuple[str, ...]:
    """Return the test file beside a training file: what is left out because one file is named."""
    if role_of_file(path.stem) != "train" or not path.exists():
        return ()
    others = [p for p in path.parent.iterdir() if p.suffix == path.suffix and role_of_file(p.stem) == "test"]
    folder = "to read both, set --data.path to a folder of these files alone"
    return tuple(f"{other.name}, because data.path names one file; {folder}" for other in sorted(others)[:1])


def _saved(folder: Path) -> list[Path]:
    """Return the Arrow files of one saved split, in the order of its rows."""
    state = _json(folder / _SAVED)
    files = state.get("_data_files")
    names = [f.get("filename") for f in files if isinstance(f, dict)] if isinstance(files, list) else []
    plain = [name for name in names if isinstance(name, str)]
    if not plain or len(plain) < len(names):
        raise DataError(f"{folder / _SAVED} names no data files", "save the data set again with save_to_disk")
    if state.get("_indices_data_files"):
        problem = f"{folder} holds a selection of rows, as old versions of `datasets` saved them"
        raise DataError(problem, "save it again: dataset.flatten_indices().save_to_disk(NEW_FOLDER)")
    return [folder / _plain(folder, name) for name in plain]


def _plain(folder: Path, name: str) -> str:
    """Return a name that stays in its folder; refuse any other."""
    if not name or Path(name).name != name or "\0" in name:
        problem = f"{folder} names the file {name!a}, which is outside of the folder"
        raise DataError(problem, "save the data set again with save_to_disk")
    return name


def _json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _LONGEST:
            raise UnusableError(f"{path} is longer than {_LONGEST} bytes")
        content = parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "copy the folder again") from error
    except (UnusableError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}", "copy the folder again") from error
    return content if isinstance(content, dict) else {}


def _shards(path: Path, suffixes: AbstractSet[str], *, deeper: bool = True) -> Files:
    """Return the shards in a folder, in folders named as parts, in `data`, or in its only folder."""
    entries = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
    files = _of_kind(entries, suffixes)
    if files:
        kinds = {file.suffix.lower() for file in files}
        if len(kinds) > 1:
            problem = f"{path} holds files of several kinds: {', '.join(sorted(kinds))}"
            raise DataError(problem, "set --data.path to one file, or keep the files of one kind")
        parts: dict[str, list[Path]] = {}
        for file in files:
            parts.setdefault(role_of_file(file.stem), []).append(file)
        if "" in parts and len(parts) > 1:
            raise DataError(
                f"{path} holds {parts[''][0].name} beside files whose names name a part",
                "name each file train-… or test-…, or move the others away",
            )
        return _choose(path, parts)
    folders = [entry for entry in entries if entry.is_dir()]
    parts = {entry.name: _of_kind(sorted(entry.iterdir()), suffixes) for entry in folders if role(entry.name)}
    if any(parts.values()):
        return _choose(path, parts)
    inner = [f for f in folders if f.name == "data"] or [f for f in folders if any(f.iterdir())]
    if len(inner) == 1 and deeper:
        return _shards(inner[0], suffixes, deeper=False)
    found = f"; it has the folders {', '.join(f.name for f in inner[:_SHOWN])}" if inner else ""
    raise DataError(
        f"{path} has no file {' or '.join(f'*{suffix}' for suffix in sorted(suffixes))}{found}",
        f"--data.path {inner[0]}" if inner else "set --data.path to a table, or to a folder of its shards",
    )


def _of_kind(entries: Iterable[Path], suffixes: AbstractSet[str]) -> list[Path]:
    return [e for e in entries if e.suffix.lower() in suffixes and e.name[0] != "." and e.is_file()]


def _choose(path: Path, parts: Mapping[str, list[Path]]) -> Files:
    """Return the training and test files of parts by name; a part of another name counts if it is alone."""
    roles: dict[str, str] = {}
    for name in parts:
        if role(name):
            other = roles.setdefault(role(name), name)
            if other != name:
                problem = f"{path} has two {role(name)} parts, {other} and {name}"
                raise DataError(problem, "merge them, or move one away")
    if len(parts) == 1 and not roles:
        return Files(next(iter(parts.values())))
    if "train" not in roles:
        raise DataError(
            f"{path} has the parts {', '.join(list(parts)[:_SHOWN])}, and no training part",
            "name it train, or set --data.path to one part",
        )
    left_out = [f"part '{name}': it is neither train nor test" for name in parts if not role(name)]
    if "validation" in roles:
        left_out.append(unread_validation(f"part '{roles['validation']}'", tested="test" in roles))
    return Files(parts[roles["train"]], parts[roles["test"]] if "test" in roles else (), tuple(left_out))
