"""Which methods exist, read from the folder of `algorithms`: a file's name is the method's name.

Names, first docstring lines and `Options` are read from the source without importing it, so that `--help`
and the check of a configuration need neither torch nor MPI.
"""

from __future__ import annotations

import ast
import pkgutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

PACKAGE = "pfedmoe_mpi.algorithms"
CONTRACT = "base"  # the one file there that is not a method, beside those that begin with an underscore


def _folders() -> list[str]:
    """Return where the methods' files lie, without importing any."""
    spec = find_spec(PACKAGE)
    assert spec and spec.submodule_search_locations is not None
    return spec.submodule_search_locations


def names() -> tuple[str, ...]:
    """Return every method's name, sorted."""
    files = (file.name for file in pkgutil.iter_modules(_folders()))
    return tuple(sorted(name for name in files if name != CONTRACT and not name.startswith("_")))


@cache
def _source(name: str) -> ast.Module:
    for folder in _folders():
        for path in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
            if path.is_file():
                return ast.parse(path.read_text(), str(path))
    raise AssertionError(f"no source of algorithm {name}")


def summary(name: str) -> str:
    """First line of the method's docstring."""
    return (ast.get_docstring(_source(name)) or "").partition("\n")[0]


def options(name: str, section: type) -> Any:
    """The method's class `Options`, compiled alone: it may use `Section`, `Field`, `Annotated` and `Literal`.

    The string below a field is its help, as in `config.py`.
    """
    from pydantic import Field

    for node in _source(name).body:
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            scope: dict[str, Any] = {"Section": section, "Field": Field, "__name__": __name__}
            scope |= {"Annotated": Annotated, "Literal": Literal}
            exec(compile(ast.Module([node], []), name, "exec"), scope)
            for item, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr):
                    field = scope["Options"].model_fields[ast.unparse(item.target)]
                    field.description = ast.literal_eval(text.value)
            return scope["Options"]
    return type("Options", (section,), {"__module__": __name__})
