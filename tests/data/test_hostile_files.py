"""No file's content is run: hostile pickles are given to every reader."""

from __future__ import annotations

import ast
import functools
import operator
import os
import pickle
import posixpath
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, weights
from pfedmoe_mpi.commands.inspect import digest
from pfedmoe_mpi.errors import CheckpointError, DataError, UserError
from support.checkpoint_checks import sample_content
from support.checkpoint_files import reseal, write_alone
from support.data_files import GOOD_X, GOOD_Y, client_arrays, open_data, write_h5
from support.limited_memory import read_messages

PACKAGE = Path(checkpoint.__file__).parents[1]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touched(mark: str) -> dict[str, bytes]:
    """Return pickles that create a file, each by another way into the interpreter."""
    touch, code = f"touch '{mark}'", f"open({mark!r}, 'w')"
    system = Call(getattr, Call(__import__, "os"), "system")
    found: dict[str, Any] = {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "Popen": Call(subprocess.Popen, ["touch", mark]),
        "open": Call(open, mark, "w"),
        "Path.touch": Call(Path.touch, Path(mark)),
        "getattr chain": Call(operator.call, system, touch),
        "partial": Call(operator.call, functools.partial(os.system, touch)),
        "methodcaller": Call(operator.call, operator.methodcaller("system", touch), Call(__import__, "os")),
        "by a list": [1, [2, {"three": (Call(os.system, touch),)}]],
        "as a key": {("a", Call(os.system, touch)): 1},
        "beside arrays": {**client_arrays(6), "z": Call(os.system, touch)},
        "in an array": np.array([None, Call(os.system, touch)], dtype=object),
        "numpy's loader": Call(np.fromfile, mark),
    }
    raw = {}
    for name, item in found.items():
        for protocol in (0, 2, 4):
            raw[f"{name}, protocol {protocol}"] = pickle.dumps(item, protocol)
    raw["old instance"] = f"(S'{touch}'\nios\nsystem\n.".encode()
    raw["object"] = f"(cos\nsystem\nS'{touch}'\no.".encode()
    raw["dotted"] = b"\x80\x04\x8c\x02os\x8c\x0bpath.sys.os\x93."
    raw["dotted numpy"] = b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x1bscalar.__init__.__globals__\x93."
    raw["extension"] = b"\x80\x02\x82\x01."
    raw["another class's state"] = b"\x80\x02cnumpy\ndtype\nN}\x8c\x0b__setstate__cos\nsystem\ns\x86b."
    return raw


def npz(folder: Path, raw: bytes, member: str = "data.npy") -> Path:
    """Write a client's archive whose only member is an object array of this pickle."""
    (folder / "train").mkdir(parents=True)
    with zipfile.ZipFile(folder / "train" / "0.npz", "w") as archive, archive.open(member, "w") as file:
        head = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, head)  # type: ignore[arg-type]
        file.write(raw)
    return folder


def in_dict(raw: bytes) -> bytes:
    """Return the pickle as a value, named `z`, of the dict that such archives hold."""
    body = raw[2:-1] if raw[:1] == b"\x80" else raw[:-1]
    return b"\x80\x04}\x8c\x01z" + body + b"s."


def test_hostile_pickles_do_run_when_unpickled(tmp_path: Path) -> None:
    """Loaded by pickle itself, the programs that should create the file do."""
    mark = tmp_path / "mark"
    ran = set()
    for name, raw in touched(str(mark)).items():
        try:
            held = pickle.loads(raw)
            if isinstance(held, subprocess.Popen):
                held.wait()
        except Exception:
            pass
        if mark.exists():
            ran.add(name.partition(",")[0])
            mark.unlink()
    assert ran >= {"os.system", "eval", "exec", "Popen", "open", "Path.touch", "getattr chain", "partial"}
    assert ran >= {
        "methodcaller",
        "by a list",
        "as a key",
        "beside arrays",
        "in an array",
        "old instance",
        "object",
    }


def test_pickles_in_archives_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for number, (name, raw) in enumerate(touched(str(mark)).items()):
        for way, whole in enumerate((raw, in_dict(raw))):
            with pytest.raises(DataError) as caught:
                open_data("npz", npz(tmp_path / f"{number}-{way}", whole))
            assert "remedy: " in str(caught.value), name
            assert not mark.exists(), f"{name} ran"


