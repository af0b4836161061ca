"""Untrusted HDF5 data files: links, bombs, claims and odd types are refused before memory is taken.

Every file is read by a process with 300 MiB to spare: taking more memory would end it.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from support.data_files import open_data
from support.limited_memory import read_messages

Edit = Callable[[Any], object]

X, Y = np.zeros((6, 1, 4, 4), np.uint8), np.arange(6) % 2


def data(**parts: Any) -> Edit:
    """x and y, replaced or joined by others: values, links, or options of a dataset."""

    def make(file: Any) -> None:
        for name, part in {"x": X, "y": Y, **parts}.items():
            if isinstance(part, dict):
                file.create_dataset(name, **part)
            else:
                file[name] = part

    return make


def elsewhere(file: Any) -> None:
    layout = h5py.VirtualLayout(X.shape, X.dtype)
    layout[:] = h5py.VirtualSource("other.h5", "x", X.shape)
    file.create_virtual_dataset("x", layout)
    file["y"] = Y


def filtered(*filters: str) -> Edit:
    def make(file: Any) -> None:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((6, 1, 4, 4))
        for name in filters:
            getattr(plan, f"set_{name}")(*([9] if name == "deflate" else [2, 0] if "scale" in name else []))
        space = h5py.h5s.create_simple(X.shape)
        h5py.Dataset(h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_UINT8, space, plan))[()] = X
        file["y"] = Y

    return make


def zeros(length: int) -> bytes:
    """So many zeros as gzip packs them."""
    packer = zlib.compressobj(1)
    piece = bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(length >> 20)) + packer.flush()


def bomb(name: str) -> Edit:
    """A chunk of a mebibyte that unpacks to half a gibibyte."""

    def make(file: Any) -> None:
        rows = 1 << 16
        shape, kind = ((rows, 16), "u1") if name == "x" else ((rows,), "i8")
        packed = file.create_dataset(name, shape, kind, chunks=shape, compression="gzip")
        packed.id.write_direct_chunk((0,) * len(shape), zeros(512 << 20))
        if name == "y":
            file["x"] = np.zeros((rows, 16), np.uint8)
        else:
            file["y"] = np.arange(rows) % 2

    return make


def grown(file: Any) -> None:
    """Four megabytes that are four gigabytes."""
    x = file.create_dataset("x", (256, 1 << 24), "u1", chunks=(1, 1 << 24), compression="gzip")
    piece = zeros(1 << 24)
    for number in range(256):
        x.id.write_direct_chunk((number, 0), piece)
    file["y"] = np.arange(256) % 2


VLEN = h5py.vlen_dtype(np.int32)
DATA: dict[str, tuple[str, Edit]] = {
    "soft link": ("x is a link", data(x=h5py.SoftLink("/y"))),
    "soft loop": ("x is a link", data(x=h5py.SoftLink("/x"))),
    "external link": ("y is a link", data(y=h5py.ExternalLink("other.h5", "/y"))),
    "linked clients": ("client is a link", data(client=h5py.SoftLink("/client"))),
    "linked names": ("class_names is a link", data(class_names=h5py.ExternalLink("a.h5", "/y"))),
    "external storage": (
        "x is stored in external files",
        data(x={"shape": X.shape, "dtype": "u1", "external": [("/etc/passwd", 0, 96)]}),
    ),
    "virtual": ("x is a virtual dataset", elsewhere),
    "giant": ("x of .* claims", data(x={"shape": (1 << 40, 1, 4, 4), "dtype": "u1"})),
    "giant labels": ("y of .* claims", data(y={"shape": (1 << 40,), "dtype": "i8"})),
    "terabytes": (
        "x of .* claims 17,592,186,044,416 bytes(.|\n)*h5repack",
        data(x={"shape": (1 << 40, 16), "dtype": "u1", "chunks": (1 << 16, 16), "compression": "gzip"}),
    ),
    "gigabytes": ("x of .* claims 4,294,967,296 bytes", grown),
    "giant chunk": (
        "x of .* claims",
        data(x={"shape": X.shape, "dtype": "u1", "chunks": (1 << 28, 1, 4, 4), "maxshape": (None, 1, 4, 4)}),
    ),
    "chunk bomb": ("could unpack to more than its declared size", bomb("x")),
    "chunk bomb of labels": ("y of .* could unpack to more than its declared size", bomb("y")),
    "packed twice": (r"HDF5 filters \[1, 1\]", filtered("deflate", "deflate")),
    "another filter": (r"HDF5 filters \[6\]", filtered("scaleoffset")),
    "group": ("x is not a dataset", lambda file: file.create_group("x")),
    "null": ("x has no values", data(x=h5py.Empty("u1"))),
    "compound": ("x of .* is", data(x=np.zeros((6, 4), [("a", "f4")]))),
    "opaque": ("x of .* is", data(x=np.zeros((6, 4), "V8"))),
    "references": ("x of .* is object", data(x={"shape": (6, 4), "dtype": h5py.ref_dtype})),
    "texts": ("x of .* is object", data(x={"shape": (6, 4), "dtype": h5py.string_dtype()})),
    "labels of different length": ("y of .* is object", data(y={"shape": (6,), "dtype": VLEN})),
    "labels as references": ("y of .* is object", data(y={"shape": (6,), "dtype": h5py.ref_dtype})),
    "labels as structures": ("y of .* is", data(y=np.zeros(6, [("a", "i4")]))),
    "one label": (r"y has shape \(\)", data(y=3)),
    "clients as references": (
        "client of .* is object",
        data(client={"shape": (6,), "dtype": h5py.ref_dtype}),
    ),
    "names as references": (
        "class_names .* object",
        data(class_names={"shape": (2,), "dtype": h5py.ref_dtype}),
    ),
    "names of different length": ("class_names .* object", data(class_names={"shape": (2,), "dtype": VLEN})),
    "one name": ("class_names of", data(class_names="a")),
    "a million names": ("class_names of", data(class_names=np.full(1_000_000, b"a"))),
    "names of bytes": ("cannot be read|not UTF-8", data(class_names=np.array([b"\xff", b"\xfe"]))),
}
ATTRIBUTES: dict[str, tuple[str, Any]] = {
    "name as reference": ("attribute 'name' is neither", {"name": lambda file: file.ref}),
    "name of bytes": ("attribute 'name' is not UTF-8", {"name": np.bytes_(b"\xff")}),
    "long name": ("attribute 'name' is longer", {"name": np.bytes_(b"a" * 70_000)}),
    "mean as references": ("attribute 'mean' is neither", {"mean": lambda file: file.ref}),
    "mean as text": ("cannot be read", {"mean": "half"}),
    "long mean": ("attribute 'mean' is longer", {"mean": np.zeros(1000)}),
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is said of each of DATA and ATTRIBUTES, and of a good file."""
    folder = tmp_path_factory.mktemp("data")

    def described(attributes: Any) -> Edit:
        def make(file: Any) -> None:
            data()(file)
            for name, value in attributes.items():
                file.attrs[name] = value(file) if callable(value) else value

        return make

    makers = {name: make for name, (_, make) in DATA.items()}
    makers |= {name: described(attributes) for name, (_, attributes) in ATTRIBUTES.items()}
    makers["good"] = data(class_names=["a", "b"], client=Y, official_test=Y)
    paths = {name: folder / f"{name}.h5" for name in [*makers, "shared name"]}
    for name, make in makers.items():
        with h5py.File(paths[name], "w", libver="latest") as file:
            make(file)
    shared_name(paths["shared name"])
    messages = read_messages("hdf5", list(paths.values()))
    return {name: messages[path] for name, path in paths.items()}


