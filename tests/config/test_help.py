"""What `--help` prints, and what it does not import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pfedmoe_mpi import algorithms, arguments, cli, config, parser
from pfedmoe_mpi.algorithms import base
from pfedmoe_mpi.bench import measurements
from pfedmoe_mpi.commands import translate
from pfedmoe_mpi.config import flags, methods
from support import launcher

HEAVY = {"torch", "torchvision", "mpi4py", "numpy", "h5py", "rich"}
EXAMPLES = [(name, line) for name, command in arguments.COMMANDS.items() for line in command.examples]


def help_of(*words: str, unneeded: set[str] = HEAVY) -> str:
    """Return what a command line prints in a fresh process, which must not import the modules `unneeded`."""
    program = (
        "import sys; from pfedmoe_mpi.cli import main; code = main(sys.argv[2:]); "
        "methods = [m for m in sys.modules if m.startswith('pfedmoe_mpi.algorithms.')]; "
        "print(sorted(set(sys.argv[1].split()) & set(sys.modules)) + methods, file=sys.stderr); "
        "sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, " ".join(unneeded), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=launcher.clean_environment("mpich", {"COLUMNS": "200"}),
    )
    assert result.stderr.strip() == "[]", "imported without need"
    return result.stdout


@pytest.mark.parametrize(
    "words",
    ["--help", "help", "--version", "inspect --help", "help report", "export -h", "translate --flags"],
)
def test_help_without_settings_imports_no_pydantic(words: str) -> None:
    assert help_of(*words.split(), unneeded={*HEAVY, "pydantic", "difflib"})


def test_top_level_help_lists_commands_and_methods() -> None:
    text = help_of("--help")
    for name, command in arguments.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", text, re.M)
    for name in methods.names():
        document = sys.modules[algorithms.load(name).__module__].__doc__ or ""
        assert re.search(rf"^  {name} +{re.escape(document.partition(chr(10))[0])}$", text, re.M)
    assert "--train.lr" not in text and max(map(len, text.split("methods,")[0].splitlines())) < 100


def test_methods_are_the_files_of_the_folder() -> None:
    folder = Path(base.__file__).parent
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert set(methods.names()) == packages | {path.stem for path in folder.glob("[!_]*.py")} - {"base"}


def test_run_help_shows_every_setting_with_its_reason() -> None:
    text = " ".join(help_of("run", "--help").split())
    for name, field in flags.settings().items():
        facts = f"{flags.sentence(field)} [default {flags.shown(field.default)}"
        assert f"--{name} " in text and facts in text, name
        assert flags.reason(field) in text and flags.limits(field) in text
    assert (
        "--train.batch INT Batch size B. [default 16, ≥ 2: a client has about 70 digits, five steps a round "
        "(papers: 64 to 512)]"
    ) in text
    assert "--run.force [true|false] " in text and "--partition.kind {iid,pathological," in text


@pytest.mark.parametrize(
    ("name", "kind", "limits"),
    [
        ("participation", "NUMBER", "> 0 and ≤ 1"),
        ("train.threads", "INT|auto", "≥ 1 and ≤ 1024"),
        ("run.walltime", "NUMBER|auto", "≥ 0"),
        ("data.mean", "NUMBER,...", ""),
        ("model.pool", "NAME,...", ""),
        ("data.path", "PATH", ""),
        ("gate.batch_norm", "true|false", ""),
        ("fedtgp.answer", "{head,prototype}", ""),
        ("scaffold.lr_server", "NUMBER", "> 0"),
    ],
)
def test_type_and_range(name: str, kind: str, limits: str) -> None:
    field = config.fields()[name]
    assert (flags.metavar(name, field), flags.limits(field)) == (kind, limits)


@pytest.mark.parametrize("name", arguments.COMMANDS)
def test_command_shows_its_arguments_and_two_examples(name: str) -> None:
    command = arguments.COMMANDS[name]
    text = help_of("help", *name.split())
    assert text.startswith(f"usage: pfedmoe-mpi {name} ") and command.summary in text
    for item in command.arguments:
        assert str(item.options.get("metavar", item.names[-1])) in text
        assert " ".join(item.options["help"].replace("%%", "%").split()) in " ".join(text.split())
    assert len(command.examples) >= 2 and all(f"  pfedmoe-mpi {line}\n" in text for line in command.examples)
    assert ("pfedmoe-mpi run --help` lists" in text) == (command.settings and name != "run")
    assert ("--train.lr " in text.split("examples:")[0]) == (name == "run")


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_are_accepted(name: str, example: str) -> None:
    words = example.partition(" > ")[0].replace("'", "").split()[len(name.split()) :]
    if name == "translate" and words[0] == "--":  # what follows is another program's
        assert translate.translate(words[1:]).text()
    else:
        parser.parser(name).read(words)


@pytest.mark.parametrize("words", ["restart --help", "restart runs/x -h", "help restart"])
def test_help_of_a_command_is_one(words: str, tmp_path: Path) -> None:
    result = launcher.run_program(0, *words.split(), cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out == parser.parser("restart").format_help() and "restart runs/NAME" in result.out


def test_help_of_a_group_shows_its_commands() -> None:
    text = help_of("data", "--help")
    assert "pfedmoe-mpi data prepare " in text and "pfedmoe-mpi data partition " in text


def test_every_command_has_a_function() -> None:
    assert list(cli.FUNCTIONS) == list(arguments.COMMANDS)


def test_bench_names_its_parts() -> None:
    text = " ".join(parser.parser("bench").format_help().split())
    assert ", ".join(measurements.PARTS) in text


def test_help_on_a_terminal_without_our_characters(tmp_path: Path) -> None:
    result = launcher.run_program(0, "run", "--help", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (result.code, result.err) == (0, "") and "--train.lr_shared" in result.out
    assert os.listdir(tmp_path) == []


def test_only_the_first_rank_prints_help(tmp_path: Path) -> None:
    result = launcher.run_program(2, "report", "--help", cwd=tmp_path)
    assert result.code == 0 and result.out.count("usage: ") == 1


def test_closed_stdout_is_not_a_fault() -> None:
    command = f"exec {sys.executable} -m pfedmoe_mpi --version >&-"
    environment = launcher.clean_environment("mpich", {})
    result = subprocess.run(
        ["sh", "-c", command], capture_output=True, timeout=60, check=False, env=environment
    )
    assert (result.returncode, result.stderr) == (0, b"")