def test_archive_repeating_the_same_bytes_is_refused(tmp_path: Path) -> None:
    """Twenty thousand arrays share one mebibyte."""
    folder = npz(tmp_path / "many", _many(1 << 20, 20_000))
    message = read_messages("npz", [folder])[folder]
    assert "repeats the same bytes too often" in message and "remedy: " in message


def _many(length: int, times: int) -> bytes:
    """Return a pickled object array of one dict of arrays with the same bytes."""
    head = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n\x94cnumpy\nndarray\n\x94cnumpy\ndtype\n\x94"
    raw = b"\x8e" + length.to_bytes(8, "little") + bytes(length) + b"\x94"  # memo 3: the bytes
    plain = b"h\x02\x8c\x02u1\x89\x88\x87R\x94"  # memo 4: the dtype of bytes
    objects = b"h\x02\x8c\x02O8\x89\x88\x87R\x94"  # memo 5: that of objects
    made = b"h\x00h\x01K\x00\x85C\x01b\x87R"
    shape = b"J" + length.to_bytes(4, "little") + b"\x85"
    state = b"(K\x01" + shape + b"h\x04\x89h\x03tb"
    entries = b"".join(
        b"X" + len(str(n)).to_bytes(4, "little") + str(n).encode() + made + state + b"s" for n in range(times)
    )
    return head + raw + plain + objects + made + b"(K\x01)h\x05\x89]}" + entries + b"atb."


def saved(mark: Path) -> Iterator[tuple[str, bytes]]:
    """Return whole files: torch.save's old and new formats, and a plain pickle."""
    program = Call(os.system, f"touch '{mark}'")
    folder = mark.parent / "saved"
    folder.mkdir(exist_ok=True)
    for new in (True, False):
        torch.save({"state": program}, folder / "x.pt", _use_new_zipfile_serialization=new)
        yield f"torch.save, new {new}", (folder / "x.pt").read_bytes()
    yield "pickle", pickle.dumps(program)