def shared_name(path: Path) -> None:
    """Sixty thousand class names that are one text of a megabyte."""
    with h5py.File(path, "w") as file:
        data()(file)
        names = file.create_dataset("class_names", (60_000,), h5py.string_dtype())
        names[0], names[1] = "a" * (1 << 20), "b"
        place = names.id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[place : place + 16 * 60_000] = raw[place : place + 16] * 60_000
    path.write_bytes(raw)


@pytest.mark.parametrize("name", [*DATA, *ATTRIBUTES])
def test_crafted_data_file_is_refused(messages: dict[str, str], name: str) -> None:
    pattern = {**DATA, **ATTRIBUTES}[name][0]
    assert re.search(pattern, messages[name]), messages[name]
    assert f"{name}.h5" in messages[name] and "remedy: " in messages[name]


def test_class_names_sharing_one_long_text_are_refused(messages: dict[str, str]) -> None:
    assert "is longer than 1048576 characters" in messages["shared name"]


def test_good_data_file_is_read(messages: dict[str, str]) -> None:
    assert not messages["good"]


def test_endless_heaps_are_refused(tmp_path: Path) -> None:
    """The second object of the heap that holds the class names has an impossible length."""
    good = tmp_path / "good.h5"
    with h5py.File(good, "w") as file:
        data(class_names=["a", "b"])(file)
    whole = good.read_bytes()
    place, paths = whole.index(b"GCOL") + 16 + 24, []
    for number, length in [(0, 0), (0, 8), (0, 1 << 40), (1, (1 << 64) - 16), (1, 1 << 40)]:
        paths.append(tmp_path / f"{number}-{length}.h5")
        paths[-1].write_bytes(whole[:place] + struct.pack("<H6xQ", number, length) + whole[place + 16 :])
    messages = read_messages("hdf5", [good, *paths], timeout=20)
    assert not messages[good]
    for path in paths:
        assert re.search("its heap at byte [0-9]+ is damaged\n.*copy the file again", messages[path])


