"""Code of the user's own: an object such as `./nets.py:TinyViT` or `mypackage.nets:TinyViT`, or a whole file.

A reference is a text: a Python file or an importable module, and after a colon the name of an object in it.
It is checked by reading the source; the code runs when the object is first needed. `sources` returns all
files that it consists of, which a run records.
"""

from __future__ import annotations

import ast
import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from difflib import unified_diff
from functools import cache
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pfedmoe_mpi.errors import ConfigError

OURS = __name__.partition(".")[0]
NEVER_BESIDE = {OURS, *sys.stdlib_module_names}  # modules that a file beside cannot replace
MOST_DIFFERENCES = 40  # lines of a printed difference
Error = TypeVar("Error", bound="CodeError")


class CodeError(ConfigError):
    """A file of code that cannot be used; the message names the file and the line."""

    REMEDY = "correct this file"

    # Not __init__: ranks send each other errors, and unpickling calls __init__ with the message alone.
    @classmethod
    def at(cls: type[Error], path: Path, line: int | None, reason: object) -> Error:
        """Return the error about one line of a file, or about the whole file."""
        place = f"{path}:{line}" if line else str(path)
        first = str(reason).strip().partition("\n")[0].rstrip(":")
        return cls(f"{place}: {first}", cls.REMEDY)

    @classmethod
    def of(cls: type[Error], path: Path, error: BaseException) -> Error:
        """Return the error about an exception that code of this file raised, with the last line it passed."""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls.at(path, last_line(error, path), reason)


def last_line(error: BaseException, path: Path) -> int | None:
    """Return the last line of a file that an error passed through."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)


def is_reference(text: str) -> bool:
    """Return whether a name is a reference to an object or a file, and not a name of this program."""
    return ":" in text or text.endswith(".py")


@cache
def installed(group: str) -> dict[str, str]:
    """Return the references that installed packages register as entry points of a group, by name."""
    points = entry_points(group=group)
    return {point.name: point.value if ":" in point.value else f"{point.value}:" for point in points}


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
    path = str(folder / Path(source).expanduser())
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
        ConfigError: it is not a file or an importable module.
    """
    source, _ = split(reference)
    if source.endswith(".py"):
        return Path(source)
    spec = None
    try:
        spec = find_spec(source)
    except Exception as error:  # a module runs its package's own code
        problem = f"the module {source} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(problem, "check the name, or write PATH/FILE.py:NAME") from error
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        problem = f"there is no module {source} in Python's path"
        raise ConfigError(problem, "install its package, or write PATH/FILE.py:NAME")
    return Path(spec.origin)


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


def check(reference: str) -> None:
    """Check that a reference's file exists and defines the object, without running it.

    Raises:
        ConfigError: the file is missing, is not Python or does not define the object.
    """
    source, name = split(reference)
    if source.endswith(".py") and not Path(source).is_file():
        remedy = "check the path; for the files of a run: --run.code RUN_DIR/code"
        raise ConfigError(f"there is no file {source}", remedy)
    if not source or (not name.isidentifier() and name):
        problem = f"'{reference}' is not a reference to code"
        raise ConfigError(problem, "write PATH/FILE.py:NAME or MODULE:NAME")
    tree = parse(path(reference))
    names = _defined(tree)
    if name and name not in names and "*" not in names:
        listed = ", ".join(sorted(item for item in names if not item.startswith("_"))) or "nothing"
        problem = f"{path(reference)} does not define {name}"
        raise ConfigError(problem, f"it defines {listed}")


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

    A file may import modules beside it. A file that was changed since it ran runs again.

    Raises:
        CodeError: of class `error_class`: the code raised an exception, or does not define the object.
    """
    source, name = split(reference)
    file = path(reference)
    try:
        module = _run_file(file) if source.endswith(".py") else importlib.import_module(source)
    except OSError as error:
        raise error_class.at(file, None, error.strerror or error) from error
    except (Exception, SystemExit) as error:
        raise error_class.of(file, error) from error
    if name and not hasattr(module, name):
        raise error_class.at(file, None, f"it does not define {name}")
    return getattr(module, name) if name else module


def _run_file(file: Path) -> ModuleType:
    """Return the module of a file, from `sys.modules` if it ran before with the same text.

    The modules beside it that it imports are run again, too, if one of them changed.
    """
    folder = file.parent
    closure = _closure(file, folder, "")
    texts = b"".join(str(each).encode() + b"\0" + each.read_bytes() for each in closure)
    name = f"{file.stem}_{sha256(texts).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    beside = {_dotted(each, folder): each for each in closure}
    if any(_is_other(sys.modules[each], place) for each, place in beside.items() if each in sys.modules):
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
    if _imports_itself(file, closure):
        sys.modules[file.stem] = module  # a circular import gets this module, and not a second one
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for each in (name, *beside):
            sys.modules.pop(each, None)
        raise
    return module


def _is_other(module: ModuleType, file: Path) -> bool:
    """Return whether a module was imported from another file, or from another text of this file."""
    loader = getattr(module, "__loader__", None)
    return not isinstance(loader, _Source) or (loader.path, loader.text) != (str(file), file.read_bytes())


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


# What a run records


def sources(references: Iterable[str]) -> dict[str, str]:
    """Return the text of every file that these references consist of, by its path in its folder or package.

    Besides the files themselves these are the modules beside them, or of their package, that they import.

    Raises:
        ConfigError: a file cannot be read or is not UTF-8, or two have one name.
    """
    texts: dict[str, str] = {}
    places: dict[str, Path] = {}
    for reference in references:
        source, _ = split(reference)
        file = path(reference)
        depth = 0 if source.endswith(".py") else source.count(".") + (file.name == "__init__.py")
        root = file.parents[depth]
        package = "" if source.endswith(".py") else source.partition(".")[0]
        for each in _closure(file, root, package):
            name = each.relative_to(root).as_posix()
            if places.setdefault(name, each).resolve() != each.resolve():
                problem = f"two files of your own are called {name}: {places[name]} and {each}"
                raise ConfigError(problem, "rename one of them")
            try:
                texts[name] = each.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{each} is not text in UTF-8", "save it in UTF-8") from error
    return dict(sorted(texts.items()))


def _closure(file: Path, root: Path, package: str) -> list[Path]:
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


def _imports_itself(file: Path, closure: Iterable[Path]) -> bool:
    """Return whether a file is imported by one of the files that it consists of."""
    return any(file.stem in _imports_of(each, file.parent) for each in closure)


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


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the lines that changed between two records of `sources`, at most 40; empty if none did."""
    lines: list[str] = []
    for name in sorted({*before, *now}):
        old, new = (texts.get(name, "").splitlines() for texts in (before, now))
        lines += unified_diff(old, new, f"{name} (recorded)", f"{name} (now)", lineterm="", n=1)
    if len(lines) > MOST_DIFFERENCES:
        lines = [*lines[:MOST_DIFFERENCES], f"… and {len(lines) - MOST_DIFFERENCES} more lines"]
    return "\n".join(lines)
