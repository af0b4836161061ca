"""Tables as files, and `reproduce`, which trains them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.reproduce import command, grid
from support import launcher
from support.files import path_digest
from support.mpi_job import run_module
from support.paths import ROOT
from support.text_files import HOSPITALS, write_hospitals, write_news, write_stories

TABLE = """\
title = "Two methods, two numbers of clients"
floor = 2
in_rounds = ["fedkd.ramp"]

[base]
rounds = 10
data.source = "synthetic"
data.samples = 200
data.size = 8
model.pool = ["mlp5", "mlp4"]
model.shared = "mlp5"
train.device = "cpu"

[axis.clients.n4]
clients = 4
[axis.clients.n8]
clients = 8
participation = 0.5

[axis]
algorithm = ["pfedmoe", "standalone"]
seed = [0, 1]
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(TABLE)
    return path


# The file


def test_run_of_an_earlier_version_did_not_do_what_a_later_setting_asks_for(
    table: Path, tmp_path: Path
) -> None:
    run, *_ = grid.expand(grid.read(table), {})
    text = config.to_toml(run.config)
    assert 'optimiser = "sgd"\n' in text
    (tmp_path / "config.toml").write_text(text.replace('optimiser = "sgd"\n', "", 1), encoding="utf-8")
    assert command._rounds_left(tmp_path, run, choosing=False) == 10
    adam, *_ = grid.expand(grid.read(table), {"train.optimiser": "adam"})
    with pytest.raises(ConfigError, match=r"with other settings: train\.optimiser sgd → adam"):
        command._rounds_left(tmp_path, adam, choosing=False)


def test_methods_and_models_from_files(tmp_path: Path) -> None:
    """Their settings stand in the table, and their short names in the runs' names and cells."""
    shutil.copytree(ROOT / "tests" / "strangers", tmp_path / "code")
    (tmp_path / "own.toml").write_text(
        'in_rounds = ["fedkd.ramp"]\n[base]\nnear.weight = 0.25\n[axis]\n'
        'algorithm = ["./code/near.py", "fedavg"]\n"model.pool" = ["code/nets.py:TinyViT", "cnn5"]\n'
        "[axis.rate.low]\ntrain.lr = 0.01\n"
    )
    runs = grid.expand(grid.read(tmp_path / "own.toml"), {})
    assert [run.name for run in runs] == [
        f"{method}-{model}-low" for method in ("near", "fedavg") for model in ("TinyViT", "cnn5")
    ]
    assert runs[0].config.options.weight == 0.25 and runs[0].config.run.cell == "TinyViT-low/near"
    assert runs[0].config.algorithm == str(tmp_path / "code" / "near.py")
    (tmp_path / "own.toml").write_text('[axis]\nalgorithm = ["./code/near.py"]\n"near.wight" = [1]\n')
    with pytest.raises(ConfigError, match=r"unknown near\.wight in \[axis\]; did you mean 'near\.weight'"):
        grid.read(tmp_path / "own.toml")


def test_runs_are_the_product_of_the_axes_in_order(table: Path) -> None:
    runs = grid.expand(grid.read(table), {})
    names = [f"{n}-{a}-seed{s}" for n in ("n4", "n8") for a in ("pfedmoe", "standalone") for s in (0, 1)]
    assert [run.name for run in runs] == names
    last = runs[-1].config
    assert (last.clients, last.participation, last.algorithm, last.seed) == (8, 0.5, "standalone", 1)
    assert (last.rounds, last.data.samples, last.model.pool) == (10, 200, ("mlp5", "mlp4"))
    assert (last.run.table, last.run.cell, last.run.scale) == ("two", "n8/standalone", 1.0)
    assert [run.group for run in runs[-2:]] == ["n8-standalone"] * 2


def test_axis_takes_what_base_takes(tmp_path: Path) -> None:
    """Sections, lists, small numbers, and paths; labels name folders."""
    (tmp_path / "own.toml").write_text(
        '[axis]\ntrain.lr = [1e-5, 0.5]\nmodel.pool = [["mlp5", "mlp4"], ["mlp5"]]\n'
        'data.path = ["../a/b.h5"]\n'
        "train.betas = [[0.5, 0.9]]\ntrain.augment = [[], ['flip']]\nrun.tensorboard = [true]\n"
    )
    runs = grid.expand(grid.read(tmp_path / "own.toml"), {})
    first, last = runs[0], runs[-1]
    assert first.name == "lr0.00001-betas0.5+0.9-augmentnone-mlp5+mlp4-b.h5-tensorboardtrue"
    assert last.name == "lr0.5-betas0.5+0.9-flip-mlp5-b.h5-tensorboardtrue"
    assert (first.config.train.lr, first.config.model.pool) == (1e-5, ("mlp5", "mlp4"))
    assert first.config.data.path == str(tmp_path / ".." / "a" / "b.h5")


