"""A reader of pickles that constructs arrays only.

A pickle is a program. This reader runs it with its own classes in place of numpy's. They only record a
shape, a dtype and bytes, so a file cannot call a constructor of numpy or any function. All names are refused
except the few that numpy uses and plain containers.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from typing import Any

import numpy as np

from pfedmoe_mpi.errors import DataError, UserError

_RATIO = 4  # arrays may share bytes, but may not add up to more than _RATIO times the pickle's length
_REMEDY = "write the file again with numpy arrays in plain containers only"


class _Type:
    """A stand-in for the class numpy.ndarray."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("unexpected state")


class _Dtype:
    """A stand-in for numpy.dtype: plain numbers, booleans and objects."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[<>|=]?([biuf][1248]|O8?)", code):
            raise pickle.UnpicklingError(f"unsupported dtype {code}")
        self.value = np.dtype(code.replace("O8", "O"))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"unknown byte order {order!r}")
        self.value = self.value.newbyteorder(order)


class _Array:
    """A stand-in for an array: created empty, then filled from (version, shape, dtype, Fortran order, data).

    Data are bytes or a list. The bytes are not copied, because a small pickle can refer to the same bytes a
    million times.
    """

    def __init__(self, *_: Any) -> None:
        self.objects: list[Any] | None = None
        self.data: bytes | _Bytes = b""
        self._layout: tuple[Any, ...] = ((0,), np.dtype("u1"), False)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.value.hasobject:
            self.objects = data if isinstance(data, list) else []
        else:
            self._layout, self.data = (shape, dtype.value, fortran), data

    def array(self) -> np.ndarray:
        """Return the array itself."""
        shape, dtype, fortran = self._layout
        data = self.data.text.encode("latin1") if isinstance(self.data, _Bytes) else self.data
        flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
        return flat.astype(dtype.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")


class _Scalar:
    """A stand-in for numpy.core.multiarray.scalar, whose value is not used."""

    def __init__(self, *_: Any) -> None:
        pass

    __setstate__ = _Type.__setstate__


class _Bytes:
    """A stand-in for _codecs.encode and bytes, with which old pickle protocols write bytes."""

    def __init__(self, text: str = "", encoding: str = "latin1") -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self.text)

    __setstate__ = _Type.__setstate__


class _Reader(pickle.Unpickler):
    """An unpickler that knows stand-ins only."""

    def __init__(self, raw: bytes, where: str) -> None:
        super().__init__(io.BytesIO(raw))
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of an allowed name.

        Raises:
            DataError: any other name.
        """
        stand_in = _stand_in(module.replace("numpy._core", "numpy.core"), name)
        if stand_in is None:
            raise DataError(f"{self._where} holds a pickled {module}.{name}, which is not an array", _REMEDY)
        return stand_in


def _stand_in(module: str, name: str) -> type | None:
    return {
        "numpy.ndarray": _Type,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy.core.multiarray.scalar": _Scalar,
        "_codecs.encode": _Bytes,
        "__builtin__.bytes": _Bytes,
        "collections.OrderedDict": OrderedDict,
    }.get(f"{module}.{name}")


def read_arrays(raw: bytes, where: str) -> dict[str, np.ndarray]:
    """Return the arrays of the one dict in a pickled object array.

    `numpy.savez(file, data={...})` writes such an array.

    Raises:
        DataError: not such a pickle, or one that names anything except arrays and plain containers.
    """
    try:
        outer = _Reader(raw, where).load()
        content = outer.objects if isinstance(outer, _Array) else None
        table = content[0] if content and len(content) == 1 else None
        if not isinstance(table, dict):
            raise DataError(f"{where} holds a pickle that is not one dict of arrays", _REMEDY)
        arrays = {
            name: item
            for name, item in table.items()
            if isinstance(name, str) and isinstance(item, _Array) and item.objects is None
        }
        if sum(len(array.data) for array in arrays.values()) > _RATIO * len(raw):
            raise DataError(f"{where} holds a pickle that repeats the same bytes too often", _REMEDY)
        return {name: array.array() for name, array in arrays.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise DataError(f"{where} holds a pickle that cannot be read: {error}", _REMEDY) from error
