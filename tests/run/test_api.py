"""Runs from Python: in one process, in a script under mpirun, in a study of Optuna, stopped by Ctrl-C."""

from __future__ import annotations

import importlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedmoe_mpi import restart, train
from pfedmoe_mpi.algorithms.fedjets import FedJETs
from pfedmoe_mpi.algorithms.fedproto import FedProto
from pfedmoe_mpi.api import _flat
from pfedmoe_mpi.errors import ConfigError, DataError
from support import launcher
from support.launcher import SMALL_RUN, checkpoint_digest, clean_environment, read_events, run_to_end
from support.paths import ROOT

SMALL = dict(zip((word[2:] for word in SMALL_RUN[::2]), SMALL_RUN[1::2], strict=True))
STRANGERS = ROOT / "tests" / "strangers"
README = ROOT / "pfedmoe_mpi" / "run" / "README.md"


@pytest.fixture
def tiny_vit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a class of a module that the caller imported."""
    monkeypatch.syspath_prepend(str(STRANGERS))
    import nets

    yield nets.TinyViT
    for name in ("nets", "blocks"):
        sys.modules.pop(name, None)


def start_script(text: str, folder: Path, ranks: int = 0) -> subprocess.Popen[str]:
    """Start a script of the user's, under mpirun if there are `ranks`."""
    (folder / "study.py").write_text(text, encoding="utf-8")
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)] if ranks else []
    return subprocess.Popen(
        [*mpirun, sys.executable, "study.py"],
        cwd=folder,
        env=clean_environment("mpich", {"PYTHONPATH": str(ROOT)}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_train_and_restart(tmp_path: Path, tiny_vit: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    sections = {"data": {"source": "synthetic", "samples": 200, "size": 8}, "train": {"device": "cpu"}}
    pool = {"model": {"pool": [tiny_vit, "mlp5"]}, "model__shared": "mlp5"}
    result = train(**sections, **pool, clients=4, rounds=1, run__dir=tmp_path / "run")
    assert [row["round"] for row in result.rows] == [1] and len(result.client_rows) == 4
    assert [result.architecture(k) for k in range(2)] == ["TinyViT", "mlp5"]
    assert result.model(0).predict(np.zeros((2, 3, 8, 8), np.uint8)).shape == (2, 10)
    again = restart(tmp_path / "run", rounds=2)
    assert again.done == 2 and again.newest.name == "round-000002.h5"
    assert signal.getsignal(signal.SIGINT) is before, "the notebook's own Ctrl-C is gone"
    words = [f"--{name}={value}" for name, value in {**SMALL, "rounds": 2}.items()]
    own = f"--model.pool={STRANGERS}/nets.py:TinyViT,mlp5"
    run_to_end(1, *words, own, "--run.dir", "same", cwd=tmp_path, own_job=True)
    assert checkpoint_digest(tmp_path / "same", 2) == checkpoint_digest(tmp_path / "run", 2)


def test_method_is_given_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of this program's, or of the user's file, whose code the run records."""
    code = "from pfedmoe_mpi.algorithms.standalone import Standalone\nclass OwnRule(Standalone):\n    ''\n"
    (tmp_path / "own_rule.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    own, given = importlib.import_module("own_rule"), {n.replace(".", "__"): v for n, v in SMALL.items()}
    result = train(**given | {"algorithm": own.OwnRule, "run__dir": tmp_path / "run"})
    assert result.algorithm == "own_rule"
    assert (tmp_path / "run" / "code" / "own_rule.py").is_file()
    for shipped, name in ((FedProto, "fedproto"), (FedJETs, "fedjets")):
        assert _flat({"algorithm": shipped}) == {"algorithm": name}
    local = type("Local", (FedProto,), {"__module__": "__main__"})
    with pytest.raises(ConfigError, match=r"top level of a file(.|\n)*for a method 'FILE\.py'"):
        train(**given | {"algorithm": local})


def test_wrong_calls_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no setting 'train\.lrr'"):
        train(train={"lrr": 1}, run={"dir": tmp_path / "run"})
    with pytest.raises(DataError, match=r"has no train/0\.npz"):
        train(data={"source": "npz", "path": tmp_path}, run={"dir": tmp_path / "run"})
    with pytest.raises(ConfigError, match="not defined at the top level of a file"):
        train(model={"pool": [lambda shape, dim: None]}, run={"dir": tmp_path / "run"})
    raised: list[Exception] = []

    def elsewhere() -> None:
        try:
            train(**{name.replace(".", "__"): value for name, value in SMALL.items()})
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(60)
    assert "another thread" in str(raised[0]) and not list(tmp_path.iterdir())


def test_script_under_mpirun(tmp_path: Path) -> None:
    """Every rank gets the runs, and the error of a setting that is wrong on one rank alone."""
    given = {name.replace(".", "__"): value for name, value in SMALL.items()}
    script = (
        "import os\nfrom pathlib import Path\nfrom pfedmoe_mpi import train\n"
        "from pfedmoe_mpi.errors import UserError\n"
        "rank, said = os.environ['PMI_RANK'], []\n"
        "try:\n    train(clients=4 * (rank == '0'))\n"
        "except UserError as error:\n    said.append(f\"refused {'clients' in str(error)}\")\n"
        f"for seed in range(2):\n    run = train(**{given!r}, seed=seed, run__dir=f'run{{seed}}')\n"
        "    said.append(f'rounds {run.done} of seed {run.seed}')\n"
        "Path(f'said-{rank}').write_text('; '.join(said))\n"
    )
    result = launcher.wait_for_end(start_script(script, tmp_path, ranks=2), 120)
    assert result.code == 0, result.err
    for rank in range(2):
        text = (tmp_path / f"said-{rank}").read_text()
        assert text == "refused True; rounds 1 of seed 0; rounds 1 of seed 1"
    for seed in range(2):
        run_to_end(1, *SMALL_RUN, "--seed", str(seed), "--run.dir", f"same{seed}", cwd=tmp_path)
        assert checkpoint_digest(tmp_path / f"same{seed}", 1) == checkpoint_digest(tmp_path / f"run{seed}", 1)


def test_ctrl_c_stops_with_a_checkpoint_and_the_script_goes_on(tmp_path: Path) -> None:
    given = {name.replace(".", "__"): value for name, value in {**SMALL, "rounds": 100_000}.items()}
    script = (
        "from pfedmoe_mpi import train\n"
        f"run = train(**{given!r}, run__dir='run', eval__every=1000)\nprint('stopped after', run.done)\n"
    )
    job = start_script(script, tmp_path)
    launcher.wait_for_file(tmp_path / "run" / "metrics.jsonl", job)
    job.send_signal(signal.SIGINT)
    result = launcher.wait_for_end(job, 60)
    assert result.code == 0, result.err
    stopped = re.search(r"stopped after (\d+)", result.out)
    assert stopped and read_events(tmp_path / "run")[-1]["event"] == "stop"
    assert restart(tmp_path / "run", rounds=int(stopped[1]) + 1).done == int(stopped[1]) + 1


def test_study_of_the_readme(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    result = launcher.wait_for_end(start_script(code, tmp_path), 200)
    assert result.code == 0, result.err
    assert "lr_gate" in result.out.splitlines()[-1] and len(list((tmp_path / "runs").iterdir())) == 2
