"""A method's source file: what it imports, and a new instance that remembers nothing."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

from pfedmoe_mpi.algorithms.base import Algorithm

OUTSIDE = {"mpi4py", "h5py", "socket", "subprocess", "multiprocessing", "ctypes", "os", "tempfile", "pickle"}


def fresh_method(method: Algorithm) -> Algorithm:
    """Return a new instance from the method's source, which remembers nothing."""
    spec = importlib.util.spec_from_file_location("fresh", inspect.getfile(type(method)))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Algorithm = getattr(module, type(method).__name__)(method.task)
    return made


def outside_imports(method: Algorithm) -> list[str]:
    """Return the modules that the method's file imports and that can send or keep values."""
    found = []
    for node in ast.walk(ast.parse(Path(inspect.getfile(type(method))).read_text(encoding="utf-8"))):
        names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [n for n in names if n.partition(".")[0] in OUTSIDE or n.startswith("pfedmoe_mpi.mpi")]
    return found