def test_scale_shrinks_rounds_down_to_the_minimum(table: Path) -> None:
    table.write_text(
        TABLE.replace('"standalone"]', '"fedkd"]').replace("rounds = 10", "rounds = 100"), encoding="utf-8"
    )
    read = grid.read(table)
    for scale, rounds in ((0.3, 30), (0.101, 11), (0.001, 2)):
        run = grid.expand(read, {"fedkd.ramp": 40} if rounds == 2 else {}, scale)[2].config
        assert (run.algorithm, run.rounds, run.run.scale) == ("fedkd", rounds, rounds / 100)
        ramp = getattr(run, "fedkd").ramp  # noqa: B009
        assert ramp == (40 if rounds == 2 else round(0.4 * rounds)), "as asked for, or the default scaled too"
    own = grid.expand(read, {"rounds": "50", "train.epochs": "2", "run.keep": "1"})[0].config.run
    assert own.scale == 0.5 and own.altered == ("train.epochs",), (
        "what makes it another table, and nothing else"
    )
    table.write_text(TABLE.replace("rounds = 10", "rounds = 3000"), encoding="utf-8")
    share = grid.expand(grid.read(table), {"rounds": 100})[0].config.run.scale
    assert round(100 / share) == 3000, "reports compute the table's rounds from it"


def test_only_and_task_select_runs(table: Path) -> None:
    def names(only: str, task: str = "") -> list[str]:
        return [run.name for run in grid.expand(grid.read(table), {}, only=only, task=task)]

    assert names("n8-*0, *alone-seed1") == [
        *("n4-standalone-seed1", "n8-pfedmoe-seed0", "n8-standalone-seed0", "n8-standalone-seed1")
    ]
    assert names("n8-*", "2") == ["n8-standalone-seed0"]
    assert [names("", str(task)) for task in range(8)] == [[name] for name in names("")]
    for only, task in (("n9-*", ""), ("", "8"), ("n8-*", "4"), ("", "x"), ("", "9" * 5000)):
        with pytest.raises(ConfigError):
            names(only, task)


