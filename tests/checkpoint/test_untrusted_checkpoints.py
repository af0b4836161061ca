"""Untrusted checkpoints with a valid seal are refused before they take memory.

Every file is read by a process with 300 MiB to spare: taking more memory would end it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pfedmoe_mpi.checkpoint import Checkpoint, seal
from pfedmoe_mpi.checkpoint.writer import _put
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.errors import CheckpointError
from support.checkpoint_checks import sample_content, sample_row
from support.checkpoint_files import reseal, write_alone
from support.limited_memory import read_messages

Edit = Callable[[Any], object]


def replaced(key: str, *arguments: Any, **options: Any) -> Edit:
    """Replace a dataset; its layout is still named."""

    def edit(file: Any) -> None:
        layout = file[key].attrs.get("layout")
        del file[key]
        made = file.create_dataset(key, *arguments, **options)
        if layout is not None:
            made.attrs["layout"] = layout

    return edit


def linked(key: str, link: Any) -> Edit:
    def edit(file: Any) -> None:
        del file[key]
        file[key] = link

    return edit


def texted(key: str, text: str | bytes) -> Edit:
    """Replace a text, written as the program writes texts."""

    def edit(file: Any) -> None:
        del file[key]
        _put(file, key, np.array(text.encode() if isinstance(text, str) else text))

    return edit


def configured(**changes: Any) -> Edit:
    return texted("config", json.dumps({**sample_content().config, **changes}))


def coded(code: str) -> Edit:
    return lambda file: _put(file, "code", np.array(code.encode()))


def lived(*rows: Any) -> Edit:
    return texted("history", "\n".join(json.dumps(item) for item in rows))


def laid_out(text: str) -> Edit:
    """Replace the layout of client 1, under the digest that it has."""

    def edit(file: Any) -> None:
        layout = Layout.from_json(text) if text.startswith("[[") else None
        name = layout.digest if layout else "ab" * 32
        _put(file, f"layouts/{name}", np.array(text.encode()))
        file["clients/000001"].attrs["layout"] = name

    return edit


def attributed(name: str, value: Any) -> Edit:
    return lambda file: file.attrs.__setitem__(name, value(file) if callable(value) else value)


def virtual(key: str) -> Edit:
    def edit(file: Any) -> None:
        layout = h5py.VirtualLayout((700,), "<f4")
        layout[:] = h5py.VirtualSource("/dev/shm/elsewhere.h5", "x", (700,))
        attribute = file[key].attrs["layout"]
        del file[key]
        file.create_virtual_dataset(key, layout).attrs["layout"] = attribute

    return edit


def grouped(key: str) -> Edit:
    def edit(file: Any) -> None:
        del file[key]
        file.create_group(key)

    return edit


def measured(name: str, data: np.ndarray) -> Edit:
    return replaced(f"measured/{name}", data=data)


ENTRIES, TWICE = "measured/entries", b'[["a", true], ["a", true]]'
STATE, MOMENTS, OFFSETS = "server/state", "server/moments", "partition/train_offsets"
FIRST = "server/first_state"
ZEROS = np.zeros(700, "<f4")
ROWS = [sample_row(1), sample_row(2), sample_row(3)]
CHECKPOINTS: dict[str, tuple[str, Edit]] = {
    "soft link": ("config is a link", linked("config", h5py.SoftLink("/history"))),
    "soft loop": ("server/state is a link", linked(STATE, h5py.SoftLink("/server/state"))),
    "loop of groups": ("server/state is a link", linked("server", h5py.SoftLink("/server"))),
    "external link": ("is a link", linked("clients/000001", h5py.ExternalLink("other.h5", "/x"))),
    "external group": ("no group clients|a link", linked("clients", h5py.ExternalLink("other.h5", "/x"))),
    "external layouts": ("layouts/.* is a link", linked("layouts", h5py.ExternalLink("other.h5", "/x"))),
    "one for two": ("lies elsewhere", lambda f: linked("clients/000006", f["clients/000000"])(f)),
    "external storage": (
        "server/state is stored in external files",
        replaced(STATE, (700,), "<f4", external=[("/etc/passwd", 0, 2800)]),
    ),
    "virtual": ("server/state is a virtual dataset", virtual(STATE)),
    "giant": ("clients/000000 lies elsewhere", replaced("clients/000000", (1 << 50,), "<f4")),
    "giant rows": ("partition/train lies elsewhere", replaced("partition/train", (1 << 50,), "<i8")),
    "bomb": (
        "not stored in one piece",
        replaced(STATE, (1 << 44,), "<f4", chunks=(1 << 20,), compression="gzip"),
    ),
    "code: no JSON": ("code is not", coded("{")),
    "code: list": ("code is not a text for each file", coded('["a.py"]')),
    "code: numbers": ("code is not a text for each file", coded('{"a.py": 1}')),
    "code: above": (r"code has a file of the name '\.\./a\.py'", coded('{"../a.py": ""}')),
    "code: absolute": ("code has a file of the name '/tmp/a.py'", coded('{"/tmp/a.py": ""}')),
    "code: dots": (r"code has a file of the name 'b/\./a\.py'", coded('{"b/./a.py": ""}')),
    "code: no Python": ("code has a file of the name '.bashrc'", coded('{".bashrc": ""}')),
    "code: controls": (r"code has a file of the name '.x1b\[2J\.py'", coded('{"\\u001b[2J.py": ""}')),
    "packed": ("not stored in one piece", replaced(STATE, data=ZEROS, compression="gzip")),
    "float64": ("server/state is float64", replaced(STATE, data=ZEROS.astype("f8"))),
    "integers": ("server/state is int32", replaced(STATE, data=ZEROS.astype("i4"))),
    "big endian": ("server/state is >f4", replaced(STATE, data=ZEROS.astype(">f4"))),
    "two dimensions": (r"shape \(7, 100\)", replaced(STATE, data=ZEROS.reshape(7, 100))),
    "scalar": (r"shape \(\)", replaced(STATE, data=np.float32(1))),
    "null": ("server/state has no values", replaced(STATE, data=h5py.Empty("<f4"))),
    "compound": ("server/state is", replaced(STATE, data=ZEROS.view([("a", "<f4")]))),
    "opaque": ("server/state is", replaced(STATE, data=ZEROS.view("V4"))),
    "references": ("server/state is object", replaced(STATE, (700,), h5py.ref_dtype)),
    "different lengths": ("server/state is object", replaced(STATE, (700,), h5py.vlen_dtype("f4"))),
    "texts": ("server/state is object", replaced(STATE, (700,), h5py.string_dtype())),
    "group for dataset": ("history is not a dataset", grouped("history")),
    "dataset for group": ("no group clients", replaced("clients", data=ZEROS)),
    "no history": ("it has no history", lambda file: file.pop("history")),
    "another client": ("clients holds 'x'", lambda file: file["clients"].move("000003", "x")),
    "one client more": ("clients holds '000012'", lambda file: file["clients"].move("000003", "000012")),
    "other layouts": (
        "clients/000000 has another layout than layouts/of_clients says",
        replaced("layouts/of_clients", data=np.arange(12) % 2),
    ),
    "no such layout": ("give each client a layout", replaced("layouts/of_clients", data=np.full(12, 99))),
    "fewer layouts": ("give each client a layout", replaced("layouts/of_clients", data=np.zeros(11, int))),
    "first state": ("server/first_state has 699", lambda f: f.create_dataset(FIRST, data=ZEROS[:699])),
    "more": ("it holds unknown objects: 'more'", lambda file: file.create_dataset("more", data=ZEROS)),
    "more in a group": (
        "its seal names unknown datasets: 'server/x'",
        lambda f: f.create_dataset("server/x", data=ZEROS),
    ),
    "moments of float64": ("server/moments is float64", replaced(MOMENTS, data=np.zeros(1400))),
    "moments short": ("server/moments has 1399 numbers", replaced(MOMENTS, data=np.zeros(1399, "<f4"))),
    "no moments": ("it has no server/moments", lambda file: file["server"].pop("moments")),
    "one moment": ("server/moments has 1400", configured(server={"optimiser": "momentum"})),
    "moments unsaid": ("seal names unknown datasets: 'server/moments'", configured(server={})),
    "optimiser": ("no usable server.optimiser", configured(server={"optimiser": ["yogi"]})),
    "server": ("no usable server.optimiser", configured(server=[1])),
    "no round": ("round is not a natural", lambda file: file.attrs.pop("round")),
    "negative round": ("round is not a natural", attributed("round", -1)),
    "half a round": ("round is not a natural", attributed("round", 2.5)),
    "round as text": ("round is not a natural", attributed("round", "3")),
    "round as reference": ("'round' is neither", attributed("round", lambda file: file.ref)),
    "round as rows": ("round is not a natural", attributed("round", [1, 2])),
    "no digest": ("no attribute 'data_digest'", lambda file: file.attrs.pop("data_digest")),
    "digest as number": ("no attribute 'data_digest'", attributed("data_digest", 3)),
    "attribute of references": (
        "'x' is neither",
        lambda f: f.attrs.create("x", [f.ref], None, h5py.ref_dtype),
    ),
    "attribute of structures": ("'x' is neither", attributed("x", np.zeros(2, [("a", "i4")]))),
    "attribute of texts": ("'x' is neither", attributed("x", ["a", "b"])),
    "long attribute": ("longer than", attributed("x", np.zeros(300_000))),
    "attribute of bytes": ("not UTF-8", attributed("x", np.bytes_(b"\xff\xfe"))),
    "config in a heap": (
        "config is not a text",
        replaced("config", data=json.dumps(sample_content().config)),
    ),
    "config as numbers": ("config is not a text", replaced("config", data=7)),
    "config of bytes": ("config is not UTF-8", texted("config", b'{"a": "\xff\xfe"}')),
    "config of half a character": ("config is not JSON", configured(name="\ud800")),
    "config cut": ("config is not JSON", texted("config", '{"algorithm": "pfed')),
    "config nested": ("config is not JSON", texted("config", "[" * 100_000)),
    "config NaN": ("config is not JSON: the number NaN", configured(x=float("nan"))),
    "config as list": ("no usable algorithm", texted("config", "[1]")),
    "config empty": ("no usable algorithm", texted("config", "{}")),
    "algorithm": ("no usable algorithm", configured(algorithm=5)),
    "pool": ("no usable model.pool", configured(model={"pool": []})),
    "pool of numbers": ("no usable clients or model.pool", configured(model={"pool": [1]})),
    "no clients": ("no usable clients", configured(clients=0)),
    "more clients": ("columns do not fit their entries", configured(clients=13)),
    "a trillion clients": (
        "columns do not fit their entries",
        configured(clients=10**12),
    ),
    "clients true": ("no usable clients", configured(clients=True)),
    "history short": ("history has 2 rows", lived(*ROWS[:2])),
    "history mixed": ("no row of round 1", lived(ROWS[1], ROWS[0], ROWS[2])),
    "history of numbers": ("no row of round 2", lived(ROWS[0], 5, ROWS[2])),
    "history without accuracy": ("no accuracy of round 3", lived(*ROWS[:2], {"round": 3})),
    "accuracy as text": ("no accuracy of", lived(*ROWS[:2], {**ROWS[2], "accuracy": {"mean": "x"}})),
    "infinite": ("history is not JSON: the number 1e999", texted("history", '{"round": 1e999}')),
    "columns of numbers": ("columns is not a list", measured("columns", np.frombuffer(b"[1]", "u1"))),
    "columns twice": ("columns is not a list", measured("columns", np.frombuffer(TWICE, "u1"))),
    "a value less": ("do not fit", measured("values", np.zeros(3))),
    "a round too late": ("do not fit", lambda file: file[ENTRIES].__setitem__((-1, 0), 4)),
    "an unknown column": ("do not fit", lambda file: file[ENTRIES].__setitem__((-1, 1), 3)),
    "more clients in a column": ("do not fit", lambda file: file[ENTRIES].__setitem__((0, 2), 13)),
    "a column of client 12": ("clients .* not in order", measured("clients", np.array([0, 12], "<i4"))),
    "a value not finite": ("not finite", lambda file: file["measured/values"].__setitem__(0, np.nan)),
    "entries of floats": ("measured/entries is float64", measured("entries", np.zeros((6, 3)))),
    "layout of text": ("is not a layout", laid_out('{"a": 1}')),
    "layout of another size": (
        "has 1 numbers, but its layout has 2",
        laid_out('[["model/", [2], 0, false]]'),
    ),
    "layout with a gap": ("is not a layout", laid_out('[["model/", [1], 1, false]]')),
    "layout below zero": ("is not a layout", laid_out('[["model/", [-1, -1], 0, false]]')),
    "layout with twins": ("names a tensor twice", laid_out('[["a/", [1], 0, true], ["a/", [0], 1, true]]')),
    "layout of another name": ("is not the layout of", laid_out(" []")),
    "layout elsewhere": (
        "does not name a layout",
        lambda file: file[STATE].attrs.__setitem__("layout", "../config"),
    ),
    "offsets falling": ("does not divide", lambda file: file[OFFSETS].__setitem__(3, -5)),
    "offsets beyond": ("does not divide", lambda file: file[OFFSETS].__setitem__(-1, 1 << 60)),
    "offsets short": ("does not divide", replaced(OFFSETS, data=np.arange(3))),
    "offsets of floats": ("partition/train_offsets is float64", replaced(OFFSETS, data=np.zeros(13))),
    "rows below zero": ("does not divide", lambda file: file["partition/train"].__setitem__(0, -1)),
    "no test rows": ("it has no partition/test", lambda file: file["partition"].pop("test")),
    "sum of floats": ("partial/sum is float64", replaced("partial/sum", data=np.zeros(333))),
    "sum of nothing": ("partial/sum is too short", replaced("partial/sum", data=np.zeros(1, "<i8"))),
    "finished beyond": ("not a set of clients", replaced("partial/finished", data=np.array([1, 12]))),
    "finished twice": ("not a set of clients", replaced("partial/finished", data=np.array([1, 1]))),
    "no sum": ("it has no partial/sum", lambda file: file["partial"].pop("sum")),
    "unsaid sum": ("'partial' contradicts its datasets", attributed("partial", np.False_)),
    "promised sum": ("'partial' contradicts its datasets", lambda file: file.pop("partial")),
    "partial as rows": ("not a checkpoint of this program", attributed("partial", [1, 2])),
}


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint with everything in it."""
    return write_alone(
        tmp_path_factory.mktemp("partial") / "round-000004-partial.h5", sample_content(partial=True)
    ).read_bytes()


