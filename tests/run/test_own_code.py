"""Models, gates and methods of the user's own keep the promises of this program, from start to report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pfedmoe_mpi import load_client, load_run
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.errors import CheckpointError
from support import launcher
from support.launcher import SMALL_RUN, checkpoint_digest, error_message, read_metrics, run_to_end
from support.mpi_job import run_module
from support.paths import ROOT

STRANGERS = ROOT / "tests" / "strangers"
CASES = {
    "pfedmoe": (
        *(
            "--model.pool",
            "{}/nets.py:TinyViT,{}/nets.py:small_resnet",
            "--model.shared",
            "{}/nets.py:TinyViT",
        ),
        *("--gate.module", "{}/gates.py:Conv", "--model.dim", "12"),
    ),
    "near": (
        "--algorithm",
        "{}/near.py",
        "--near.weight",
        "0.5",
        "--model.pool",
        "{}/nets.py:small_resnet",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the strangers and a finished run of each case on one rank."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(STRANGERS, folder / "code", ignore=shutil.ignore_patterns("__pycache__"))
    for name in CASES:
        run_to_end(1, *flags(name, folder / "code"), "--run.dir", name, cwd=folder, own_job=True)
    return folder


def flags(name: str, code: Path) -> tuple[str, ...]:
    own = (word.replace("{}", str(code)) for word in CASES[name])
    return (*SMALL_RUN, *own, "--rounds", "2", "--run.checkpoint_every", "1")


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_three_ranks_and_after_a_stop(folder: Path, tmp_path: Path, name: str) -> None:
    expected = checkpoint_digest(folder / name, 2)
    # Files named relative to the current folder, and run on three ranks.
    own = (word.replace("{}", ".") for word in CASES[name])
    run_to_end(
        3,
        *(*SMALL_RUN, *own, "--rounds", "2", "--run.dir", str(tmp_path / "three")),
        cwd=folder / "code",
        own_job=True,
    )
    assert checkpoint_digest(tmp_path / "three", 2) == expected
    run = str(tmp_path / "stopped")
    ended = run_module(
        "fault_injection", "stop", "1", "training", *flags(name, folder / "code"), "--run.dir", run, ranks=2
    )
    assert ended.code == 75, ended.output
    run_to_end(3, "restart", run, cwd=tmp_path, own_job=True)
    assert checkpoint_digest(tmp_path / "stopped", 2) == expected


def test_it_begins_with_the_global_model(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    """Without steps every personal model is still the server's; the sum may round its last bits."""
    still = ("--train.lr", "0", "--train.lr_shared", "0", "--model.pool", "mlp5", "--run.dir", "run")
    result = session(*SMALL_RUN, "--algorithm", str(folder / "code" / "near.py"), *still, cwd=tmp_path)
    assert result.code == 0, result.err
    with Checkpoint(tmp_path / "run" / "checkpoints" / "round-000001.h5") as loaded:
        for client in range(loaded.clients):
            np.testing.assert_allclose(loaded.vector(client), loaded.state, atol=1e-6)