def test_huge_table_is_counted_and_not_expanded(table: Path, assert_refused: Callable[..., str]) -> None:
    """Four axes of 300 points: one run is built at once, all are refused at once."""
    points = f"{[round(0.0001 * k, 4) for k in range(1, 301)]}"
    axes = "".join(f'"train.{name}" = {points}\n' for name in ("lr", "lr_shared", "lr_gate"))
    text = f"{TABLE.partition('[axis.')[0]}[axis]\n{axes}seed = {list(range(300))}\n"
    table.write_text(text, encoding="utf-8")
    read = grid.read(table)
    assert read.size == 300**4
    for task, name in ((0, "lr0.0001-lr_shared0.0001-lr_gate0.0001-seed0"), (300**4 - 1, "")):
        (run,) = grid.expand(read, {}, task=str(task))
        assert run.name == (name or "lr0.03-lr_shared0.03-lr_gate0.03-seed299")
    assert run.config.train.lr_shared == 0.03 and run.config.seed == 299
    many = "has 8,100,000,000 runs here, and reproduce"
    for flags in (("--list", "true"), ("--dry", "true"), ()):
        said = assert_refused(f"{many} builds at most 10,000", "reproduce", table, *flags)
        assert "choose fewer with --only 'lr0.0001-" in said and "or --task 0" in said
    assert_refused(f"{many} compares names with --only", "reproduce", table, "--only", "*seed0")
    assert_refused("set --task from 0 to 8099999999", "reproduce", table, "--task", str(300**4))
    more = "".join(f'"train.{name}" = {points}\n' for name in ("momentum", "weight_decay", "clip"))
    table.write_text(f"{text}{more}'faults.dropout' = {points}\n", encoding="utf-8")
    assert_refused(f"has {300**8:,} runs here", "reproduce", table, "--list")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("rounds = 10", "rounds = 0"), r"run n4-pfedmoe-seed0: rounds"),
        (('"standalone"', '"fedavk"'), "no algorithm 'fedavk'.*fedavg"),
        (("clients = 8\n", "clienst = 8\n"), r"unknown clienst in \[axis.clients.n8\].*clients"),
        (("floor = 2", "flor = 2"), "unknown key 'flor'.*floor"),
        (("floor = 2", "floor = 0"), "floor = 0"),
        (('"fedkd.ramp"', '"fedkd.rump"'), "in_rounds"),
        (('"fedkd.ramp"', '"data.path"'), "in_rounds"),
        (("seed = [0, 1]", "seed = []"), "axis seed without points"),
        (("seed = [0, 1]", "train.lr = 0.1"), r'axis train without points(.|\n)*"train.lr" = \[1, 2\]'),
        (("seed = [0, 1]", 'train.lr = [1]\n"train.lr" = [2]'), r"the axis train.lr twice"),
        (
            ("seed = [0, 1]", "train.lr = [-1]"),
            r"label 'lr-1' on the axis train.lr(.|\n)*\[axis.NAME.LABEL\]",
        ),
        (("seed = [0, 1]", "seed = [0, 0]"), "two points with the label seed0 on the axis seed"),
        (("clients = 8\nparticipation = 0.5", "clients = 4"), "two runs with the same configuration"),
        (("[axis.clients.n4]", "[axis.clients.'../n4']"), r"label '\.\./n4'"),
        (("train.device", "run.dir"), "sets run.dir"),
        (("[base]", "[base"), "cannot read .*as TOML"),
    ],
)
def test_bad_table_is_one_message(
    table: Path, assert_refused: Callable[..., str], change: tuple[str, str], said: str
) -> None:
    assert change[0] in TABLE
    table.write_text(TABLE.replace(*change), encoding="utf-8")
    assert_refused(said, "reproduce", table)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--scale", "0"), "--scale: expected a number above 0"),
        (("--scale", "x"), "--scale: expected a number above 0"),
        (("--seed", "5"), "--seed is set by the axis seed"),
        (("--run.dir", "here"), "--run.dir is set by"),
        (("--rounds", "5", "--scale", "0.5"), "both change the rounds"),
        (("--only", "n5*"), "matches no run of the table"),
        (("--task", "8"), "no such run"),
        (("--clients", "8"), "by the axis clients"),
        (("--partition.min_samples", "60"), "run n4-pfedmoe-seed0: clients = 4"),
        (("--data.source", "hdf5", "--data.path", "none.h5"), "none.h5"),
    ],
)
def test_bad_flags_are_refused_before_writing(
    table: Path, assert_refused: Callable[..., str], flags: tuple[str, ...], said: str
) -> None:
    assert_refused(said, "reproduce", table, *flags)


# The command


def test_dry_run_prints_runs_and_cost_and_writes_nothing(
    table: Path, run_command: Callable[..., launcher.Result]
) -> None:
    before = sorted(table.parent.rglob("*"))
    said = run_command("reproduce", table, "--scale", "0.5", "--dry", "true", "--only", "*seed0").out
    assert sorted(table.parent.rglob("*")) == before
    assert "reduced scale: 5 rounds instead of the table's 10 (50 %)" in said
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.startswith("n")}
    assert set(lines) == {"n4-pfedmoe", "n4-standalone", "n8-pfedmoe", "n8-standalone"}
    # 200 rows, 8 : 2, 5 rounds; half of eight clients a round
    counted = {name: (words[0], words[1], int(words[2].replace(",", ""))) for name, words in lines.items()}
    assert counted["n4-pfedmoe"] == ("1", "5", 800)
    assert counted["n8-standalone"][2] == pytest.approx(400, abs=10)
    assert all(float(words[3]) > 0 for words in lines.values())
    assert "left to do: 4 runs, 20 rounds, 2,3" in said and "training samples, about" in said
    more = run_command("reproduce", table, "--rounds", "20", "--dry", "true", "--task", "3").out
    assert "\nother scale: 20 rounds instead of the table's 10 (200 %); reports mark this\n" in more
    assert run_command("reproduce", table, "--list", "true", "--task", "3").out == "n4-standalone-seed1\n"


