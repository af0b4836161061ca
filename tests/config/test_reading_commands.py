"""The commands that read checkpoints: `inspect` and `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.files import path_digest
from support.launcher import Result, read_metrics, run_program


def test_inspect_prints_the_checkpoint(run_command: Callable[..., Result], trained: Path) -> None:
    path = trained / "checkpoints" / "round-000003.h5"
    text = run_command("inspect", path).out
    mean = read_metrics(trained)[2]["accuracy"]["mean"]
    for said in (
        "pfedmoe, round 3 of 3",
        "data synthetic, partition dirichlet",
        f"accuracy mean {100 * mean:.2f} %, worst ",
        "best on test: round ",
        "server: 139,100 numbers (shared 139,100)",
        "clients 0, 2: 157,628 numbers (model 144,110, gate 13,518)",
        "clients 1, 3: ",
        "threads: 1",
    ):
        assert said in text, said
    short = run_command("inspect", path, "--digest").out
    assert len(short) == 65 and f"digest: {short}" in text
    assert run_command("inspect", "--digest", path).out == short


def test_digest_depends_on_learning_alone(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    def after(name: str, *flags: str) -> str:
        run_command(*small_run, "--run.dir", name, *flags)
        return run_command("inspect", tmp_path / name / "checkpoints" / "round-000001.h5", "--digest").out

    first = after("a")
    assert after("b", "--run.keep", "7", "--run.checkpoint_every", "2") == first
    unlike = {
        after("c", "--seed", "1"),
        after("d", "--train.lr", "0.02"),
        after("e", "--pfedmoe.share", "false"),
    }
    assert len(unlike | {first}) == 4


def test_evaluate_on_several_ranks_repeats_the_last_row(run: Path, tmp_path: Path) -> None:
    before = path_digest(run)
    result = run_program(
        2, "evaluate", str(run / "checkpoints" / "round-000003.h5"), "--json", "true", cwd=tmp_path
    )
    assert (result.code, result.err) == (0, "")
    measured, row = json.loads(result.out), read_metrics(run)[2]
    assert measured["round"] == 3 and measured["other_data"] is False
    assert measured["accuracy"] == row["accuracy"]
    for name in ("accuracy", "loss", "alpha"):
        assert measured["clients"][name] == row["clients"][name]
    assert path_digest(run) == before


def test_evaluate_on_other_data_is_announced(
    run_command: Callable[..., Result], small_run: tuple[str, ...], run: Path
) -> None:
    run_command("data", "prepare", "other.h5", *small_run, "--seed", "5")
    flags = ("--data.source", "hdf5", "--data.path", "other.h5")
    result = json.loads(
        run_command("evaluate", run / "checkpoints" / "best.h5", *flags, "--json", "true").out
    )
    assert result["other_data"] is True and 0 <= result["accuracy"]["mean"] <= 1
