"""Runs that were written before a setting existed go on as they began, whatever its default is today."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tomli_w

from pfedmoe_mpi import config, load_run
from pfedmoe_mpi.checkpoint.client_file import ClientFile
from pfedmoe_mpi.checkpoint.writer import _put
from pfedmoe_mpi.config import recorded
from pfedmoe_mpi.report import compare
from support.checkpoint_files import reseal
from support.launcher import SMALL_RUN, Result, checkpoint_digest, reproducible_rows

LITERAL = ("--gate.start", "paper", "--pfedmoe.mixture", "mean")


def without_later(tree: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they were recorded before those of `recorded.LATER` existed."""
    return {
        section: {n: v for n, v in values.items() if n not in recorded.LATER.get(section, {})}
        if isinstance(values, dict)
        else values
        for section, values in tree.items()
    }


def aged(file: Any) -> None:
    """Take the later settings out of a checkpoint; `reseal` computes a valid seal."""
    settings = without_later(json.loads(bytes(file["config"][()])))
    del file["config"]
    _put(file, "config", np.array(json.dumps(settings).encode()))


def test_old_run_goes_on_as_the_paper_has_it(run_command: Callable[..., Result], tmp_path: Path) -> None:
    """`restart`, `export`, `inspect --digest`, reports, and a repetition from config.toml."""
    kept = ("--rounds", "2", "--run.checkpoint_every", "1")
    run_command(*SMALL_RUN, *LITERAL, *kept, "--run.dir", "whole")
    whole, old = tmp_path / "whole", tmp_path / "old"
    shutil.copytree(whole, old)
    start = reseal(old / "checkpoints" / "round-000001.h5", aged)
    text = tomli_w.dumps(without_later(tomllib.loads((old / "config.toml").read_text())))
    (old / "config.toml").write_text(text)
    with h5py.File(start) as file:
        assert "mixture" not in text and b"mixture" not in bytes(file["config"][()])
    assert checkpoint_digest(old, 1) == checkpoint_digest(whole, 1)

    run_command("restart", start, "--run.dir", "restarted")
    assert reproducible_rows(tmp_path / "restarted") == reproducible_rows(whole)
    assert checkpoint_digest(tmp_path / "restarted", 2) == checkpoint_digest(whole, 2)
    run_command("export", start, "--client", "1", "client.h5")
    with h5py.File(tmp_path / "client.h5", "r+") as file:
        file.attrs["config"] = json.dumps(without_later(json.loads(file.attrs["config"])))
    with ClientFile(tmp_path / "client.h5") as exported:
        assert exported.config["pfedmoe"]["mixture"] == "mean"
    repeated = config.build(config.read_toml(old / "config.toml"))
    assert (repeated.gate.start, repeated.options.mixture) == ("paper", "mean")
    shown = load_run(old).config
    assert (shown["gate.start"], shown["pfedmoe.mixture"]) == ("paper", "mean")


def test_reports_pool_seeds_of_old_and_new_runs(trained: Path, tmp_path: Path) -> None:
    """A run of an earlier version did not record all settings, and did what the others' defaults are."""
    tree = tomllib.loads((trained / "config.toml").read_text(encoding="utf-8"))
    for name in ("train.optimiser", "train.betas", "data.label", "data.ignore", "eval.last"):
        section, _, last = name.partition(".")
        del tree[section][last]
    old = shutil.copytree(trained, tmp_path / "old")
    (old / "config.toml").write_text(tomli_w.dumps({**tree, "seed": 1}), encoding="utf-8")
    runs = [load_run(trained), load_run(old)]
    assert {**runs[1].config, "seed": 0} == runs[0].config
    assert list(runs[1].config) == list(runs[0].config)
    assert [len(group.runs) for group in compare.compare(runs).groups] == [2]


def test_file_of_ones_own_has_todays_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[gate]\nhidden = 32\n[pfedmoe]\nshare = true\n[run]\nforce = true\n")
    mine = config.build(config.read_toml(path))
    assert (mine.gate.start, mine.options.mixture) == ("auto", "sum")


@pytest.mark.parametrize("section", recorded.LATER)
def test_what_a_setting_meant_is_a_value_of_it(section: str) -> None:
    meant = {f"{section}.{name}": value for name, value in recorded.LATER[section].items()}
    built = config.flatten(config.to_tree(config.build(meant)))
    assert meant == {name: built[name] for name in meant}