@pytest.mark.parametrize("source", ["text", "words"])
def test_text_table_is_calibrated(
    tmp_path: Path, run_command: Callable[..., launcher.Result], source: str
) -> None:
    """The models' tokens and classes are known only once the data are distributed."""
    path = write_news(tmp_path / "news.csv") if source == "text" else write_stories(tmp_path / "stories")
    base = f'clients = 3\nrounds = 2\ndata.source = "{source}"\ndata.path = "{path}"\n'
    base += "partition.alpha = 9.0\n" if source == "text" else ""  # words name their clients
    (tmp_path / "t.toml").write_text(f"[base]\n{base}data.length = 6\n[axis]\nseed = [0, 1]\n")
    assert (
        "left to do: 2 runs, 4 rounds" in run_command("reproduce", tmp_path / "t.toml", "--dry", "true").out
    )


def test_fixed_turn_cost_does_not_grow_with_samples(
    table: Path, run_command: Callable[..., launcher.Result]
) -> None:
    """FedKD decomposes its shared model's change at a turn's end, far longer than an epoch here."""
    one = '"data.samples" = [400, 16000]\nalgorithm = ["fedkd"]\n'
    large = TABLE.replace('"mlp5", "mlp4"', '"mlp1"').replace('"mlp5"', '"mlp1"').partition("[axis.")[0]
    large = large.replace("data.samples = 200\n", "").replace("rounds = 10", "rounds = 10\nclients = 4")
    table.write_text(f"{large}[axis]\n{one}", encoding="utf-8")
    lines = run_command("reproduce", table, "--dry", "true").out.splitlines()
    few, many = (float(line.split()[4]) for line in lines if line.startswith("samples"))
    assert few < many < 32 * few, "of 40 times the samples"


def test_table_is_stopped_resumed_and_finished(table: Path, session: launcher.Session) -> None:
    """Its runs equal those of `run` bit for bit, whatever was trained in the same process before."""
    folder = table.parent
    flags = ("--only", "n8-*", "--out", str(folder / "out"), "--rounds", "6", "--run.checkpoint_every", "100")
    second = folder / "out" / "n8-pfedmoe-seed1"
    in_its_third_round = ("stop", "1", f"record:{6 + 3}")
    ended = run_module("fault_injection", *in_its_third_round, "reproduce", str(table), *flags, ranks=2)
    assert ended.code == 75, ended.output
    assert launcher.read_events(second)[-1]["event"] == "stop"
    assert not (folder / "out" / "n8-standalone-seed0").exists()
    first = path_digest(folder / "out" / "n8-pfedmoe-seed0")
    done = launcher.read_events(second)[-1]["round"]
    dry = session("reproduce", str(table), *flags, "--dry", "true", cwd=folder)
    assert f"left to do: 3 runs, {18 - done} rounds" in dry.out
    again = session("reproduce", str(table), *flags, cwd=folder, timeout=120)
    assert again.code == 0, again.err
    assert "4 runs in" in again.out and "1 of them finished" in again.out
    assert path_digest(folder / "out" / "n8-pfedmoe-seed0") == first, "a finished run is left alone"
    assert launcher.read_events(second)[-2]["event"] == "restart"
    for name in ("n8-pfedmoe-seed1", "n8-standalone-seed1"):
        assert launcher.read_events(folder / "out" / name)[-1]["event"] == "finish"
        alone = ("--run.dir", f"alone/{name}")
        result = session(str(folder / "out" / name / "config.toml"), *alone, cwd=folder)
        assert result.code == 0, result.err
        ours = launcher.checkpoint_digest(folder / "out" / name, 6)
        assert ours == launcher.checkpoint_digest(folder / "alone" / name, 6)
        said = (folder / "out" / name / "log" / "rank-0000.txt").read_text()
        assert "round 6/6" in said and said.count("clients after round") == 1, "each run has its own log"
    other = session("reproduce", str(table), "--only", "n8-*", "--out", "out", "--scale", "0.5", cwd=folder)
    launcher.error_message(other, "contains a run with other settings: rounds 6 → 5")
    for pool, code in (('["MLP-5", "mlp4"]', 0), ('["mlp5"]', 2)):
        table.write_text(TABLE.replace('["mlp5", "mlp4"]', pool), encoding="utf-8")
        edited = session("reproduce", str(table), *flags, cwd=folder)
        assert edited.code == code and ("4 of them finished" in edited.out) == (not code), edited.err
    launcher.error_message(
        edited, r"contains a run with other settings: model.pool \['mlp5', 'mlp4'\] → \['mlp5'\]"
    )