def test_names_are_short(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    run = load_run(folder / "pfedmoe")
    assert [run.architecture(k) for k in range(3)] == ["TinyViT", "small_resnet", "TinyViT"]
    assert load_run(folder / "near").algorithm == "near"
    assert session("report", str(folder / "pfedmoe"), "--out", str(tmp_path / "page"), cwd=tmp_path).code == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "small_resnet" in page and str(folder) not in page.replace(str(folder / "pfedmoe"), "")
    printed = session("inspect", str(folder / "near" / "checkpoints" / "best.h5"), cwd=tmp_path).out
    assert ": near, round" in printed


@pytest.mark.parametrize("name", CASES)
def test_loaded_client_predicts_what_the_run_measured(
    folder: Path, tmp_path: Path, session: launcher.Session, name: str
) -> None:
    newest = folder / name / "checkpoints" / "round-000002.h5"
    models = [load_client(newest, 1)]
    assert session("export", str(newest), "one.h5", "--client", "1", cwd=tmp_path).code == 0
    models.append(load_client(tmp_path / "one.h5"))
    assert session("data", "prepare", *flags(name, folder / "code"), "x.h5", cwd=tmp_path).code == 0
    with Checkpoint(newest) as loaded, h5py.File(tmp_path / "x.h5") as data:
        rows = np.sort(loaded.partition("test")[1])
        x, y = data["x"][rows], torch.from_numpy(data["y"][rows].astype(np.int64))
    accuracy = read_metrics(folder / name)[-1]["clients"]["accuracy"][1]
    for model in models:
        assert float((model.predict(x).argmax(1) == y).double().mean()) == pytest.approx(accuracy)


def test_changed_code_needs_permission(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    shutil.copytree(folder / "code", tmp_path / "code")
    shutil.copytree(folder / "near", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "round-000002.h5"
    moved = ("--run.code", str(tmp_path / "code"))
    assert session("restart", "run", *moved, "--rounds", "3", cwd=tmp_path).code == 0
    blocks = tmp_path / "code" / "blocks.py"  # imported by nets.py
    blocks.write_text(blocks.read_text() + "\nEXTRA = 1\n")
    for words in (("restart", "run", "--rounds", "4"), ("evaluate", str(newest))):
        message = error_message(
            session(*words, *moved, cwd=tmp_path), "your own code changed since the checkpoint"
        )
        assert "+EXTRA = 1" in message and "--run.changed_code true" in message
    with pytest.raises(CheckpointError, match=r"\+EXTRA = 1"):
        load_client(newest, 0, code=tmp_path / "code")
    assert load_client(newest, 0, code=tmp_path / "run" / "code").client == 0
    assert load_client(newest, 0, code=tmp_path / "code", changed_code=True).client == 0
    accepted = session("restart", "run", *moved, "--run.changed_code", "true", "--rounds", "4", cwd=tmp_path)
    assert accepted.code == 0 and "+EXTRA = 1" in accepted.err, accepted.err
    assert (tmp_path / "run" / "code" / "blocks.py").read_text().endswith("EXTRA = 1\n")
    assert len(read_metrics(tmp_path / "run")) == 4


def test_model_that_fails_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from mpi4py import MPI\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, shape, dim):\n        super().__init__()\n"
        "        assert MPI.COMM_WORLD.rank != 1, 'no host of mine'\n"
        "        self.layer = nn.Linear(shape[0] * shape[1] * shape[2], dim)\n"
        "    def forward(self, x):\n        return self.layer(x.flatten(1))\n"
    )
    words = (*SMALL_RUN, "--model.pool", "./nets.py:Net", "--model.dim", "8", "--run.timeout", "30")
    result = launcher.shared_session(2)(*words, "--run.dir", "run", cwd=tmp_path)
    error_message(result, "nets.py:8: AssertionError: no host of mine")


def test_missing_files_of_a_run(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    code = tmp_path / "code"
    shutil.copytree(folder / "code", code)
    run_to_end(1, *flags("near", code), "--rounds", "1", "--run.dir", "run", cwd=tmp_path, own_job=True)
    shutil.rmtree(code)
    error_message(
        session("restart", "run", "--rounds", "2", cwd=tmp_path), r"there is no file (.|\n)*--run\.code"
    )
    resumed = session("restart", "run", "--rounds", "2", "--run.code", "run/code", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert checkpoint_digest(tmp_path / "run", 2) == checkpoint_digest(folder / "near", 2)


def test_ranks_with_unlike_modules_are_refused(folder: Path, tmp_path: Path) -> None:
    """Each rank has an installation of its own, as on hosts of which one was not updated."""
    command = [str(Path(sys.executable).parent / "mpirun")]
    for name in ("a", "b"):
        shutil.copytree(folder / "code", tmp_path / name)
        (tmp_path / name / "nets.py").write_text((tmp_path / name / "nets.py").read_text() + f"# {name}\n")
        command += [":"] * (name == "b") + ["-n", "1", "-env", "PYTHONPATH", f"{ROOT}:{tmp_path / name}"]
        command += [sys.executable, "-m", "pfedmoe_mpi", *SMALL_RUN, "--model.pool", "nets:TinyViT"]
    job = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=launcher.clean_environment("mpich", {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    error_message(launcher.wait_for_end(job, 120), r"rank 1: nets\.py differs from rank 0's")
    assert not (tmp_path / "runs").exists()


def test_method_file_in_a_configuration(folder: Path, tmp_path: Path, session: launcher.Session) -> None:
    """Its path counts from the file's folder, and flags set its options."""
    shutil.copytree(folder / "code", tmp_path / "inner")
    toml = tmp_path / "inner" / "study.toml"
    toml.write_text(
        'algorithm = "./near.py"\n[near]\nweight = 0.5\n[model]\npool = ["nets.py:small_resnet"]\n'
    )
    words = (*SMALL_RUN[:8], "--rounds", "1", "--run.dir", "run", "--near.weight", "0.25")
    result = session("run", "inner/study.toml", *words, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "weight = 0.25" in (tmp_path / "run" / "config.toml").read_text()
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert event["event"] == "start"
    help_text = session("run", "--algorithm", "inner/near.py", "--help", cwd=tmp_path).out
    assert "--near.weight" in help_text and "λ, the weight of the distance" in help_text


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("fedavg.py", "", "'fedavg' is the name of another method; rename the file"),
        ("Near.py", "", "'Near' cannot be the name of settings"),
        ("train.py", "", "'train' is the name of a setting or section"),
        (
            "new.py",
            "import no_such_package\n",
            r"new\.py:1: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("new.py", "x = 1\n", "a method's file defines one subclass of Algorithm, this one none"),
        ("new.py", "def f(:\n", r"new\.py:1: "),
        (
            "new.py",
            "import torch\nfrom pfedmoe_mpi.algorithms.base import Algorithm\n"
            "torch.set_default_dtype(torch.float64)\nclass A(Algorithm): pass\n",
            r"code in new\.py calls torch\.set_default_dtype\(torch\.float64\)",
        ),
    ],
)
def test_method_files_that_cannot_be_used(
    tmp_path: Path, session: launcher.Session, name: str, text: str, pattern: str
) -> None:
    (tmp_path / name).write_text(text)
    words = (*SMALL_RUN, "--algorithm", f"./{name}", "--run.dir", "run")
    error_message(session(*words, cwd=tmp_path), pattern)
    assert not (tmp_path / "run").exists()


INITIAL = """
from pfedmoe_mpi.algorithms.fedprox import FedProx, Options

class Mine(FedProx):
    def client_state(self, client):
        return {"own": self.task.model(self.task.pool[0]), "head": self.task.head()}
    def initial(self, part, client):
        return SOURCES.get(part, part)
"""


def test_initial_names_a_part_of_the_same_architecture(tmp_path: Path, session: launcher.Session) -> None:
    """A method may also extend one of this program, and use its options."""
    words = (
        *SMALL_RUN,
        "--model.pool",
        "mlp5",
        "--algorithm",
        "./mine.py",
        "--run.dir",
        "run",
        "--mine.mu",
        "1.5",
    )
    for sources, problem in (
        ({"own": "modle"}, "initial: 'own' begins as 'modle', but the parts are model, own, head"),
        ({"own": None}, "initial: 'own' begins as None, but"),
        ({"head": "model"}, "initial: 'head' begins as 'model', but they differ in architecture"),
        ({"own": "own2"}, "initial: 'own' begins as 'own2', but"),
    ):
        (tmp_path / "mine.py").write_text(f"SOURCES = {sources}\n{INITIAL}")
        error_message(session(*words, cwd=tmp_path), f"mine.py: {problem}")
        assert not (tmp_path / "run").exists()
    (tmp_path / "mine.py").write_text(f"SOURCES = {{'own': 'model'}}\n{INITIAL}")
    assert session(*words, cwd=tmp_path).code == 0
    assert "mu = 1.5" in (tmp_path / "run" / "config.toml").read_text()


def test_installed_packages_register_methods_models_and_data(tmp_path: Path) -> None:
    """By module or class, in names of any case; only the chosen one is imported."""
    package, facts = tmp_path / "strangers", tmp_path / "strangers-1.dist-info"
    shutil.copytree(STRANGERS, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("print('imported')\n")
    (package / "nets.py").write_text((package / "nets.py").read_text().replace("from blocks", "from .blocks"))
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(
        "[pfedmoe_mpi.algorithms]\nOur-Near = strangers.near\nnear_class = strangers.near:Near\n"
        "gone = strangers.gone\n[pfedmoe_mpi.models]\nTinyNet = strangers.nets:TinyViT\n"
        "[pfedmoe_mpi.sources]\nRow-Means = strangers.rows:load\n"
    )
    (package / "rows.py").write_text(
        "import numpy as np\n\n\ndef load():\n    y = np.arange(200) % 5\n"
        "    return np.full((200, 3, 8, 8), 9.0) * y[:, None, None, None], y\n"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    listed = launcher.run_program(0, "run", "--help", cwd=tmp_path, env=environment)
    assert listed.code == 0 and "imported" not in listed.out and "--our_near.weight" in listed.out
    digests = []
    for ranks in (1, 3):
        run = f"ranks-{ranks}"
        words = (*SMALL_RUN, "--algorithm", "Near-class", "--model.pool", "TinyNet", "--run.dir", run)
        words = (*words, "--data.source", "Row-Means")
        result = launcher.run_program(ranks, *words, cwd=tmp_path, env=environment)
        assert result.code == 0, result.err
        digests.append(launcher.checkpoint_digest(tmp_path / run, 1))
        assert (tmp_path / run / "code" / "strangers" / "blocks.py").is_file()
        assert " on load: " in result.out, "the data are those of the package"
    assert digests[0] == digests[1]
    (package / "blocks.py").write_text((package / "blocks.py").read_text() + "\nEXTRA = 1\n")
    again = launcher.run_program(0, "restart", "ranks-1", "--rounds", "2", cwd=tmp_path, env=environment)
    assert "+EXTRA = 1" in error_message(again, "your own code changed since the checkpoint")


def test_folders_with_commas_colons_and_spaces(tmp_path: Path, session: launcher.Session) -> None:
    folder = tmp_path / "a, b:ü"
    shutil.copytree(STRANGERS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    words = ("--algorithm", "./near.py", "--model.pool", "./nets.py:TinyViT", "--model.shared", "mlp5")
    assert session(*SMALL_RUN[:8], *words, "--rounds", "1", "--run.dir", "run", cwd=folder).code == 0
    result = session("restart", str(folder / "run"), "--rounds", "2", cwd=tmp_path)
    assert result.code == 0, result.err
    assert load_client(folder / "run" / "checkpoints" / "best.h5", 0).client == 0
