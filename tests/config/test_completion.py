"""Completion of commands and flags in a shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pfedmoe_mpi import arguments, cli, parser
from pfedmoe_mpi.config import flags
from support import launcher

PARTITION = [f"--{name}" for name in sorted(flags.settings()) if name.startswith("partition.")]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "pfedmoe-mpi"
    result = launcher.run_program(0, "completion", "bash", cwd=path.parent)
    assert (result.code, result.err) == (0, "")
    path.write_text(result.out)
    return path


def completions(script: Path, line: str) -> list[str]:
    """Return what bash proposes for the last word of a command line."""
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("no bash")
    *before, last = line.split(" ")
    program = (
        'source "$1"; shift; set -u; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; '
        "read -r _ _ _ _ function _ < <(complete -p pfedmoe-mpi); "
        '"$function"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        [bash, "--norc", "--noprofile", "-c", program, "bash", str(script), *before, last],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=script.parent,
    )
    return sorted(result.stdout.split())


def test_commands(script: Path) -> None:
    assert completions(script, "pfedmoe-mpi re") == ["report", "reproduce", "restart"]
    assert completions(script, "pfedmoe-mpi data p") == ["partition", "prepare"]
    first = {name.partition(" ")[0] for name in arguments.COMMANDS}
    assert set(completions(script, "pfedmoe-mpi ")) == first


@pytest.mark.parametrize("name", [name for name, command in arguments.COMMANDS.items() if command.settings])
def test_settings(script: Path, name: str) -> None:
    settings = {f"--{setting}" for setting in flags.settings()}
    assert settings <= set(completions(script, f"pfedmoe-mpi {name} --"))


def test_flags(script: Path) -> None:
    assert completions(script, "pfedmoe-mpi run --train.lr_") == ["--train.lr_gate", "--train.lr_shared"]
    assert completions(script, "pfedmoe-mpi report --b") == ["--baseline"]
    assert completions(script, "pfedmoe-mpi report --train") == []
    assert completions(script, "pfedmoe-mpi run --rounds 3 --parti") == ["--participation", *PARTITION]


def test_values(script: Path) -> None:
    assert completions(script, "pfedmoe-mpi run --train.schedule c") == ["constant", "cosine"]
    assert completions(script, "pfedmoe-mpi run --train.augment flip --run.force t") == ["true"]
    assert completions(script, "pfedmoe-mpi completion z") == ["zsh"]
    assert completions(script, "pfedmoe-mpi restart pfed") == [script.name]
    assert completions(script, "pfedmoe-mpi run --data.path pfed") == [script.name]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell: str, script: Path) -> None:
    text = parser.completion_script(shell)
    assert "train.lr_shared" in text and "translate" in text


def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    message = capsys.readouterr().err
    assert "needs the package shtab" in message and "pip install 'pfedmoe_mpi[completion]'" in message
