"""The job scripts do what their comments say, run as Slurm's batch shell would, without Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.reproduce import grid
from support import launcher
from support.paths import JOBS

README = (JOBS / "README.md").read_text(encoding="utf-8")
QUICK = ("--model.pool", "mlp5", "--model.shared", "mlp5", "--clients", "4")
SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_JOB_ID": "17"}


def batch_shell(
    tmp_path: Path, script: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    name = {"SLURM_JOB_NAME": script.partition(".")[0]}
    return subprocess.Popen(
        ["bash", str(JOBS / script), *arguments],
        cwd=tmp_path,
        env=launcher.clean_environment("mpich", {**path, **SLURM, **name, **(env or {})}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_train_script_ends_with_the_exit_code_and_last_line(tmp_path: Path) -> None:
    good = launcher.wait_for_end(batch_shell(tmp_path, "train.slurm", *QUICK, "--rounds", "1"), 120)
    said = good.out.splitlines()
    assert good.code == 0 and "exit code 0" in said[-2], good.out + good.err
    assert json.loads(said[-1]) == launcher.read_events(tmp_path / "runs" / "train-17")[-1]
    bad = launcher.wait_for_end(batch_shell(tmp_path / "runs", "train.slurm", "--rounds", "0"), 120)
    assert bad.code == 2 and "rounds" in bad.err and "tail" not in bad.err, bad.out + bad.err


def test_train_script_forwards_the_signal_and_waits(tmp_path: Path) -> None:
    """The signal is sent several times."""
    endless = ("--rounds", "5000", "--run.checkpoint_every", "5000", "--train.epochs", "5")
    shell = batch_shell(tmp_path, "train.slurm", *QUICK, *endless)
    run = tmp_path / "runs" / "train-17"
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and shell.poll() is None, "no start"
            time.sleep(0.05)
        while shell.poll() is None and time.monotonic() < deadline:
            shell.send_signal(signal.SIGUSR1)
            shell.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        result = launcher.wait_for_end(shell, 60)
    finally:
        launcher.kill_tree(shell.pid)
    assert result.code == 75 and "exit code 75" in result.out.splitlines()[-2], result.out + result.err
    assert list((run / "checkpoints").glob("round-*.h5"))


def printed_command(tmp_path: Path, script: str, env: dict[str, str]) -> launcher.Result:
    """Return the command a script would start: with LAUNCH=echo it is printed."""
    shell = batch_shell(tmp_path, script, "my.toml", "--rounds", "3", env={"LAUNCH": "echo", **env})
    return launcher.wait_for_end(shell, 20)


@pytest.mark.parametrize("script", ["train.slurm", "requeue.slurm", "gpu.slurm"])
def test_scripts_restart_an_existing_run(tmp_path: Path, script: str) -> None:
    run = f"runs/{script.partition('.')[0]}-17"
    said = printed_command(tmp_path, script, {}).out
    assert f"-m pfedmoe_mpi my.toml --rounds 3 --run.dir {run} --run.force true\n" in said
    assert (
        "-m pfedmoe_mpi restart runs/other\n"
        in printed_command(tmp_path, script, {"RUN_DIR": "runs/other"}).out
    )
    (tmp_path / run).mkdir(parents=True)
    (tmp_path / run / "config.toml").touch()
    assert f"-m pfedmoe_mpi restart {run}\n" in printed_command(tmp_path, script, {}).out


def test_ranks_that_share_a_gpu_share_its_cores(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/bash\necho srun "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    node = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
    env = {**node, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def said(**more: str) -> launcher.Result:
        shell = batch_shell(tmp_path, "gpu.slurm", "my.toml", env={**env, **more})
        return launcher.wait_for_end(shell, 20)

    wanted = "srun --ntasks={} --ntasks-per-node={} --cpus-per-task={} --cpu-bind=cores"
    assert wanted.format(8, 4, 8) in said().out
    assert wanted.format(32, 16, 2) in said(RANKS_PER_GPU="4").out
    refused = said(RANKS_PER_GPU="9")
    assert refused.code == 2 and "RANKS_PER_GPU = 9, but a GPU has 8 cores" in refused.err


def test_array_index_selects_seed_and_algorithm(tmp_path: Path) -> None:
    tasks = {}
    for number in range(9):
        task = {"SLURM_ARRAY_TASK_ID": str(number)}
        words = printed_command(tmp_path, "array.slurm", task).out.split()
        tasks[words[words.index("--algorithm") + 1], words[words.index("--seed") + 1]] = words
    assert {seed for _, seed in tasks} == {"0", "1", "2"} and len(tasks) == 9
    for (algorithm, seed), words in tasks.items():
        assert words[words.index("--run.dir") + 1] == f"runs/array-17/{algorithm}-{seed}"
    beyond = printed_command(tmp_path, "array.slurm", {"SLURM_ARRAY_TASK_ID": "9"})
    assert beyond.code == 2 and "from 0 to 8" in beyond.err and not beyond.out


TABLE = """\
[base]
rounds = 1
clients = 4
model.pool = ["mlp5"]
model.shared = "mlp5"
[axis]
algorithm = ["standalone", "pfedmoe"]
seed = [0, 1]
"""


def test_table_script_runs_one_run_per_task(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(TABLE)
    for task, name in ((0, "standalone-seed0"), (3, "pfedmoe-seed1")):
        env = {"SLURM_ARRAY_TASK_ID": str(task), "LAUNCH": "echo"}
        (tmp_path / "runs" / "table-17" / name).mkdir(parents=True)
        (tmp_path / "runs" / "table-17" / name / "events.jsonl").write_text(f"of {name}\n")
        said = launcher.wait_for_end(
            batch_shell(tmp_path, "table.slurm", "my.toml", "--rounds", "3", env=env), 20
        )
        wanted = f"reproduce my.toml --rounds 3 --task {task} --out runs/table-17\n"
        assert said.code == 0 and f"-m pfedmoe_mpi {wanted}" in said.out, said.err
        assert said.out.splitlines()[-1] == f"of {name}", "the last words are the run's"
    env = {"SLURM_ARRAY_TASK_ID": "4", "LAUNCH": "echo"}
    beyond = launcher.wait_for_end(batch_shell(tmp_path, "table.slurm", "my.toml", env=env), 20)
    assert beyond.code == 2 and "from 0 to 3" in beyond.err and not beyond.out


def test_table_script_stops_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(TABLE)
    endless = ("--run.checkpoint_every", "5000", "--train.epochs", "5")
    env = {"SLURM_ARRAY_TASK_ID": "2"}
    shell = batch_shell(tmp_path, "table.slurm", "my.toml", *endless, "--rounds", "5000", env=env)
    run = tmp_path / "runs" / "table-17" / "pfedmoe-seed0"
    try:
        launcher.wait_for_file(run / "metrics.jsonl", shell)
        shell.send_signal(signal.SIGUSR1)
        result = launcher.wait_for_end(shell, 60)
    finally:
        launcher.kill_tree(shell.pid)
    assert result.code == 75 and json.loads(result.out.splitlines()[-1])["event"] == "stop", result.err
    done = len(launcher.read_metrics(run))
    env |= {"RUN_DIR": "runs/table-17"}
    again = batch_shell(tmp_path, "table.slurm", "my.toml", *endless, "--rounds", "5000", env=env)
    try:
        deadline = time.monotonic() + 60
        while len(launcher.read_metrics(run)) < done + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        again.send_signal(signal.SIGTERM)
        result = launcher.wait_for_end(again, 60)
    finally:
        launcher.kill_tree(again.pid)
    assert result.code == 75 and len(launcher.read_metrics(run)) >= done + 2, result.out + result.err


# What the tables of the papers hold, and what of it the papers say.
TABLES = {"fedjets": 30, "fedjets-ablation": 21, "pfedmoe-classes": 132, "pfedmoe-dirichlet": 120}
TABLES |= {
    "pfedmoe-extractor": 30,
    "pfedmoe-gate": 84,
    "pfedmoe-heterogeneous": 270,
    "pfedmoe-homogeneous": 270,
}


def test_digits_table_uses_the_defaults() -> None:
    runs = grid.expand(grid.read(JOBS / "tables" / "digits.toml"), {})
    assert len(runs) == 9 and {run.config.data.source for run in runs} == {"digits"}
    for run in runs:  # the defaults, so that the README's results on digits are its own
        own = {"algorithm": run.config.algorithm, "seed": run.config.seed}
        assert run.config.train == config.build(own).train and run.planned == config.build(own).rounds


def test_gate_start_compares_pairs() -> None:
    """Runs of a seed share data and partition, so that their differences are paired."""
    runs = grid.expand(grid.read(JOBS / "tables" / "gate-start.toml"), {})
    assert len(runs) == 5 * 2 * 8
    for seed in range(5):
        of_seed = [run.config for run in runs if run.config.seed == seed]
        assert len(of_seed) == 16 and len({(str(each.data), str(each.partition)) for each in of_seed}) == 1
    gates = {(c.gate.start, c.options.mixture) for r in runs if (c := r.config).algorithm == "pfedmoe"}
    assert gates == {(start, mixture) for start in ("paper", "even") for mixture in ("mean", "sum")}


def test_hospitals_choose_and_report_on_other_seeds() -> None:
    table = grid.read(JOBS / "tables" / "hospitals.toml")
    runs = grid.expand(table, {})
    assert len(runs) == 72 and {run.config.seed for run in runs} == {0, 1, 2}
    assert all(run.config.partition.validation == 0.2 for run in runs)
    assert not {0, 1, 2} & {*table.select["fresh"]}


# Tables of questions that the papers leave open: runs, and methods on the same data.
QUESTIONS = {
    "first-experiments": (90, 6),
    "gate-design": (110, 22),
    "unlike-clients": (90, 6),
    "drift": (90, 6),
    "shared-extractors": (45, 9),
    "sum-or-last": (60, 4),
    "gate-start-hundred": (50, 10),
}
TEN, HUNDRED = (10, 1.0, 60), (100, 0.1, 300)
SCALES = {"sum-or-last": {TEN, HUNDRED}, "gate-start-hundred": {HUNDRED}}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_answered_at_one_scale(name: str) -> None:
    """Ten clients of 1,000 images, 60 rounds, or a hundred of 100; five seeds, whose data methods share."""
    runs = grid.expand(grid.read(JOBS / "tables" / f"{name}.toml"), {})
    number, methods = QUESTIONS[name]
    assert len(runs) == number and {run.config.seed for run in runs} == {0, 1, 2, 3, 4}
    problems: dict[str, int] = {}
    scales = set()
    for run in runs:
        made = run.config
        scales.add((made.clients, made.participation, run.planned))
        assert made.data.path == str((JOBS / "tables").resolve() / "../data/cifar10/test")
        parts = made.partition
        assert (1 - parts.test_fraction) * (1 - parts.validation) == pytest.approx(0.8, abs=1e-4)
        key = f"{made.seed} {made.clients} {made.data} {parts} {made.stream}"
        problems[key] = problems.get(key, 0) + 1
    assert set(problems.values()) == {methods}
    assert scales == SCALES.get(name, {TEN})


def test_hundred_clients_are_the_same_in_both_tables() -> None:
    """Runs of `sum-or-last` with a hundred clients answer for those of `gate-start-hundred`, too."""
    found = []
    for table, name in (("sum-or-last", "seed0-hundred-sum"), ("gate-start-hundred", "seed0-even_sum")):
        runs = grid.expand(grid.read(JOBS / "tables" / f"{table}.toml"), {})
        made = next(run.config.model_dump() for run in runs if run.name == name)
        assert made["gate"].pop("start") in ("auto", "even") and made["pfedmoe"].pop("mixture") == "sum"
        found.append({section: value for section, value in made.items() if section != "run"})
    assert found[0] == found[1]


def test_ag_news_chooses_and_reports_on_five_other_seeds() -> None:
    table = grid.read(JOBS / "tables" / "ag-news.toml")
    runs = grid.expand(table, {})
    assert len(runs) == 4 * 3 * 3 and all(run.config.partition.validation for run in runs)
    assert len({*table.select["fresh"]} - {run.config.seed for run in runs}) == 5


@pytest.mark.parametrize(
    ("name", "unit"), [("digits", "sample"), ("clients", "client"), ("cifar10", "sample")]
)
def test_privacy_tables_compare_methods_at_equal_epsilon(name: str, unit: str) -> None:
    """Each protection has a run without noise on the same clients, so that differences are paired."""
    runs = [run.config for run in grid.expand(grid.read(JOBS / "tables" / f"privacy-{name}.toml"), {})]
    found: dict[tuple[int, int, str], set[tuple[str, float]]] = {}
    for made in runs:
        key = (made.seed, made.clients, made.algorithm)
        found.setdefault(key, set()).add((made.privacy.unit, made.privacy.epsilon))
    assert {key[0] for key in found} == {0, 1, 2} and len(found) == 3 * 3
    assert {key[2] for key in found} == {"pfedmoe", "fedavg", "fedrep"}
    wanted = {(unit, e) for e in (1.0, 2.0, 4.0, 8.0, 16.0)} | {("client", 0.0)}
    assert all(each == wanted for each in found.values()) and len(runs) == 6 * len(found)
    assert all(made.privacy.sampling == "poisson" for made in runs if made.privacy.clip)
    assert all(made.privacy.delta < 1 / made.clients for made in runs)


PRIVACY = ("privacy-digits", "privacy-clients", "privacy-cifar10")
OURS = ("digits", "gate-start", "five-hundred-rounds", "hospitals", "ag-news", *PRIVACY, *QUESTIONS)
PAPERS = sorted(path for path in (JOBS / "tables").glob("*.toml") if path.stem not in OURS)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_paper_tables_are_valid(path: Path) -> None:
    runs = grid.expand(grid.read(path), {})
    assert len(runs) == TABLES[path.stem]
    for run in runs:
        made = run.config
        assert made.data.path == str(path.parent.resolve() / "../data")
        assert made.train.momentum == 0.9 and made.train.lr == made.train.lr_shared == 0.01
        assert made.cohort_size == 10, "in both papers ten clients train in a round"
        if path.stem.startswith("pfedmoe"):
            assert (made.gate.start, made.pfedmoe.mixture) == ("paper", "mean"), "pFedMoE as published"
        jets = path.stem.startswith("fedjets")
        assert (made.train.batch, made.train.epochs) == ((256, 1) if jets else (512, 10))
        assert run.planned == (2000 if jets and made.data.name == "CIFAR100" else 1250 if jets else 500)
    assert {run.config.seed for run in runs} == {0, 1, 2}


def test_main_tables_have_the_papers_settings() -> None:
    for kind, cifar in (("homogeneous", 1), ("heterogeneous", 5)):
        runs = grid.expand(grid.read(JOBS / "tables" / f"pfedmoe-{kind}.toml"), {})
        cells = {run.config.run.cell for run in runs}
        assert len(cells) == 3 * 3 * 10
        for run in runs:
            made = run.config
            sizes = (made.clients, made.participation)
            assert sizes in {(10, 1.0), (50, 0.2), (100, 0.1)} and len(made.model.pool) == cifar
            assert made.partition.kind == "pathological"
            assert made.partition.classes == (10 if made.data.name == "CIFAR100" else 2)
            assert made.model.pool[0] == ("mnist1" if made.data.name == "MNIST" else "cnn1")


def test_five_hundred_rounds_are_the_main_tables() -> None:
    """But for the image files, epochs with N = 10, when it is measured, and pFedMoE's second run."""
    main = grid.expand(grid.read(JOBS / "tables" / "pfedmoe-heterogeneous.toml"), {})
    published = {run.config.run.cell: run.config for run in main if run.config.seed == 0}
    runs = grid.expand(grid.read(JOBS / "tables" / "five-hundred-rounds.toml"), {})
    assert len(runs) == 2 * 5 and {run.planned for run in runs} == {500}
    for run in runs:
        made, label = run.config, run.config.run.cell.split("/")[1]
        sizes = (made.clients, made.train.epochs)
        assert sizes in {(10, 1), (100, 10)}
        other = published[f"cifar10-n{made.clients}/{made.algorithm}"]
        theirs = other.train.model_copy(update={"epochs": made.train.epochs})
        assert made.train == theirs and made.partition == other.partition and made.model == other.model
        assert made.participation == other.participation
        if made.algorithm == "pfedmoe":
            wanted = ("auto", "sum") if label == "pfedmoe" else ("paper", "mean")
            assert (made.gate.start, made.options.mixture) == wanted


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.name)
def test_example_configurations_are_valid(path: Path) -> None:
    config.build(config.read_toml(path))


