"""Long runs: the memory and the open files of every rank stay as they are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.launcher import SMALL_RUN, rank_processes, read_metrics, running_job, wait_for_end, wait_for_file

FLAGS = (*SMALL_RUN, "--clients", "6", "--participation", "0.5", "--run.checkpoint_every", "10")
Sample = dict[int, tuple[float, int]]  # by rank: resident MiB, open files


def look(mpirun: int) -> Sample:
    """Return memory and open files of every rank."""
    found = {}
    for rank, pid in rank_processes(mpirun).items():
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
            if ":" in line
        )
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        found[rank] = int(status["VmRSS"].split()[0]) / 1024, files
    return found


def soak(tmp_path: Path, rounds: int) -> None:
    """Check that after a quarter of the rounds no rank grows by 8 MiB or opens more files."""
    samples: list[tuple[int, Sample]] = []
    arguments = (*FLAGS, "--rounds", str(rounds), "--train.epochs", "4", "--run.dir", "run")
    with running_job(3, *arguments, cwd=tmp_path) as job:
        wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
        while job.poll() is None:
            done = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
            try:
                if done < rounds - 1:
                    samples.append((done, look(job.pid)))
            except (OSError, KeyError):  # it ended while we looked
                break
            time.sleep(0.1)
        assert wait_for_end(job, 120).code == 0
    assert len(read_metrics(tmp_path / "run")) == rounds
    early = [sample for done, sample in samples if rounds // 4 <= done < rounds // 2 and len(sample) == 3]
    late = [sample for done, sample in samples if done >= 3 * rounds // 4 and len(sample) == 3]
    assert early and late, f"{len(samples)} samples are too few"
    for rank in range(3):
        before, after = (max(s[rank][0] for s in part) for part in (early, late))
        files = [min(s[rank][1] for s in part) for part in (early, late)]  # one more while it writes
        print(f"rank {rank}: {before:.1f} → {after:.1f} MiB, {files[0]} → {files[1]} files")
        assert after - before < 8, f"rank {rank} grew from {before:.1f} to {after:.1f} MiB"
        assert files[1] <= files[0], f"rank {rank} held {files[0]}, then {files[1]} files"


def test_memory_and_files_stay_flat(tmp_path: Path) -> None:
    soak(tmp_path, 40)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_memory_and_files_stay_flat_over_300_rounds(tmp_path: Path) -> None:
    soak(tmp_path, 300)
