"""Code of the user's own: an object such as `./nets.py:TinyViT` or `mypackage.nets:TinyViT`, or a whole file.

A reference is a text: a Python file or an importable module, and after a colon the name of an object in it.
It is checked by reading the source; the code runs when the object is first needed. `sources` returns all
files that it consists of, which a run records.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pfedmoe_mpi import user_modules
from pfedmoe_mpi.errors import CodeError
from pfedmoe_mpi.names import expanded

TIMM = "timm:"  # before the name of an architecture of the package timm, which is not a reference
MOST_DIFFERENCES = 40  # lines of a printed difference
LONGEST_LINE = 200  # characters of such a line


def is_reference(text: str) -> bool:
    """Return whether a name is a reference to an object or a file, and not a name of this program."""
    return (":" in text or text.lower().endswith(".py")) and not text.startswith(TIMM)


@cache
def installed(group: str) -> dict[str, str]:
    """Return the references that installed packages register as entry points of a group, by name.

    The names are in lower case, with `_` for `-`, like all names of this program.
    """
    points = sorted(entry_points(group=group), key=lambda point: point.value)
    return {point.name.lower().replace("-", "_"): f"{point.module}:{point.attr or ''}" for point in points}


def split(reference: str) -> tuple[str, str]:
    """Return the source, a file or a module, and the name of the object in it; empty for a whole file."""
    if reference.endswith(".py"):
        return reference, ""
    source, _, name = reference.rpartition(":")
    return source, name


def located(reference: str, folder: Path) -> str:
    """Return the reference with its file as an absolute path; a relative one counts from `folder`."""
    source, name = split(reference)
    if not source.endswith(".py"):
        return reference
    path = str(folder / expanded(source))
    return f"{path}:{name}" if name else path


def relocated(reference: str, folder: Path) -> str:
    """Return the reference with its file looked for by name in another folder, if it is there."""
    source, name = split(reference)
    moved = folder / Path(source).name
    if not source.endswith(".py") or not moved.is_file():
        return reference
    return f"{moved}:{name}" if name else str(moved)


def label(reference: str) -> str:
    """Return the short name of an object, without its file; that of a file without `.py`.

    Any other name is returned unchanged.
    """
    source, name = split(reference)
    return name or Path(source).stem


def path(reference: str) -> Path:
    """Return the reference's file.

    Raises:
        CodeError: it is not a file or an importable module.
    """
    source, _ = split(reference)
    if source.endswith(".py"):
        return Path(source)
    spec = _find_spec(source)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        problem = f"there is no module {source} in Python's path"
        raise CodeError(problem, "install its package, or write PATH/FILE.py:NAME")
    return Path(spec.origin)


def _find_spec(module: str) -> ModuleSpec | None:
    """Return where a module is; unlike Python's function this one does not run the packages around it."""
    spec, place = None, None
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        if number > 1 and place is None:
            return None
        name = ".".join(parts[:number])
        found = (finder.find_spec(name, place) for finder in sys.meta_path)
        spec = next((each for each in found if each), None)
        if spec is None:
            return None
        place = spec.submodule_search_locations
    return spec


def check(reference: str) -> None:
    """Check that a reference's file exists and defines the object, without running it.

    Raises:
        CodeError: the file is missing, is not Python or does not define the object.
    """
    source, name = split(reference)
    if source.endswith(".py") and not os.path.isfile(source):
        remedy = "check the path; for the files of a run: --run.code RUN_DIR/code, or code= in Python"
        raise CodeError(f"there is no file {source}", remedy)
    if not source or (not name.isidentifier() and name):
        problem = f"'{reference}' is not a reference to code"
        raise CodeError(problem, "write PATH/FILE.py:NAME or MODULE:NAME")
    tree = user_modules.parse(path(reference))
    names = _defined(tree)
    if name and name not in names and "*" not in names:
        listed = ", ".join(sorted(item for item in names if not item.startswith("_"))) or "nothing"
        problem = f"{path(reference)} does not define {name}"
        raise CodeError(problem, f"it defines {listed}")