SCRIPTS = sorted(JOBS.glob("*.slurm"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_need_no_editing(script: Path) -> None:
    """Account and partition are options of sbatch; what else a site may need is there as a comment."""
    text = script.read_text(encoding="utf-8")
    assert "#     sbatch -A ACCOUNT -p PARTITION" in text and f" jobs/{script.name} " in text
    options = [line.partition("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --mem-per-cpu" in options and len(options) == len(set(options))
    assert not {"#SBATCH --account", "#SBATCH --partition"} & set(options)
    assert "\n# module load " in text and '/bin/activate"\n' in text
    assert f"sbatch -A ACCOUNT -p PARTITION jobs/{script.name} jobs/" in README or script.stem == "table"


def test_table_jobs_are_throttled_and_speak_of_disk() -> None:
    text = (JOBS / "table.slurm").read_text(encoding="utf-8")
    assert "--array=0-269%20 jobs/table.slurm" in text and "#SBATCH --array=0-8%20\n" in text
    assert "--array=0-269%20 jobs/table.slurm" in README
    assert "# Disk: " in text and "\n## Disk\n" in README


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_run_in_a_container(tmp_path: Path, script: Path) -> None:
    """A program `apptainer` that runs the command on the host takes the place of the real one."""
    (tmp_path / "apptainer").write_text(
        '#!/bin/sh\necho "$*" >> "$LOG"\nshift 2\nexec "$@"\n', encoding="utf-8"
    )
    (tmp_path / "apptainer").chmod(0o755)
    (tmp_path / "my.toml").write_text(TABLE, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"CONTAINER": "image.sif", "SLURM_ARRAY_TASK_ID": "0", "PATH": path, "LOG": str(tmp_path / "log")}
    said = printed_command(tmp_path, script.name, env)
    assert said.code == 0, said.err
    assert "apptainer exec image.sif python -m pfedmoe_mpi " in said.out, "what $launch starts"
    inside = (tmp_path / "log").read_text(encoding="utf-8") if script.stem == "table" else ""
    assert inside.startswith("exec image.sif python -m pfedmoe_mpi reproduce") == (script.stem == "table")
