"""Which methods exist, and their options: a file in `algorithms`, in an installed package, or of the user.

The value of `algorithm` is the name of a file in `algorithms`, a name that an installed package registers in
the entry points `pfedmoe_mpi.algorithms`, or the path of a file, whose name without `.py` is the method's
name. Names, first docstring lines and `Options` are read from the source without importing it, so that
`--help` and the check of a configuration need neither torch nor MPI. A file that cannot be used is a
`MethodError` for whoever asks for that method, and does not affect any other.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pfedmoe_mpi import user_code, user_modules
from pfedmoe_mpi.errors import CodeError, ConfigError, last_line, nearest

PACKAGE = "pfedmoe_mpi.algorithms"  # also the group of entry points
CONTRACT = "base"  # the one file there that is not a method, beside those that begin with an underscore


class MethodError(CodeError):
    """A method's file that cannot be used; the message names the file and the line."""

    REMEDY = "fix this file, or choose another --algorithm"


def _folders() -> list[str]:
    """Return the folders of the methods' files, without importing any."""
    spec = find_spec(PACKAGE)
    assert spec and spec.submodule_search_locations is not None
    return spec.submodule_search_locations


def shipped() -> tuple[str, ...]:
    """Return the names of this program's methods, sorted; also of those whose file cannot be used."""
    files = (file.name for file in pkgutil.iter_modules(_folders()))
    return tuple(sorted(name for name in files if name != CONTRACT and not name.startswith("_")))


def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted: this program's, and those of installed packages."""
    return tuple(sorted({*shipped(), *user_code.installed(PACKAGE)}))


def name(algorithm: str) -> str:
    """Return the name of a method, which is also that of its section; of a file its name without `.py`."""
    return user_code.label(algorithm)


def reference(algorithm: str) -> str:
    """Return a reference to the user's or an installed package's code; empty for a method of this program."""
    if user_code.is_reference(algorithm):
        return algorithm
    return "" if algorithm in shipped() else user_code.installed(PACKAGE).get(algorithm, "")


def check(algorithm: str) -> None:
    """Check that there is such a method, without running its file.

    Raises:
        ConfigError: there is none, or a file has a name that a method's file cannot have.
    """
    if not user_code.is_reference(algorithm):
        if algorithm not in names():
            remedy = file_remedy(algorithm)
            meant = "" if remedy else nearest(algorithm, names())
            remedy = remedy or f"use one of {', '.join(names())}, or the path of a method's file"
            raise ConfigError(f"there is no algorithm '{algorithm}'{meant}", remedy)
        return
    if not algorithm.endswith(".py"):
        raise ConfigError(f"algorithm = {algorithm} is not a file", "write PATH/METHOD.py without a colon")
    user_code.check(algorithm)
    chosen = name(algorithm)
    if not chosen.isidentifier() or chosen != chosen.lower():
        raise MethodError.at(
            path(algorithm), None, f"'{chosen}' cannot be the name of settings: use a-z, 0-9, _"
        )
    if chosen in names():
        raise MethodError.at(
            path(algorithm), None, f"'{chosen}' is the name of another method; rename the file"
        )


def file_remedy(word: str) -> str:
    """Return what to write if `word.py` is a file of the working folder, else nothing."""
    return f"use --algorithm {word}.py, for the file in this folder" if isfile(f"{word}.py") else ""


def path(algorithm: str) -> Path:
    """Return the method's file."""
    other = reference(algorithm)
    if other:
        return user_code.path(other)
    candidates = [
        candidate
        for folder in _folders()
        for candidate in (Path(folder, f"{algorithm}.py"), Path(folder, algorithm, "__init__.py"))
    ]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


@cache
def _source(algorithm: str) -> ast.Module:
    """Return the method's parsed source.

    Raises:
        MethodError: the file cannot be read, or is not Python.
    """
    return user_modules.parse(path(algorithm), MethodError)


def summary(algorithm: str) -> str:
    """Return the first line of the method's docstring, or why its file cannot be used."""
    try:
        return (ast.get_docstring(_source(algorithm)) or "").partition("\n")[0]
    except ConfigError as error:
        return f"cannot be used: {error.problem}"


@cache
def options(algorithm: str, section: type) -> Any:
    """Return the method's class `Options`, an empty `section` if there is none.

    It is compiled alone, and may use `Section`, `Field`, `Annotated` and `Literal`, and the options of a
    method of this program if the file imports them: `from pfedmoe_mpi.algorithms.fedprox import Options`.
    The string below a field is its help, as in `sections.py`.

    Raises:
        MethodError: the file or the class cannot be used.
    """
    file = path(algorithm)
    imported: dict[str, Any] = {}
    for node in _source(algorithm).body:
        if isinstance(node, ast.ImportFrom):
            package, _, other = (node.module or "").rpartition(".")
            for item in node.names if package == PACKAGE and other != algorithm else ():
                if item.name == "Options":
                    imported[item.asname or item.name] = options(other, section)
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            try:
                return _compiled(node, file, section, imported)
            except (Exception, SystemExit) as error:  # neither must end a command for another method
                line = last_line(error, file) or node.lineno
                raise MethodError.at(file, line, f"class Options: {_reason(error)}") from error
    return imported.get("Options") or type("Options", (section,), {"__module__": __name__})


def _compiled(node: ast.ClassDef, file: Path, section: type, imported: Mapping[str, Any]) -> Any:
    from pydantic import Field

    for item in node.body:
        if isinstance(item, ast.AnnAssign) and hasattr(section, ast.unparse(item.target)):
            raise TypeError(f"{ast.unparse(item.target)} cannot be the name of a setting; choose another")
    scope: dict[str, Any] = {"Section": section, "Field": Field, "__name__": __name__}
    scope |= {"Annotated": Annotated, "Literal": Literal, **imported}
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


def _reason(error: BaseException) -> str:
    """Return the error in one line; pydantic's without its heading."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
