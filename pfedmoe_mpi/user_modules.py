"""The user's own Python files: what they import from beside them, and running them.

A file may import modules of its folder. These are found before modules of the same name elsewhere in
Python's path, but not before those of Python's library.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from pfedmoe_mpi.errors import CodeError

OURS = __name__.partition(".")[0]
NEVER_BESIDE = {OURS, *sys.stdlib_module_names}  # modules that a file beside cannot replace


def parse(path: Path, error_class: type[CodeError] = CodeError) -> ast.Module:
    """Return a file's parsed source.

    Raises:
        CodeError: of class `error_class`: the file cannot be read, or is not Python.
    """
    try:
        return ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise error_class.at(path, error.lineno, error.msg) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise error_class.at(path, None, reason) from error


def closure(file: Path, root: Path, package: str) -> list[Path]:
    """Return a file and the files below `root` that it imports, directly or not; only `package`'s if set."""
    found, waiting = [], [file]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.append(each)
            for name in _imports_of(each, root):
                top = name.partition(".")[0]
                if top == package or (not package and top not in NEVER_BESIDE):
                    waiting += _files(root, name)
    return found


def _imports_itself(file: Path, files: Iterable[Path]) -> bool:
    """Return whether a file is imported by one of the files that it consists of."""
    return any(file.stem in _imports_of(each, file.parent) for each in files)


def _imports_of(file: Path, root: Path) -> tuple[str, ...]:
    """Return the dotted names that a file below `root` may import."""
    try:
        return _imports_of_text(file.read_bytes(), file.parent.relative_to(root).parts)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return tuple(_imports(parse(file), ()))  # raises the error with its place


@cache
def _imports_of_text(text: bytes, folder: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_imports(ast.parse(text), folder))


def _imports(tree: ast.Module, folder: tuple[str, ...]) -> Iterator[str]:
    """Yield the dotted names that a file in `folder`, as seen from its root, may import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield base
            yield from (f"{base}.{item.name}" if base else item.name for item in node.names)


def _files(root: Path, name: str) -> list[Path]:
    """Return the files of a dotted name and of its packages below `root`."""
    parts = [part for part in name.split(".") if part]
    candidates = []
    for depth in range(1, len(parts) + 1):
        stem = root.joinpath(*parts[:depth])
        candidates += [stem.with_suffix(".py"), stem / "__init__.py"]
    return [candidate for candidate in candidates if candidate.is_file()]


# Running them


def forget_changed(file: Path) -> None:
    """Let a file run again when it is next needed, if it changed since it ran, or a module beside it."""
    name = _module_name(file)
    if name in sys.modules:
        others = closure(file, file.parent, "")[1:]
        if _changed({name: file, **{_dotted(each, file.parent): each for each in others}}):
            del sys.modules[name]


def _module_name(file: Path) -> str:
    return f"{file.stem}_{sha256(os.fsencode(file)).hexdigest()[:16]}"


def run(file: Path) -> ModuleType:
    """Return the module of a file, from `sys.modules` if it ran before."""
    name, folder = _module_name(file), file.parent
    if name in sys.modules:
        return sys.modules[name]
    files = closure(file, folder, "")
    beside = {_dotted(each, folder): each for each in files}
    if _changed(beside):
        for each in beside:
            for dots in range(each.count(".") + 1):
                sys.modules.pop(each.rsplit(".", dots)[0], None)
    finders = [finder for finder in sys.meta_path if isinstance(finder, _Beside) and finder.folder == folder]
    known = {each: place for finder in finders for each, place in finder.files.items()}
    others = [finder for finder in sys.meta_path if finder not in finders]
    sys.meta_path[:] = [_Beside(folder, {**known, **beside}), *others]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for what is imported by a computed name
    spec = spec_from_file_location(name, file, loader=_Source(name, str(file)))
    assert isinstance(spec, ModuleSpec) and spec.loader
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    if _imports_itself(file, files):
        sys.modules[file.stem] = module  # a circular import gets this module, and not a second one
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for each in (name, *beside):
            sys.modules.pop(each, None)
        raise
    return module


def _changed(files: Mapping[str, Path]) -> bool:
    """Return whether a module of these was imported from another file, or from another text of it."""
    for name, file in files.items():
        if name in sys.modules:
            loader = getattr(sys.modules[name], "__loader__", None)
            place = (loader.path, loader.text) if isinstance(loader, _Source) else None
            if place != (str(file), file.read_bytes()):
                return True
    return False


def _dotted(file: Path, folder: Path) -> str:
    """Return the name by which a file below a folder is imported from this folder."""
    parts = file.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _Source(SourceFileLoader):
    """Compiles the file as it is now: Python's cache misses a change within a second to a text as long."""

    text = b""  # of the file when it ran

    def get_code(self, fullname: str) -> Any:
        self.text = self.get_data(self.path)
        return self.source_to_code(self.text, self.path)


class _Beside(MetaPathFinder):
    """Finds the modules beside a file before those of the same names elsewhere in Python's path."""

    def __init__(self, folder: Path, files: Mapping[str, Path]) -> None:
        self.folder = folder
        self.files = files

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the module of this name; a folder without `__init__.py` is a package, too."""
        file = self.files.get(name)
        if file:
            places = [str(file.parent)] if file.name == "__init__.py" else None
            loader = _Source(name, str(file))
            return spec_from_file_location(name, file, loader=loader, submodule_search_locations=places)
        if not any(other.startswith(f"{name}.") for other in self.files):
            return None
        package = ModuleSpec(name, None, is_package=True)
        package.submodule_search_locations = [str(self.folder.joinpath(*name.split(".")))]
        return package
