"""Non-finite values end a run or a member's round with one message; other clients keep their work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.errors import RunError
from support.launcher import (
    SMALL_RUN,
    Result,
    Session,
    checkpoint_digest,
    read_metrics,
    reproducible_rows,
    run_to_end,
)
from support.mpi_job import run_module
from support.small_federation import build_loop, write_data


def flags_of(path: Path) -> tuple[str, ...]:
    """Return flags of three clients, of which client 1 cannot train."""
    return (
        *("--data.source", "hdf5", "--data.path", str(path), "--partition.kind", "natural", "--clients", "3"),
        *("--model.pool", "mlp5", "--model.shared", "mlp5", "--rounds", "2", "--train.clip", "0"),
        *("--run.checkpoint_every", "2"),
    )


def test_run_stopped_by_one_client_resumes_without_it(
    session: Session, run_command: Callable[..., Result], tmp_path: Path
) -> None:
    """Those who trained in the round do not train in it twice, and the one left out does again."""
    flags = flags_of(write_data(tmp_path / "spoilt.h5", 8, spoilt=1))
    run_command(*flags, "--run.dir", "dropped")
    ended = session(*flags, "--faults.nonfinite", "stop", "--run.dir", "run", cwd=tmp_path)
    assert ended.code == 1 and "round 1: the loss, gradient or vector of client 1 is not finite" in ended.err
    (path,) = checkpoint.newest_first(tmp_path / "run" / "checkpoints")
    assert path.name == checkpoint.name(0, partial=True)
    run_to_end(2, "restart", "run", "--faults.nonfinite", "drop", cwd=tmp_path)
    assert reproducible_rows(tmp_path / "run") == reproducible_rows(tmp_path / "dropped")
    assert checkpoint_digest(tmp_path / "run", 2) == checkpoint_digest(tmp_path / "dropped", 2)


def test_round_stopped_while_all_diverge_is_repeated(
    session: Session, run_command: Callable[..., Result], tmp_path: Path
) -> None:
    """Those left out before the stop train again too, once the remedy is followed."""
    wild = ("--train.lr", "1e30", "--train.clip", "0", "--run.dir", str(tmp_path / "run"))
    assert run_module("fault_injection", "stop", "0", "training", *SMALL_RUN, *wild, ranks=1).code == 75
    (path,) = checkpoint.newest_first(tmp_path / "run" / "checkpoints")
    assert path.name == checkpoint.name(0, partial=True)
    assert session("restart", "run", cwd=tmp_path).code == 1
    run_command("restart", "run", "--train.lr", "0.05", "--train.clip", "50")
    (row,) = read_metrics(tmp_path / "run")
    assert row["dropped"] == [] and None not in row["clients"]["accuracy_before"]


def test_diverging_server_is_reported(tmp_path: Path) -> None:
    path = write_data(tmp_path / "small.h5", 8)
    loop = build_loop(path, "fedgh", model__pool="mlp5", train__clip=0.0, fedgh__lr=1e39)
    with pytest.raises(RunError, match=r"the vector that the server trained is not finite(.|\n)*train.clip"):
        loop.run()
    assert loop.round == 0 and not loop.history
