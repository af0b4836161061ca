"""The disk use that the plan and `reproduce --dry` print, compared with what runs leave."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.federation.disk import DiskUse, in_units
from support import launcher

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
TABLE = """\
[base]
rounds = 5
clients = 6
data.source = "synthetic"
data.samples = 300
data.size = 8
model.pool = ["mlp5", "mlp4"]
model.shared = "mlp5"
model.train = "head"
train.device = "cpu"
run.checkpoint_every = 1
[axis]
algorithm = ["pfedmoe", "fedproto", "fedmrl"]
"""


def sizes(text: str) -> list[float]:
    """Return the sizes in a line, in bytes."""
    return [float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+) (kB|MB|GB)", text)]


def on_disk(folder: Path) -> int:
    """Return the bytes of a run folder's files; several names of a file count once."""
    files = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(files.values())


def test_printed_disk_use_is_what_a_run_leaves(
    tmp_path: Path, run_command: Callable[..., launcher.Result]
) -> None:
    """Two checkpoints are kept, and best.h5 where it is an older one, so at most three."""
    (tmp_path / "t.toml").write_text(TABLE, encoding="utf-8")
    said = run_command("reproduce", "t.toml", "--out", "out").out
    dry = {line.split()[0]: sizes(line) for line in said.splitlines() if re.match(r"\w+ +1 +5 ", line)}
    plans = [line for line in said.splitlines() if line.startswith("disk: ") and "each" in line]
    for name, plan in zip(("pfedmoe", "fedproto", "fedmrl"), plans, strict=True):
        assert ": 2 checkpoints and best.h5 of " in plan and "(run.keep = 2)" in plan
        total, each, metrics, frozen = sizes(plan)
        run = tmp_path / "out" / name
        (file,) = (run / "frozen").iterdir()
        assert file.stat().st_size == pytest.approx(frozen, rel=0.05, abs=20_000)
        names = {path.stem for path in (run / "checkpoints").iterdir()}
        assert names == {"best", "round-000004", "round-000005"}
        last = (run / "checkpoints" / "round-000005.h5").stat().st_size
        assert last == pytest.approx(each, rel=0.05, abs=60_000), "headers and layouts"
        rows = (run / "metrics.jsonl").stat().st_size + on_disk(run / "measured")
        assert rows == pytest.approx(metrics, rel=0.5)
        assert 2 / 3 * total <= on_disk(run) * 1.02 and on_disk(run) <= total * 1.02 + 200_000
        assert dry[name] == [total], "the table's line and the run's plan"
    (line,) = [line for line in said.splitlines() if "when all are finished" in line]
    assert sizes(line)[0] == pytest.approx(sum(size for (size,) in dry.values()), rel=0.01)


def test_table_too_large_for_the_disk_is_announced(
    tmp_path: Path, run_command: Callable[..., launcher.Result]
) -> None:
    large = TABLE.replace("rounds = 5", "rounds = 1000000\nrun.keep = 1000000")
    (tmp_path / "t.toml").write_text(large, encoding="utf-8")
    said = run_command("reproduce", "t.toml", "--only", "fedproto", "--dry").out
    assert "this is not enough: --run.keep 1 keeps fewer checkpoints" in said
    assert "TB free" in said or "GB free" in said or "MB free" in said


def test_files_are_those_that_run_keep_allows() -> None:
    assert DiskUse(10**6, 3, 0).line(2).startswith("disk: up to 3 MB: 2 checkpoints and best.h5 of 1 MB each")
    assert DiskUse(10**6, 1, 0).line(2).startswith("disk: up to 1 MB: 1 checkpoint of 1 MB each")


@pytest.mark.parametrize(
    ("size", "text"),
    [(500, "0.5 kB"), (999_600, "1 MB"), (128.1e6, "128 MB"), (51_840e6, "51.8 GB"), (4.2e15, "4,200 TB")],
)
def test_sizes_have_three_digits(size: float, text: str) -> None:
    assert in_units(size) == text