@pytest.fixture(scope="module")
def messages(partial: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The message about each of CHECKPOINTS, and about an unedited one."""
    folder = tmp_path_factory.mktemp("untrusted")
    paths = {}
    for name, (_, edit) in {**CHECKPOINTS, "good": ("", lambda file: None)}.items():
        paths[name] = folder / f"{name}.h5"
        paths[name].write_bytes(partial)
        reseal(paths[name], edit)
    messages = read_messages("checkpoint", list(paths.values()))
    return {name: messages[path] for name, path in paths.items()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_crafted_checkpoint_is_refused(messages: dict[str, str], name: str) -> None:
    message = messages[name]
    assert re.search(CHECKPOINTS[name][0], message), message
    assert f"{name}.h5 is not a checkpoint of this program: " in message and "remedy: " in message
    assert "damaged" not in message and "truncated" not in message, "the seal was right"


def test_unedited_checkpoint_is_read(messages: dict[str, str]) -> None:
    assert not messages["good"]


def test_seal_with_overlapping_ranges_is_refused(partial: bytes, tmp_path: Path) -> None:
    path = tmp_path / "twice.h5"
    path.write_bytes(partial)
    with open(path, "r+b") as file:
        table = {one.name: (one.offset, one.length) for one in seal.read(file, path).ranges}
        table["config"] = (table["history"][0], table["config"][1])
        seal.put(file, table, {})
    assert "its seal contradicts itself" in read_messages("checkpoint", [path])[path]


def test_checkpoint_with_other_models_is_refused(partial: bytes, tmp_path: Path) -> None:
    path = tmp_path / "round-000004-partial.h5"
    path.write_bytes(partial)
    whole = sample_content(partial=True)
    state, clients = whole.state_layout, list(whole.client_layouts)
    with Checkpoint(path) as loaded:
        loaded.check_fits(state, clients, 333)
        with pytest.raises(CheckpointError, match="sum has 333 numbers, but its round sums 334"):
            loaded.check_fits(state, clients, 334)
        for other in ((clients[1], clients), (state, clients[1:]), (state, [*clients[1:], clients[0]])):
            with pytest.raises(CheckpointError, match="its models are not those of its configuration"):
                loaded.check_fits(*other, 333)