def readers(folder: Path) -> dict[str, Callable[[bytes], object]]:
    """Return every reader of a user's file, as a function of the file's bytes."""

    def stored(name: str, raw: bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        return path

    def picture(raw: bytes) -> object:
        for name in ("a", "b"):
            stored(f"pictures/{name}/0.png", raw)
        return open_data("folder", folder / "pictures").rows(np.arange(2))

    def cifar(raw: bytes) -> object:
        for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
            stored(f"cifar/cifar-10-batches-py/{name}", raw)
        return open_data("torchvision", folder / "cifar", name="CIFAR10")

    def svhn(raw: bytes) -> object:
        stored("svhn/train_32x32.mat", raw)
        return open_data("torchvision", folder / "svhn", name="SVHN")

    return {
        "checkpoint": lambda raw: checkpoint.verify(stored("round-000001.h5", raw)),
        "unverified checkpoint": lambda raw: Checkpoint(stored("round-000001.h5", raw)),
        "hdf5": lambda raw: open_data("hdf5", stored("x.h5", raw)),
        "npz": lambda raw: open_data("npz", stored("npz/train/0.npz", raw).parents[1]),
        "folder": picture,
        "CIFAR": cifar,
        "SVHN": svhn,
        "weights": lambda raw: weights.read(stored("weights.pth", raw), ("model",)),
    }


def test_files_that_are_pickles_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for kind, raw in saved(mark):
        for name, read in readers(tmp_path).items():
            with pytest.raises(UserError) as caught:
                read(raw)
            assert "remedy: " in str(caught.value), f"{kind}, {name}"
            assert not mark.exists(), f"{kind} ran, read as {name}"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_old_torchvision_files_do_not_run(tmp_path: Path) -> None:
    """The files are MNIST as torchvision once stored it, and still reads it."""
    mark = tmp_path / "mark"
    (tmp_path / "MNIST" / "processed").mkdir(parents=True)
    for _, raw in saved(mark):
        for name in ("training.pt", "test.pt"):
            (tmp_path / "MNIST" / "processed" / name).write_bytes(raw)
        with pytest.raises(DataError, match="old torchvision"):
            open_data("torchvision", tmp_path, name="MNIST")
        assert not mark.exists()


def test_no_command_runs_a_pickle(assert_refused: Callable[..., str], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for _, raw in saved(mark):
        (tmp_path / "evil.h5").write_bytes(raw)
        for command in ("restart", "evaluate", "inspect"):
            assert_refused("not a finished checkpoint", command, "evil.h5")
        assert_refused("not a finished checkpoint", "export", "evil.h5", "--client", "0", "out.h5")
        assert_refused("cannot be opened as HDF5", "--data.source", "hdf5", "--data.path", "evil.h5")
        assert_refused("", "--config", "evil.h5")
        assert not mark.exists()


def test_pickles_inside_hdf5_are_only_bytes(tmp_path: Path) -> None:
    """The pickles are opaque or numeric values and attributes, in data files and in checkpoints."""
    mark = tmp_path / "mark"
    raw = pickle.dumps(Call(os.system, f"touch '{mark}'"))
    path = write_h5(tmp_path / "a.h5", x=GOOD_X, y=GOOD_Y, z=np.void(raw))
    with h5py.File(path, "r+") as file:
        file.attrs["evil"], file.attrs["name"] = np.void(raw), np.void(raw)
    with pytest.raises(DataError, match="attribute 'name' is neither text nor numbers"):
        open_data("hdf5", path)
    with h5py.File(path, "r+") as file:
        file.attrs["name"] = "data"
    open_data("hdf5", path).close()

    whole = write_alone(tmp_path / "round-000003.h5", sample_content())
    with Checkpoint(whole) as loaded:
        before = digest(loaded)
    edits: list[tuple[str, Callable[[Any], object]]] = [
        ("'evil' is neither", lambda file: file.attrs.__setitem__("evil", np.void(raw))),
        (
            "it holds unknown objects: 'evil'",
            lambda file: file.__setitem__("evil", np.frombuffer(raw, np.uint8)),
        ),
        ("server/state is", lambda f: (f.pop("server/state"), f.__setitem__("server/state", np.void(raw)))),
    ]
    for says, edit in edits:
        copy = tmp_path / "round-000004.h5"
        copy.write_bytes(whole.read_bytes())
        with pytest.raises(CheckpointError, match=says) as caught:
            checkpoint.verify(reseal(copy, edit))
        assert "remedy: " in str(caught.value)
    with Checkpoint(whole) as loaded:
        assert digest(loaded) == before
    assert not mark.exists()


# The source

LOADERS = {"pickle", "_pickle", "marshal", "shelve", "copyreg", "dill", "joblib", "cloudpickle", "yaml"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
ALLOWED = {
    ("data/sources/safe_pickle.py", "import pickle"),
    # A method's own class Options, out of the package's own source.
    ("config/methods.py", "exec"),
    ("config/methods.py", "compile"),
    ("checkpoint/weights.py", "torch.load of weights only"),
}


def loaders(source: str) -> Iterator[str]:
    """Return the calls that could run a file's content: pickle imports, torch.load, numpy.load, eval."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    safe = {id(call.func) for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [item.name for item in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from (f"import {name}" for name in modules if name.partition(".")[0] in LOADERS)
            if isinstance(node, ast.ImportFrom):
                yield from (f"import {name}" for name in names if name in {"load", "loads", "read_array"})
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in RUNNERS:
            yield node.id
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.load", "torch.jit.load")):
            yield "torch.load of weights only" if id(node) in safe else "torch.load"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if words.get("allow_pickle", "False") != "False":
                yield "allow_pickle"
            if called.endswith(("np.load", "numpy.load", "read_array")) and "allow_pickle" not in words:
                yield called


def test_package_has_no_call_that_runs_file_content() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 50
    found = {
        (posixpath.relpath(path, PACKAGE), what) for path in sources for what in loaders(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import pickle"),
        ("from pickle import loads as x", "import pickle"),
        ("from torch import load", "import load"),
        ("import marshal as m", "import marshal"),
        ("torch.load(path)", "torch.load"),
        ("read = torch.load", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("torch.load(path, weights_only=True)", "torch.load of weights only"),
        ("np.load(path)", "np.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("np.lib.format.read_array(f, allow_pickle=flag)", "allow_pickle"),
        ("eval(text)", "eval"),
        ("run = exec", "exec"),
        ("__import__(name)", "__import__"),
    ],
)
def test_search_for_loaders_finds_them(source: str, what: str) -> None:
    assert what in [*loaders(source)]
    assert not [*loaders("module.eval(); np.load(p, allow_pickle=False); json.load(f); re.match('eval', x)")]