def _defined(tree: ast.Module) -> set[str]:
    """Return the names that a module's statements bind at its top level, conditions and `try` included."""
    names: set[str] = set()
    for node in _top_level(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(item.asname or item.name).partition(".")[0] for item in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = (item for target in targets for item in ast.walk(target))
            names |= {item.id for item in named if isinstance(item, ast.Name)}
    return names


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _top_level(getattr(node, inner, []))
        if isinstance(node, ast.Try):
            yield from (item for handler in node.handlers for item in _top_level(handler.body))


# Running it


def load(reference: str, error_class: type[CodeError] = CodeError) -> Any:
    """Return the object of a reference, or the module of a whole file; its code runs at most once.

    A file may import modules beside it.

    Raises:
        CodeError: of class `error_class`: the code raised an exception, or does not define the object.
    """
    source, name = split(reference)
    file = path(reference)
    try:
        module = user_modules.run(file) if source.endswith(".py") else importlib.import_module(source)
    except CodeError:
        raise
    except OSError as error:
        raise error_class.at(file, None, error.strerror or error) from error
    except (Exception, SystemExit) as error:
        raise error_class.of(file, error) from error
    if name and not hasattr(module, name):
        raise error_class.at(file, None, f"it does not define {name}")
    return getattr(module, name) if name else module


def forget_changed(references: Iterable[str]) -> None:
    """Let files that changed since they ran run again when they are next loaded."""
    for reference in references:
        source, _ = split(reference)
        if source.endswith(".py"):
            user_modules.forget_changed(Path(source))


# What a run records


def sources(references: Iterable[str]) -> dict[str, str]:
    """Return the text of every file that these references consist of, by its path in its folder or package.

    Besides the files themselves these are the modules beside them, or of their package, that they import.

    Raises:
        CodeError: a file cannot be read or is not UTF-8, its name cannot be printed, or two have one name.
    """
    texts: dict[str, str] = {}
    places: dict[str, Path] = {}
    for reference in references:
        source, _ = split(reference)
        file = path(reference)
        depth = 0 if source.endswith(".py") else source.count(".") + (file.name == "__init__.py")
        root = file.parents[depth]
        package = "" if source.endswith(".py") else source.partition(".")[0]
        for each in user_modules.closure(file, root, package):
            name = each.relative_to(root).as_posix()
            if not name.isprintable():
                raise CodeError(f"the name of the file {each!a} cannot be printed", "rename it")
            if places.setdefault(name, each).resolve() != each.resolve():
                problem = f"two files of your own are called {name}: {places[name]} and {each}"
                raise CodeError(problem, "rename one of them")
            try:
                texts[name] = each.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CodeError(f"{each} is not text in UTF-8", "save it in UTF-8") from error
    return dict(sorted(texts.items()))


def digests(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the names of the files in a record of `sources`, each with the SHA-256 of its text in UTF-8."""
    return [(name, sha256(text.encode()).hexdigest()) for name, text in texts.items()]


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the lines that changed between two records of `sources`, at most 40; empty if none did."""
    from difflib import unified_diff  # only needed after a change

    lines: list[str] = []
    for name in sorted({*before, *now}):
        old, new = (texts.get(name, "").splitlines() for texts in (before, now))
        lines += unified_diff(old, new, f"{name} (recorded)", f"{name} (now)", lineterm="", n=1)
    if len(lines) > MOST_DIFFERENCES:
        lines = [*lines[:MOST_DIFFERENCES], f"… and {len(lines) - MOST_DIFFERENCES} more lines"]
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    """Return a line of a file for a terminal, at most 200 characters, without control characters."""
    shown = line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"
    escaped = (
        each if each.isprintable() or each == "\t" else each.encode("unicode_escape").decode()
        for each in shown
    )
    return "".join(escaped)
