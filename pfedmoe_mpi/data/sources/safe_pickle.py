"""Arrays out of a pickle, and nothing else.

A pickle is a program. This reader runs it with classes of its own in place of numpy's: they only take notes
(a shape, a dtype, bytes), so that a file can reach no constructor of numpy and no function at all. Any name
beside numpy's few and plain containers is refused.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from typing import Any

import numpy as np

from pfedmoe_mpi.errors import DataError, UserError

_RATIO = 4  # arrays may share bytes, but not add up to more times the pickle's length
_REMEDY = "convert the file with the program that wrote it: numpy arrays in plain containers only"


class _Type:
    """Stands for numpy.ndarray where a pickle names the class."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where none belongs")


class _Dtype:
    """Stands for numpy.dtype: plain numbers, booleans and objects."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[<>|=]?([biuf][1248]|O8?)", code):
            raise pickle.UnpicklingError(f"an array of dtype {code}")
        self.value = np.dtype(code.replace("O8", "O"))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"a byte order {order!r}")
        self.value = self.value.newbyteorder(order)


class _Array:
    """Stands for an array: made empty, then given (version, shape, dtype, Fortran order, bytes or list).

    The bytes are kept as they came, maybe shared: a few of a pickle can name them a million times.
    """

    def __init__(self, *_: Any) -> None:
        self.objects: list[Any] | None = None
        self.data: bytes | _Bytes = b""
        self._made: tuple[Any, ...] = ((0,), np.dtype("u1"), False)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.value.hasobject:
            self.objects = data if isinstance(data, list) else []
        else:
            self._made, self.data = (shape, dtype.value, fortran), data

    def array(self) -> np.ndarray:
        shape, dtype, fortran = self._made
        data = self.data.text.encode("latin1") if isinstance(self.data, _Bytes) else self.data
        flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
        return flat.astype(dtype.newbyteorder("=")).reshape(shape, order="F" if fortran else "C")


class _Scalar:
    """Stands for numpy.core.multiarray.scalar, which no data are made of."""

    def __init__(self, *_: Any) -> None:
        pass

    __setstate__ = _Type.__setstate__


class _Bytes:
    """Stands for _codecs.encode and bytes, by which old pickle protocols write bytes."""

    def __init__(self, text: str = "", encoding: str = "latin1") -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self.text)

    __setstate__ = _Type.__setstate__


class _Reader(pickle.Unpickler):
    def __init__(self, raw: bytes, where: str) -> None:
        super().__init__(io.BytesIO(raw))
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of an admitted name."""
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
    """The arrays of the one dict in a pickled object array, as `numpy.savez(file, data={...})` writes it.

    Raises:
        DataError: not such a pickle, or one that names anything but arrays and plain containers.
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
            raise DataError(f"{where} holds a pickle that names the same bytes again and again", _REMEDY)
        return {name: array.array() for name, array in arrays.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise DataError(f"{where} holds a pickle that cannot be read: {error}", _REMEDY) from error