def test_diverging_run_does_not_end_the_others(table: Path, session: launcher.Session) -> None:
    table.write_text(TABLE.replace("seed = [0, 1]", '"train.lr" = [1e30, 0.05]'), encoding="utf-8")
    result = session("reproduce", str(table), "--only", "n4-pfedmoe-*", "--out", "out", cwd=table.parent)
    out = table.parent / "out"
    kinds = {path.name: launcher.read_events(path)[-1]["event"] for path in out.iterdir()}
    assert list(kinds.values()).count("finish") == 1 and list(kinds.values()).count("error") == 1, kinds
    assert result.code == 1 and "failed: n4-pfedmoe-lr1e+30" in result.out, result.err
    assert result.err.count("error: ") == 1


def test_table_run_takes_the_settings_its_data_propose(tmp_path: Path, session: launcher.Session) -> None:
    """It equals the run of the same settings without a table; the table's own settings and rounds win."""
    write_hospitals(tmp_path / "hospitals")
    settings = 'data.source = "heart"\ndata.path = "hospitals"\nmodel.dim = 16\ntrain.lr_shared = 0.02\n'
    (tmp_path / "wards.toml").write_text(f"[base]\n{settings}rounds = 2\n[axis]\nseed = [1]\n")
    table = ("reproduce", "wards.toml", "--out", "out")
    result = session(*table, cwd=tmp_path)
    assert result.code == 0, result.err
    ours = tmp_path / "out" / "seed1"
    taken = config.read_toml(ours / "config.toml")
    assert (taken["clients"], taken["partition.kind"]) == (len(HOSPITALS), "natural")
    assert (taken["train.lr"], taken["train.lr_shared"], taken["rounds"]) == (0.005, 0.02, 2)
    (tmp_path / "alone.toml").write_text(settings)
    alone = session("alone.toml", "--seed", "1", "--rounds", "2", "--run.dir", "alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    assert launcher.checkpoint_digest(ours, 2) == launcher.checkpoint_digest(tmp_path / "alone", 2)
    again = session(*table, cwd=tmp_path)
    assert again.code == 0 and "1 of them finished" in again.out, again.err
    other = session(*table, "--train.weight_decay", "0.5", cwd=tmp_path)
    launcher.error_message(other, "contains a run with other settings: train.weight_decay 0.03 → 0.5")


def test_runs_at_once_are_stopped_resumed_and_equal_runs_alone(
    table: Path, session: launcher.Session, assert_refused: Callable[..., str]
) -> None:
    """Three ranks train two runs at once, which a signal stops; two others diverge after that.

    Both parts begin with one of the two, and these have so many rounds that neither ends before the other
    one has begun.
    """
    assert_refused("--together = 2, but the job has 1 rank", "reproduce", table, "--together", "2")
    assert_refused("--together: expected a whole number above 0", "reproduce", table, "--together", "0")
    folder = table.parent
    table.write_text(TABLE.replace("seed = [0, 1]", '"train.lr" = [1e30, 0.05]'), encoding="utf-8")
    flags = ("reproduce", str(table), "--out", "out", "--together", "2", "--rounds", "200")
    ours = [f"n8-{method}-lr0.05" for method in ("pfedmoe", "standalone")]
    with launcher.running_job(3, *flags, "--only", "n8-*-lr0.05", cwd=folder) as job:
        for name in ours:
            launcher.wait_for_file(folder / "out" / name / "metrics.jsonl", job)
        job.send_signal(signal.SIGUSR1)
        out, err = job.communicate(timeout=120)
    assert job.returncode == 75, out + err
    for name in ours:
        assert launcher.read_events(folder / "out" / name)[-1]["event"] == "stop"
        assert f"\n{name} | round 1/200 " in out
    starts = [launcher.read_events(folder / "out" / name)[0] for name in ours]
    assert {start["ranks"] for start in starts} == {1, 2}, "all ranks are used"
    assert starts[0]["code"] == starts[1]["code"] != "", "which the first rank of the job knows"
    again = launcher.run_program(3, *flags, "--only", "n8-*", cwd=folder, timeout=240)
    assert again.code == 1 and "\nfailed: n8-pfedmoe-lr1e+30\nfailed: n8-standalone-lr1e+30\n" in again.out
    assert again.err.count(" | error: ") == 2, again.err
    result = session(f"out/{ours[0]}/config.toml", "--run.dir", f"alone/{ours[0]}", cwd=folder)
    assert result.code == 0, result.err
    digests = {launcher.checkpoint_digest(folder / where / ours[0], 200) for where in ("out", "alone")}
    assert len(digests) == 1
