"""Models that do not fit into memory are refused before any is allocated, with what makes them fit."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from pfedmoe_mpi import load_client
from pfedmoe_mpi.errors import CheckpointError
from pfedmoe_mpi.mpi import memory
from support.launcher import SMALL_RUN, Result, Session, clean_environment, error_message


def test_huge_models_are_refused_with_what_fits(session: Session, tmp_path: Path) -> None:
    said = error_message(
        session(*SMALL_RUN, "--dry", "true", "--model.dim", "300000000", cwd=tmp_path),
        r"do not fit \(model.dim",
    )
    fits = re.search(r"remedy: --model.dim (\d+) fits", said)
    assert fits and 500 < int(fits[1]) < 300_000_000


def test_limit_of_the_process_counts(tmp_path: Path) -> None:
    """In 6 GB of address space forty clients of 100 MB fit, as they need no memory; those of 1 GB do not."""

    def plan(dim: int) -> Result:
        flags = ("--clients", "40", "--data.samples", "4000", "--model.dim", str(dim), "--dry", "true")
        result = subprocess.run(
            [sys.executable, "-m", "pfedmoe_mpi", *SMALL_RUN, *flags],
            cwd=tmp_path,
            env=clean_environment("mpich", {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
        )
        return Result(result.returncode, result.stdout, result.stderr)

    small = plan(100_000)
    assert small.code == 0 and "of them on a rank (run.memory)" in small.out, small.err
    said = error_message(plan(1_000_000), "ulimit -v")
    assert re.search(r"--model.dim \d+ fits", said)


def test_control_group_counts_with_those_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of 1 GB within a larger user slice; the page cache can be given up."""
    job = tmp_path / "user" / "job"
    job.mkdir(parents=True)
    for folder, most, used in ((job, 1 << 30, 1 << 29), (job.parent, "max", 1 << 30)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 28}\n")
    text = memory._text
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_text", lambda p: "0::/user/job\n" if p.name == "cgroup" else text(p))
    assert list(memory._control_group()) == [(3 << 28, "the memory limit of its control group")]
    assert "0.8 GB are free (the memory limit" in memory.shortage(9e8) and not memory.shortage(7e8)


def test_memory_of_a_slurm_job_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "8")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert memory.available(4) == 16 << 20 and "(the job's --mem)" in memory.shortage(1e9)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "32")
    assert memory.available() == 32 << 20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert memory.available() > 32 << 20, "0 is all of the node's"


# Crafted files


def with_config(file: Any, **changes: Any) -> None:
    config = json.loads(file.attrs["config"])
    config["model"].update(changes)
    file.attrs["config"] = json.dumps(config)


def with_samples(file: Any, **changes: Any) -> None:
    file.attrs["samples"] = json.dumps({**json.loads(file.attrs["samples"]), **changes})


def huge_tensor(file: Any) -> None:
    del file["model/head.weight"]
    file.create_dataset("model/head.weight", (1 << 60,), "<f4", chunks=(1024,))


CRAFTED: dict[str, tuple[Callable[[Any], None], str]] = {
    "dim": (lambda file: with_config(file, dim=300_000_000), "do not fit"),
    "classes": (lambda file: with_samples(file, classes=1 << 60), "does not describe its samples"),
    "shape": (lambda file: with_samples(file, shape=[3, 1 << 30, 8]), "does not describe its samples"),
    "negative": (lambda file: with_samples(file, shape=[3, -8, 8]), "does not describe its samples"),
    "infinite": (lambda file: with_samples(file, vocabulary=1e400), "does not describe its samples"),
    "absent": (lambda file: with_samples(file, absent=[[[]], 5]), "does not describe its samples"),
    "no absent": (lambda file: with_samples(file, absent=7), "does not describe its samples"),
    "brackets": (lambda file: file.attrs.update(config="[" * 60_000), "not the file of a client's model"),
    "objects": (
        lambda file: file.attrs.update(config='{"a":' * 900 + "1" + "}" * 900),
        "configuration that cannot be used|not the file",
    ),
    "tensor": (huge_tensor, "model/head.weight is not float32 of shape"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_sizes_are_refused(
    run_command: Callable[..., Result], run: Path, tmp_path: Path, name: str
) -> None:
    craft, pattern = CRAFTED[name]
    path = tmp_path / "client.h5"
    run_command("export", run / "checkpoints" / "best.h5", path, "--client", "0")
    with h5py.File(path, "r+") as file:
        craft(file)
    with pytest.raises(CheckpointError, match=pattern):
        load_client(path)
