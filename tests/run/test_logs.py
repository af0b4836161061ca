"""The names of a job's log files: one per rank, or one per host of a wide job."""

from __future__ import annotations

from pathlib import Path

from pfedmoe_mpi.log import LOGGER
from pfedmoe_mpi.run.logs import file_name, log_to_file


def test_wide_jobs_have_a_log_for_each_host(tmp_path: Path) -> None:
    few, many = ["a"] * 64, ["b", "a"] * 32 + ["b"]
    assert file_name(few, 3) == "rank-0003.txt" and file_name(few, 63) == "rank-0063.txt"
    assert {rank: file_name(many, rank) for rank in (0, 1, 64)} == {
        **{0: "node-0000.txt", 1: "node-0001.txt", 64: "node-0000.txt"}
    }
    for rank in (0, 64):
        log_to_file(tmp_path, many, rank)
        LOGGER.info("here")
    said = (tmp_path / "node-0000.txt").read_text().splitlines()
    assert [" ".join(line.split()[2:]) for line in said] == ["rank 0 INFO here", "rank 64 INFO here"]
    log_to_file(tmp_path, ["a"], 0)
    assert (tmp_path / "rank-0000.txt").is_file()
