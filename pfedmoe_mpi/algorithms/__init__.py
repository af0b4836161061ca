"""The methods, one file each; a file's name is the method's name.

Names, first docstring lines and `Options` are read from the source without importing it, so that `--help`
and the check of a configuration need neither torch nor MPI.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from pfedmoe_mpi.algorithms.base import Algorithm

CONTRACT = "base"  # the one file here that is no method


def names() -> tuple[str, ...]:
    """Every method there is, sorted."""
    return tuple(sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != CONTRACT))


@cache
def _source(name: str) -> ast.Module:
    for folder in __path__:
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


def load(name: str) -> type[Algorithm]:
    """Import a method's file and return its `Algorithm`."""
    from pfedmoe_mpi.algorithms.base import Algorithm

    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Algorithm) and item.__module__ == module.__name__
    ]
    assert len(found) == 1, f"algorithms/{name}.py must define one Algorithm, not {len(found)}"
    return found[0]
