"""What every command accepts: its positional arguments, flags and examples, and the parsers made of them.

Importing this needs no pydantic, numpy, torch or MPI; only the parser of a command with settings imports
`config.flags`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedmoe_mpi.errors import ConfigError, either
from pfedmoe_mpi.names import check_text

PROGRAM = "pfedmoe-mpi"
SETTINGS_NOTE = f"The settings that `{PROGRAM} run --help` lists are flags here, too."


@dataclass(frozen=True)
class Argument:
    """The arguments of one call of `argparse.ArgumentParser.add_argument`."""

    names: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A command: its summary, arguments and examples, and whether it takes settings and runs under MPI."""

    summary: str
    arguments: tuple[Argument, ...]
    examples: tuple[str, ...]
    settings: bool = False
    mpi: bool = False


# The values of flags that are not settings


def truth(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in {"true", "false"}:
        raise argparse.ArgumentTypeError(f"expected true or false, not '{text}'")
    return text.lower() == "true"


def share(text: str) -> float:
    """Read a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, not '{text}'")
    return value


def number(text: str) -> int:
    """Read a client's or a task's number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number such as 7, not '{text}'")
    return int(text)


def argument(*names: str, **options: Any) -> Argument:
    """Return a positional argument or a flag."""
    return Argument(names, options)


def switch(name: str, text: str, default: bool = False) -> Argument:
    """Return a flag that takes true or false; the flag alone means true."""
    shown = f"{text} [default {str(default).lower()}]"
    options = {"nargs": "?", "const": True, "default": default, "metavar": "true|false", "type": truth}
    return Argument((name,), {**options, "help": shown})


CONFIG = argument("config", nargs="?", metavar="CONFIG.toml", help="settings as a file; flags override it")
OUT = argument("out", metavar="OUT.h5", help="the file to write, which must not exist")
CHECKPOINT = argument("source", metavar="CHECKPOINT.h5", help="a checkpoint of a run")
SHELLS = ("bash", "zsh", "tcsh")
FILES = ("PATH", "FOLDER", "DIR", "OUT", ".h5", ".toml")  # in the names of arguments that are files

COMMANDS = {
    "run": Command(
        "Train from round 1.",
        (CONFIG, switch("--dry", "print the plan and exit")),
        ("run --algorithm fedproto --rounds 60 --run.dir runs/NAME", "run CONFIG.toml --train.lr 0.02 --dry"),
        settings=True,
        mpi=True,
    ),
    "restart": Command(
        "Continue a run from its newest checkpoint, or from a given one.",
        (argument("source", metavar="RUN_DIR|CHECKPOINT.h5", help="a run folder or a checkpoint of it"),),
        ("restart runs/NAME", "restart runs/NAME/checkpoints/round-000020.h5 --rounds 80"),
        settings=True,
        mpi=True,
    ),
    "evaluate": Command(
        "Measure every client of a checkpoint.",
        (CHECKPOINT, switch("--json", "print JSON instead of a table")),
        ("evaluate runs/NAME/checkpoints/best.h5", "evaluate best.h5 --data.path other.h5 --json"),
        settings=True,
        mpi=True,
    ),
    "inspect": Command(
        "Print what a checkpoint contains, or its digest.",
        (CHECKPOINT, argument("--digest", action="store_true", help="print the digest alone")),
        ("inspect runs/NAME/checkpoints/best.h5", "inspect runs/NAME/checkpoints/best.h5 --digest"),
    ),
    "export": Command(
        "Write one client's model as an HDF5 file of named tensors.",
        (
            CHECKPOINT,
            OUT,
            argument(
                "--client", required=True, type=number, metavar="K", help="the client's number, 0 to N - 1"
            ),
        ),
        ("export best.h5 client7.h5 --client 7", "export runs/NAME/checkpoints/best.h5 OUT.h5 --client 0"),
    ),
    "data prepare": Command(
        "Write any source's data as one HDF5 file; may download torchvision's.",
        (CONFIG, OUT),
        (
            "data prepare cifar10.h5 --data.source torchvision --data.name CIFAR10 --data.path data",
            "data prepare images.h5 --data.source folder --data.path FOLDER --data.size 32",
        ),
        settings=True,
    ),
    "data partition": Command(
        "Draw a partition and write it, as HDF5 or as a picture.",
        (CONFIG, argument("out", metavar="OUT", help="the file to write: .h5, or .png for a picture")),
        ("data partition partition.h5 --partition.alpha 0.1", "data partition CONFIG.toml partition.png"),
        settings=True,
    ),
    "reproduce": Command(
        "Train the runs of a table that are not finished, one after the other.",
        (
            argument("table", metavar="TABLE.toml", help="a table; jobs/tables/ has those of the papers"),
            argument(
                "--scale",
                type=share,
                default=1.0,
                metavar="NUMBER",
                help="share of the table's rounds to run, > 0 and ≤ 1 [default 1]",
            ),
            argument("--out", default="", metavar="FOLDER", help="folder of the runs [default runs/TABLE]"),
            argument(
                "--only",
                default="",
                metavar="PATTERN,...",
                help="only runs of these names, * for any [default all]",
            ),
            argument(
                "--task",
                default="",
                metavar="K",
                help="only number K of the chosen runs, from 0: for job arrays [default all]",
            ),
            switch("--dry", "print what the runs cost and exit"),
            switch("--list", "print the runs' names and exit"),
        ),
        (
            "reproduce jobs/tables/pfedmoe-homogeneous.toml --scale 0.1 --dry",
            "reproduce TABLE.toml --only '*-seed0' --out runs/table",
        ),
        settings=True,
        mpi=True,
    ),
    "report": Command(
        "Report on one run, or compare several: a page, figures and tables.",
        (
            argument("folders", nargs="+", metavar="RUN_DIR", help="run folders, or folders of run folders"),
            argument(
                "--out",
                default="",
                metavar="FOLDER",
                help="where to write [default RUN_DIR/report or report]",
            ),
            switch("--text", "print the tables and write nothing"),
            argument("--baseline", default="", metavar="NAME", help="method to compare the others with"),
            argument(
                "--target",
                default="",
                metavar="NUMBER",
                help="accuracy whose first round and cost are reported, > 0 and ≤ 1",
            ),
            switch("--models", "examine the models of a single run, which needs torch", default=True),
        ),
        ("report runs/NAME", "report runs/a runs/b --baseline fedavg --target 0.9 --text"),
    ),
    "translate": Command(
        "Translate a command line, or all flags, of HtFLlib and PFLlib.",
        (
            argument("words", nargs="*", metavar="WORD", help="the command line, after --"),
            argument("--flags", action="store_true", help="print every flag of theirs and its setting here"),
        ),
        ("translate -- python main.py -data Cifar10 -algo FedProto -m HtFE-img-8", "translate --flags"),
    ),
    "bench": Command(
        "Measure this machine and print a table.",
        (
            argument(
                "words",
                nargs="*",
                metavar="WHAT",
                help="any of round, ranks, sum, idle, precision, write, network; or start [RANKS], alone and "
                "without mpirun [default those that make sense on these ranks]",
            ),
            switch("--quick", "take a minute: less data, fewer repetitions"),
        ),
        ("bench --quick", "bench round --train.batch 64", "bench start 16"),
        settings=True,
        mpi=True,
    ),
    "check": Command(
        "Check what this cluster can do: MPI, hosts, GPU, file system, signals.",
        (argument("folder", nargs="?", default=".", metavar="FOLDER", help="where runs will be written"),),
        ("check", "check /scratch/NAME/runs"),
        mpi=True,
    ),
    "help": Command(
        "Print the help of a command.",
        (argument("words", nargs="*", metavar="COMMAND", help="a command [default: the list of commands]"),),
        ("help run", "help data prepare"),
    ),
    "completion": Command(
        "Print a script that completes commands and flags in a shell.",
        (argument("shell", choices=SHELLS, help="the shell"),),
        (
            "completion bash > ~/.local/share/bash-completion/completions/pfedmoe-mpi",
            "completion zsh > ~/.zsh/completions/_pfedmoe-mpi",
        ),
    ),
}
GROUPS = {name.rpartition(" ")[0] for name in COMMANDS} - {""}  # the first words of commands of two


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`s; flags and positional arguments may come in any order."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.settings: set[str] = set()
        self._example = ""
        self.color = False  # from Python 3.14 on; the usage is part of messages

    def fill(self, command: Command, every_setting: bool) -> Parser:
        """Add a command's arguments; settings are hidden in help, except in `run` or with `every_setting`."""
        for item in command.arguments:
            self.add_argument(*item.names, **item.options)
        self.description = command.summary
        self._example = f"{PROGRAM} {command.examples[0]}"
        self.epilog = "\n  ".join(["examples:", *(f"{PROGRAM} {line}" for line in command.examples)])
        self.usage = self.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%")
        if command.settings:
            from pfedmoe_mpi.config import flags

            self.usage += " [--SETTING VALUE ...]"
            if command is not COMMANDS["run"]:
                self.epilog = f"{SETTINGS_NOTE}\n\n{self.epilog}"
            self.settings = set(flags.settings())
            flags.add_settings(self, visible=every_setting or command is COMMANDS["run"])
        return self

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse a command line; the result's `settings` are those given, by dotted name, with absolute paths.

        Raises:
            ConfigError: an unknown or incomplete flag, a missing argument or one too many, a wrong value, or
                a word that is not whole text.
        """
        for word in words:
            check_text("the argument", word, ConfigError)
        result, extra = self.parse_known_intermixed_args(self._joined(words))
        if extra:
            usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
            raise ConfigError(f"{self._name} does not expect '{extra[0]}'", usage)
        result.settings = {name: value for name, value in vars(result).items() if name in self.settings}
        if result.settings:
            from pfedmoe_mpi import config

            result.settings = config.located(result.settings, Path.cwd())
        return result

    def _joined(self, words: Sequence[str]) -> list[str]:
        """Return the words with `_` for `-` in flags, and a value that begins with `-` joined to its flag."""
        joined: list[str] = []
        for word in words:
            flag, sign, value = word.partition("=")
            flag = "--" + flag[2:].replace("-", "_")
            if word.startswith("--"):
                if flag.removeprefix("--") not in self._flags:
                    raise self._unknown(word.partition("=")[0])
                joined.append(flag + sign + value)
            elif word.startswith("-") and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
                joined[-1] += f"={word}"
            elif word.startswith("-"):
                raise self._unknown(word.partition("=")[0])
            else:
                joined.append(word)
        return joined

    @property
    def _flags(self) -> list[str]:
        """The long flags without `--`."""
        names = (name for action in self._actions for name in action.option_strings)
        return [name.removeprefix("--") for name in names if name.startswith("--")]

    @property
    def _name(self) -> str:
        return self.prog.removeprefix(f"{PROGRAM} ")

    def _unknown(self, flag: str) -> ConfigError:
        """Return the error about a flag that the command does not have."""
        from pfedmoe_mpi.config import neighbours

        name = flag.lstrip("-").replace("-", "_")
        problem = f"there is no flag {flag}" if self.settings else f"{self._name} has no flag {flag}"
        if self.settings:
            from pfedmoe_mpi.config import config

            if name in config.BOOKKEEPING:
                return ConfigError(f"{flag} is not a flag: `reproduce` writes it", f"remove {flag}")
            config.check_methods([name])
        elsewhere = [f"`{command}`" for command in COMMANDS if flag in _flags_of(command)]
        if elsewhere and not (self.settings and neighbours.settings_for(name)):
            return ConfigError(problem, f"remove {flag}, a flag of {either(elsewhere)}")
        if name.startswith("no_") and name[3:] in self._flags:
            return ConfigError(problem, f"use --{name[3:]} false")
        meant = [f"--{match}" for match in neighbours.suggestions(name, self._flags)]
        remedy = neighbours.advice(name) if self.settings else ""
        if not remedy and meant:
            remedy = f"use {either(meant)}"
        return ConfigError(problem, remedy or f"`{self.prog} --help` lists every flag")

    def error(self, message: str) -> Any:
        """Raise what argparse would print."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            raise ConfigError(f"{self._name} needs {missing}", self._example)
        problem = message.removeprefix("argument ").replace("expected one argument", "expected a value")
        problem = problem.replace("ignored explicit argument", "expected no value, not")
        raise ConfigError(problem, f"`{self.prog} --help` shows what it accepts")


def _flags_of(command: str) -> set[str]:
    """Return a command's flags that are not settings."""
    return {name for item in COMMANDS[command].arguments for name in item.names if name.startswith("--")}


def parser(name: str) -> Parser:
    """Return the parser of one command."""
    return Parser(prog=f"{PROGRAM} {name}").fill(COMMANDS[name], every_setting=False)


def completion_script(shell: str) -> str:
    """Return the script that completes the program's commands and flags in a shell.

    Raises:
        ImportError: shtab is not installed.
    """
    import shtab

    root = Parser(prog=PROGRAM)
    nodes = {"": root.add_subparsers()}
    parsers = [root]
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in nodes:
            nodes[group] = nodes[""].add_parser(group, help=f"Commands of {group}.").add_subparsers()
        parsers.append(nodes[group].add_parser(word, help=command.summary).fill(command, every_setting=True))
    for each in parsers:
        for action in each._actions:
            metavar = str(action.metavar)
            if metavar.startswith("{") or metavar == "true|false":
                action.choices = metavar.strip("{}").replace("|", ",").split(",")
            elif any(word in metavar for word in FILES):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(root, shell)
