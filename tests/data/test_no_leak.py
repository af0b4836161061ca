"""No test row, of any source under any partition, is a training row: of its client, or of another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from pfedmoe_mpi import config
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.federation import effective, plan
from support.data_files import random_images, write_h5

ROWS = 120
PIXELS = random_images(ROWS, 4, 4, 3)
Y, OWNER = np.arange(ROWS) % 3, np.arange(ROWS) // 40
TEST = np.arange(ROWS) % 5 == 0
PARTS = {"train": ~TEST, "test": TEST}
Given = dict[str, Any]


def table(root: Path) -> Given:
    lines = ["file,label,writer,part"]
    for k in range(ROWS):
        Image.fromarray(PIXELS[k]).save(root / f"{k}.png")
        lines.append(f"{k}.png,{Y[k]},w{OWNER[k]},{'test' if TEST[k] else 'train'}")
    (root / "t.csv").write_text("\n".join(lines))
    return {"path": root / "t.csv", "label": "label", "client": "writer", "image": "file", "split": "part"}


def hf(root: Path) -> Given:
    datasets = pytest.importorskip("datasets")
    splits = {
        part: datasets.Dataset.from_dict(
            {
                "image": [Image.fromarray(pixels) for pixels in PIXELS[rows]],
                "label": Y[rows].tolist(),
                "writer": OWNER[rows].tolist(),
            }
        )
        for part, rows in PARTS.items()
    }
    datasets.DatasetDict(splits).save_to_disk(str(root / "saved"))
    return {"path": root / "saved", "label": "label", "client": "writer"}


def npz(root: Path) -> Given:
    arrays = {f"{part}_images": PIXELS[rows] for part, rows in PARTS.items()}
    np.savez(root / "m.npz", **arrays, **{f"{part}_labels": Y[rows, None] for part, rows in PARTS.items()})
    return {"path": root / "m.npz"}


def hdf5(root: Path) -> Given:
    x = PIXELS.reshape(ROWS, -1).astype(np.int32)
    return {"path": write_h5(root / "a.h5", x=x, y=Y, client=OWNER + 5, official_test=TEST)}


def tff(root: Path) -> Given:
    for part, rows in PARTS.items():
        with h5py.File(root / f"a_{part}.h5", "w") as file:
            for k in range(3):
                mine = rows & (k == OWNER)
                file[f"examples/c{k}/image"], file[f"examples/c{k}/label"] = PIXELS[mine], Y[mine]
    return {"path": root}


def leaf(root: Path) -> Given:
    for part, rows in PARTS.items():
        mine = [rows & (k == OWNER) for k in range(3)]
        content = {
            "users": ["a", "b", "c"],
            "num_samples": [int(own.sum()) for own in mine],
            "user_data": {
                user: {"x": PIXELS[own].reshape(-1, 48).tolist(), "y": Y[own].tolist()}
                for user, own in zip("abc", mine, strict=True)
            },
        }
        (root / part).mkdir()
        (root / part / "all_data.json").write_text(json.dumps(content))
    return {"path": root}


SOURCES: list[Callable[[Path], Given]] = [table, hf, npz, hdf5, tff, leaf]
KINDS = [
    {"kind": "natural"},
    {"kind": "iid", "pool": "official"},
    {"kind": "dirichlet", "pool": "all", "alpha": 1.0},
    {"kind": "dirichlet_class", "pool": "official", "alpha": 1.0, "min_samples": 4, "validation": 0.2},
    {"kind": "shards", "pool": "all", "shards": 2},
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_no_test_row_is_a_training_row(tmp_path: Path, source: Callable[[Path], Given]) -> None:
    given = {f"data.{name}": str(value) for name, value in source(tmp_path).items()}
    opened = config.build({**given, "data.source": source.__name__}).data
    with open_dataset(opened, 0, clients=3) as data:
        for kind in KINDS:
            if kind["kind"] == "natural" and data.client is None:
                continue
            made = config.build(
                {
                    **given,
                    "data.source": source.__name__,
                    "clients": 3,
                    **{f"partition.{name}": value for name, value in kind.items()},
                }
            )
            made = effective.apply_proposals(made, data)
            partition = plan.draw_partition(made, data)
            trained = np.concatenate([*partition.train, *partition.validation])
            tested = np.concatenate([*partition.test])
            assert len(np.unique(np.concatenate([trained, tested]))) == len(trained) + len(tested) == ROWS
            if made.partition.kind == "natural" or made.partition.pool == "official":
                assert data.official_test is not None
                assert data.official_test[tested].all() and not data.official_test[trained].any()
            before = {sample.tobytes() for sample in data.rows(trained)}
            assert not any(sample.tobytes() in before for sample in data.rows(tested))
            if made.partition.kind == "natural":
                assert data.client is not None
                owners = [set(data.client[rows].tolist()) for rows in (*partition.train, *partition.test)]
                assert owners == [{0}, {1}, {2}] * 2
