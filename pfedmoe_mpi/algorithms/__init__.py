"""The methods, one file each, named like the method. `base` is their contract."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from pfedmoe_mpi import user_code
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.config.methods import MethodError

if TYPE_CHECKING:
    from pfedmoe_mpi.algorithms.base import Algorithm


def load(algorithm: str) -> type[Algorithm]:
    """Import a method's file and return its subclass of `Algorithm`.

    Args:
        algorithm: a method's name, or the path of a file.

    Raises:
        MethodError: the file raised an exception, or does not define exactly one `Algorithm`.
    """
    from pfedmoe_mpi.algorithms.base import Algorithm

    file, reference = methods.path(algorithm), methods.reference(algorithm)
    try:
        module = (
            user_code.load(reference, MethodError)
            if reference
            else importlib.import_module(f"{__name__}.{algorithm}")
        )
    except MethodError:
        raise
    except (Exception, SystemExit) as error:
        raise MethodError.of(file, error) from error
    if isinstance(module, type) and issubclass(module, Algorithm):
        return module  # an entry point names the class
    found = [
        item
        for item in (vars(module).values() if isinstance(module, ModuleType) else ())
        if isinstance(item, type) and issubclass(item, Algorithm) and item.__module__ == module.__name__
    ]
    if len(found) != 1:
        listed = ", ".join(item.__name__ for item in found) or "none"
        raise MethodError.at(
            file, None, f"a method's file defines one subclass of Algorithm, this one {listed}"
        )
    return found[0]