def test_heaps_of_every_kind_are_read_to_their_end(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for libver in ("earliest", "latest"):
        path = tmp_path / f"{libver}.h5"
        names = ["x" * int(n) for n in draw.integers(0, 9000, 300)]
        with h5py.File(path, "w", libver=libver) as file:
            data(y=np.arange(6) % 2)(file)
            texts = file.create_dataset("texts", data=names, dtype=h5py.string_dtype())
            texts[::3] = "y" * 5000
            file.attrs["name"] = "named"
        with h5py.File(path, "r+") as file:
            del file["texts"]
            file["more"] = ["z" * 100_000, ""]
        assert open_data("hdf5", path).name == "named"


# npz


def archive(folder: Path, **members: bytes) -> Path:
    """A client's archive of these members, packed."""
    (folder / "train").mkdir(parents=True)
    with zipfile.ZipFile(folder / "train" / "0.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for name, raw in members.items():
            made.writestr(f"{name}.npy", raw)
    return folder


def array(shape: tuple[int, ...], kind: str, raw: bytes) -> bytes:
    """An array's file, whatever its head says of it."""
    stream = io.BytesIO()
    head: Any = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, head)
    return stream.getvalue() + raw


def test_archives_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    y, unread = array((6,), "<i8", (np.arange(6) % 2).tobytes()), "x of .* cannot be read as an array"
    nested = b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535
    cases = {
        "bomb": ("claims 134,", {"x": array((1 << 27,), "|u1", bytes(1 << 27)), "y": y}),
        "giant": (unread, {"x": array((1 << 40, 4), "|u1", bytes(99)), "y": y}),
        "large": (r"uint8 \(536870912, 1\) in 1 bytes", {"x": array((1 << 29, 1), "|u1", b"1"), "y": y}),
        "nested": (unread, {"x": nested, "y": y}),
        "good": ("^$", {"x": array((6, 4), "|u1", bytes(24)), "y": y}),
    }
    paths = {name: archive(tmp_path / name, **members) for name, (_, members) in cases.items()}
    messages = read_messages("npz", list(paths.values()))
    for name, (pattern, _) in cases.items():
        assert re.search(pattern, messages[paths[name]]), messages[paths[name]]
        assert name == "good" or "remedy: " in messages[paths[name]]
