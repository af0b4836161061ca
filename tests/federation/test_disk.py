"""The disk use that the plan and `reproduce --dry` print, compared with what runs leave."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.federation import disk
from pfedmoe_mpi.federation.build import build
from pfedmoe_mpi.federation.disk import Scratch, in_units, scratch_use
from pfedmoe_mpi.federation.loop import Loop, SilentObserver
from pfedmoe_mpi.run import old_checkpoints
from support import launcher
from support.small_federation import shared_comm

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
    """All clients train in every round: two complete checkpoints are kept, and best.h5, an older one."""
    (tmp_path / "t.toml").write_text(TABLE, encoding="utf-8")
    said = run_command("reproduce", "t.toml", "--out", "out").out
    dry = {line.split()[0]: sizes(line) for line in said.splitlines() if re.match(r"\w+ +1 +5 ", line)}
    plans = [line for line in said.splitlines() if line.startswith("disk: ") and "each" in line]
    scratch = [line for line in said.splitlines() if line.startswith("scratch: ")]
    assert scratch == ["scratch: nothing beyond run.memory, once about 6 of 6 clients have trained"] * 3
    for name, plan in zip(("pfedmoe", "fedproto", "fedmrl"), plans, strict=True):
        assert "(run.keep = 2)" in plan and "(run.checkpoint_every = 1)" in plan
        total, most, kept, best, metrics, frozen, each, _ = sizes(plan)
        assert kept + best == pytest.approx(most - each - metrics - frozen, rel=0.02), "while one is written"
        run = tmp_path / "out" / name
        (file,) = (run / "frozen").iterdir()
        assert file.stat().st_size == pytest.approx(frozen, rel=0.05, abs=20_000)
        names = {path.stem for path in (run / "checkpoints").iterdir()}
        assert names == {"best", "round-000004", "round-000005"}
        last = (run / "checkpoints" / "round-000005.h5").stat().st_size
        for planned in (each, kept / 2, best):
            assert last == pytest.approx(planned, rel=0.05, abs=60_000), "headers and layouts"
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


class Folder(SilentObserver):
    """The checkpoints of a run that keeps two; the lengths of all, and of the folder while one is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written_sizes: list[int] = []
        self.most = 0

    def written(self, path: Path, history: object, candidate: bool) -> None:
        self.most = max(self.most, on_disk(self.path))
        old_checkpoints.remove(self.path, self.path / "best.h5", 2, path)
        self.written_sizes.append(path.stat().st_size)


def test_plan_of_leaning_checkpoints_and_scratch_file_is_what_a_run_writes(tmp_path: Path) -> None:
    """Of 30 clients 2 train in a round; the memory is that of a third of them."""
    chosen = {
        **{"clients": 30, "participation": 0.06, "rounds": 40, "run.checkpoint_every": 2, "eval.every": 40},
        **{"data.source": "synthetic", "data.samples": 600, "data.size": 8, "train.epochs": 1},
        **{"model.pool": ["mlp5", "mlp4"], "model.shared": "mlp5", "model.dim": 12, "gate.hidden": 8},
        **{"run.memory": 0.003, "run.checkpoint_minutes": 0.0, "train.device": "cpu", "train.threads": 1},
    }
    federation = build(shared_comm(), config.build(chosen), warn=False)
    ranks = [disk.scratch_of(federation, "here")]
    use, scratch = disk.of_federation(federation, 1), scratch_use(federation, ranks)["here"]
    folder = Folder(tmp_path / "checkpoints")
    folder.path.mkdir()
    loop = Loop(shared_comm(), federation, folder, folder.path)
    assert loop.run()
    files = sorted(folder.path.iterdir())
    assert any(checkpoint.files_needed(path) for path in files)
    assert use.checkpoints == pytest.approx(on_disk(folder.path), rel=0.25)
    assert use.each == pytest.approx(sum(folder.written_sizes) / len(folder.written_sizes), rel=0.15)
    assert use.total + use.spare >= folder.most
    assert scratch == pytest.approx(federation.store._file._end, rel=0.15)
    check_plan_of_restart({**chosen, "rounds": 56, "eval.every": 56}, folder)

    def warnings(free: float, **changes: Any) -> list[str]:
        changed = replace(federation, config=federation.config.model_copy(update=changes))
        two = [replace(ranks[0], memory=1e9), Scratch("b", 0, free)]
        placed = replace(changed, home=[client % 2 for client in range(30)])
        lines = list(disk.lines(placed, two, tmp_path))
        assert re.match(r"scratch: [\d.]+ MB on b beyond run.memory, in .*, once about \d+ of 30 ", lines[0])
        return [line for line in lines if line.startswith("warning: ")]

    fast = federation.config.run.model_copy(update={"scratch": "/fast"})
    assert warnings(0) == [], "vectors are in the run folder"
    assert warnings(1e9, run=fast) == []
    (short,) = warnings(1e3, run=fast)
    assert "b has 1 kB free in run.scratch = /fast: another --run.scratch FOLDER" in short
    (short,) = warnings(0, rounds=10**12)
    assert "this disk is too small: --run.keep 1" in short


def test_plan_counts_that_the_last_round_measures_everybody() -> None:
    settings = {"data.source": "synthetic", "clients": 400, "rounds": 10, "eval.clients": 0.01}

    def metrics(last: str) -> int:
        chosen = config.build({**settings, "participation": 0.01, "eval.last": last})
        return disk.disk_use(chosen, 10, [20] * 400, 4_000, 10, 1, 0).metrics

    assert metrics("all") - metrics("drawn") == disk.BY_CLIENT * (400 - 8)


def check_plan_of_restart(chosen: dict[str, Any], folder: Folder) -> None:
    """What trained before stays in its checkpoint; the first of a fork is complete."""
    federation, before = build(shared_comm(), config.build(chosen), warn=False), len(folder.written_sizes)
    with Checkpoint(checkpoint.newest_first(folder.path)[0]) as loaded:
        done, elsewhere = (disk.Done.of(loaded, 30, stays) for stays in (True, False))
        assert sum(done.files) == sum(loaded.path.with_name(n).stat().st_size for n in loaded.places.files)
        loop = Loop(shared_comm(), federation, folder, folder.path)
        loop.resume(loaded)
        assert loop.run()
        complete = sum(4 * loaded.layout(client).size for client in loaded.trained)
    use, written = disk.of_federation(federation, 1, done), folder.written_sizes[before:]
    assert use.checkpoints == pytest.approx(on_disk(folder.path), rel=0.25)
    assert use.each == pytest.approx(sum(written) / len(written), rel=0.25)
    scratch = scratch_use(federation, [disk.scratch_of(federation, "here")], done)["here"]
    assert scratch == pytest.approx(federation.store._file._end, rel=0.25)
    forked = disk.of_federation(federation, 1, elsewhere)
    assert forked.each * 9 > complete + 8 * min(written), "the first of nine"


@pytest.mark.parametrize(
    ("size", "text"),
    [(500, "0.5 kB"), (999_600, "1 MB"), (128.1e6, "128 MB"), (51_840e6, "51.8 GB"), (4.2e15, "4,200 TB")],
)
def test_sizes_have_three_digits(size: float, text: str) -> None:
    assert in_units(size) == text
