"""Which methods exist, read from the folder of `algorithms`: a file's name is the method's name.

Names, first docstring lines and `Options` are read from the source without importing it, so that `--help`
and the check of a configuration need neither torch nor MPI. A file that cannot be used is a `MethodError` for
whoever asks for that method, and does not affect any other.
"""

from __future__ import annotations

import ast
import pkgutil
import traceback
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pfedmoe_mpi.errors import ConfigError

PACKAGE = "pfedmoe_mpi.algorithms"
CONTRACT = "base"  # the one file there that is not a method, beside those that begin with an underscore


class MethodError(ConfigError):
    """A method's file that cannot be used; the message names the file and the line."""

    # Not __init__: ranks send each other errors, and unpickling calls __init__ with the message alone.
    @classmethod
    def at(cls, path: Path, line: int | None, reason: object) -> MethodError:
        """Return the error about one line of a file, or about the whole file."""
        place = f"{path}:{line}" if line else str(path)
        first = str(reason).strip().partition("\n")[0].rstrip(":")
        return cls(f"{place}: {first}", "fix this file, or choose another --algorithm")


def _folders() -> list[str]:
    """Return the folders of the methods' files, without importing any."""
    spec = find_spec(PACKAGE)
    assert spec and spec.submodule_search_locations is not None
    return spec.submodule_search_locations


def names() -> tuple[str, ...]:
    """Return every method's name, sorted; also of those whose file cannot be used."""
    files = (file.name for file in pkgutil.iter_modules(_folders()))
    return tuple(sorted(name for name in files if name != CONTRACT and not name.startswith("_")))


def path(name: str) -> Path:
    """Return the method's file."""
    candidates = [
        candidate
        for folder in _folders()
        for candidate in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py"))
    ]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


@cache
def _source(name: str) -> ast.Module:
    """Return the method's parsed source.

    Raises:
        MethodError: the file cannot be read, or is not Python.
    """
    file = path(name)
    try:
        return ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        raise MethodError.at(file, error.lineno, error.msg) from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MethodError.at(file, None, reason) from error


def summary(name: str) -> str:
    """Return the first line of the method's docstring, or why its file cannot be used."""
    try:
        return (ast.get_docstring(_source(name)) or "").partition("\n")[0]
    except MethodError as error:
        return f"cannot be used: {error.problem}"


@cache
def options(name: str, section: type) -> Any:
    """Return the method's class `Options`, an empty `section` if there is none.

    It is compiled alone, and may use `Section`, `Field`, `Annotated` and `Literal`. The string below a field
    is its help, as in `sections.py`.

    Raises:
        MethodError: the file or the class cannot be used.
    """
    file = path(name)
    for node in _source(name).body:
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            try:
                return _compiled(node, file, section)
            except (Exception, SystemExit) as error:  # neither must end a command for another method
                line = _line(error, file) or node.lineno
                raise MethodError.at(file, line, f"class Options: {_reason(error)}") from error
    return type("Options", (section,), {"__module__": __name__})


def _compiled(node: ast.ClassDef, file: Path, section: type) -> Any:
    from pydantic import Field

    scope: dict[str, Any] = {"Section": section, "Field": Field, "__name__": __name__}
    scope |= {"Annotated": Annotated, "Literal": Literal}
    exec(compile(ast.Module([node], []), str(file), "exec"), scope)
    made = scope["Options"]
    if not issubclass(made, section):
        raise TypeError("must be a Section")
    for item, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr):
            name = ast.unparse(item.target)
            if not isinstance(text.value, ast.Constant) or not isinstance(text.value.value, str):
                raise TypeError(f"the line below {name} is its help and must be a string")
            made.model_fields[name].description = text.value.value
    made.model_validate(made().model_dump())  # every setting needs a default that it accepts
    return made


def _line(error: BaseException, file: Path) -> int | None:
    """Return the last line of `file` that the error passed through."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)


def _reason(error: BaseException) -> str:
    """Return the error in one line; pydantic's without its heading."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
