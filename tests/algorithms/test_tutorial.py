"""«A method in twenty minutes»: the file, the commands and the output that algorithms/README.md prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.launcher import Result, clean_environment, wait_for_end
from support.paths import ROOT

README = ROOT / "pfedmoe_mpi" / "algorithms" / "README.md"
TUTORIAL = (
    README.read_text(encoding="utf-8").partition("## A method in twenty minutes")[2].partition("\n## ")[0]
)
CODE = "\n\n".join(block.strip("\n") for block in re.findall(r"```python\n(.*?)```", TUTORIAL, re.S)) + "\n"
CONSOLE = "".join(re.findall(r"```console\n(.*?)```", TUTORIAL, re.S))
SESSION = [step.splitlines() for step in re.split(r"^\$ ", CONSOLE, flags=re.M) if step]  # [command, *output]
COMMANDS = [step[0] for step in SESSION]


def measured(line: str) -> str:
    """Return a line without what differs between processors: decimal fractions and the width of columns."""
    return re.sub(r"\d+\.\d+", "#", " ".join(re.sub(r"[_*-]{2,}", " ", line).split()))


def command(line: str, folder: Path) -> Result:
    """Run a command line of the tutorial in its folder."""
    clean = clean_environment("mpich", {"PYTHONPATH": str(ROOT)})
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    started = subprocess.Popen(
        shlex.split(line),
        cwd=folder,
        env=clean,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return wait_for_end(started, 120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tutorial's file alone."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "my_fedper.py").write_text(CODE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[Result]:
    """How the tutorial's commands ended, in the order printed."""
    return [command(line, folder) for line in COMMANDS]


@pytest.mark.parametrize("number", range(len(SESSION)), ids=COMMANDS)
def test_command_prints_what_is_shown(results: list[Result], number: int) -> None:
    result = results[number]
    assert result.code == 0, f"{result.out}\n{result.err}"
    printed = iter([measured(line) for line in result.out.splitlines()])
    assert all(measured(line) in printed for line in SESSION[number][1:]), result.out  # in this order


def test_fedper_beats_fedavg(results: list[Result], folder: Path) -> None:
    assert not any(result.code for result in results)
    accuracy = {}
    for name in ("my_fedper", "fedavg"):
        last = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1]
        accuracy[name] = json.loads(last)["accuracy"]["mean"]
    assert accuracy["my_fedper"] > accuracy["fedavg"] + 0.1


def test_all_conformance_checks_are_shown(results: list[Result]) -> None:
    shown, printed = SESSION[-1][1:], results[-1].out.splitlines()
    assert "conformance" in COMMANDS[-1] and shown == printed and len(shown) > 1


def test_file_is_clean(folder: Path) -> None:
    path = folder / "my_fedper.py"
    for arguments in (["check"], ["format", "--check"]):
        ruff = ["ruff", *arguments, "--config", ROOT / "pyproject.toml", path]
        assert subprocess.run([sys.executable, "-m", *ruff], check=False, timeout=60).returncode == 0
