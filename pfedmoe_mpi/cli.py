"""The command line: one function per command, which imports torch and MPI only if it needs them."""

from __future__ import annotations

import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pfedmoe_mpi import __version__, arguments, environment, parser
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_USER, ConfigError, LaunchError, UserError, either, nearest
from pfedmoe_mpi.mpi import session

if TYPE_CHECKING:
    from pfedmoe_mpi.config import Config

HELP = """\
usage: pfedmoe-mpi [COMMAND] [ARGUMENT ...]

Personalised federated learning under MPI.

commands (without one, the arguments are those of run):
{commands}

methods, chosen by --algorithm:
{methods}

`pfedmoe-mpi COMMAND --help` prints a command's arguments with examples, `pfedmoe-mpi run --help` also every
setting with its range, its default and the reason for it. `python -m pfedmoe_mpi` is the same program. run,
restart, fork, evaluate, verify, reproduce, bench and check work under mpirun and srun, too."""


def main(words: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    Under a launcher only the first rank prints an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our characters must not end a job
    name, rest = _command(words)
    alone = not (name in arguments.COMMANDS and arguments.COMMANDS[name].mpi)
    try:
        if alone and environment.launched_rank() > 0:
            return EXIT_DONE  # the first rank does it
        return _run(name, rest)
    except UserError as error:
        if alone or isinstance(error, LaunchError):
            session.print_error(error)
            return EXIT_USER
        return session.refuse(error)


def _command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command's name and its words; `--version` and `--help` anywhere are commands, too."""
    name, rest = "", list(words)
    if words and words[0] in arguments.GROUPS:
        name, rest = _member(words[0], words[1:])
    elif words and words[0] in arguments.COMMANDS:
        name, rest = words[0], rest[1:]
    if "--version" in words:
        return "version", []
    if {"-h", "--help"} & set(words):
        chosen = [word for pair in pairwise(rest) if pair[0] == "--algorithm" for word in pair]
        return "help", [*name.split(), *chosen, *(word for word in rest if word.startswith("--algorithm="))]
    return name or "run", rest


def _member(group: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """Return which command of a group the first positional argument names, else the group; and the rest."""
    flag = ""
    for place, word in enumerate(words):
        if not word.startswith("-") and (not flag.startswith("--") or "=" in flag):
            name = f"{group} {word}"
            rest = [*words[:place], *words[place + 1 :]]
            return (name, rest) if name in arguments.COMMANDS else (group, list(words))
        flag = word
    return group, list(words)


def _run(name: str, words: list[str]) -> int:
    if name == "version":
        print(__version__)
        return EXIT_DONE
    if name in arguments.GROUPS:
        commands = [command for command in arguments.COMMANDS if command.startswith(f"{name} ")]
        problem = f"{name} is not a command alone; use {either(commands)}"
        raise ConfigError(problem, f"{arguments.PROGRAM} {commands[0]} --help")
    first = words[0] if words else "-"
    if name == "run" and not first.startswith("-") and "." not in first and not os.path.exists(first):
        others = set(arguments.COMMANDS) - {first}  # `run restart` is a wrong file, not a wrong command
        hint = nearest(first, others)
        problem = f"'{first}' is neither a command nor a configuration file{hint}"
        raise ConfigError(problem, "`pfedmoe-mpi --help` lists the commands")
    if name == "translate" and words != ["--flags"]:  # whose words are another program's
        return translate(Namespace(words=[word for word in words if word != "--"], flags=False))
    return FUNCTIONS[name](parser.parser(name, words).read(words))


def run(given: Namespace) -> int:
    """Train from round 1."""
    settings = configured(given)
    from pfedmoe_mpi.run import job

    return job.run(settings, given.dry)


def restart(given: Namespace) -> int:
    """Continue from a run folder or a checkpoint."""
    from pfedmoe_mpi.run import restart

    return restart.restart(Path(given.source), given.settings, given.dry)


def fork(given: Namespace) -> int:
    """Branch a run off one of its rounds."""
    from pfedmoe_mpi.run import fork

    return fork.fork(Path(given.source), given.at, given.settings, given.dry)


def evaluate(given: Namespace) -> int:
    """Measure every client of a checkpoint."""
    from pfedmoe_mpi.commands import evaluate

    return evaluate.run(Path(given.source), given.settings, given.json)


def verify(given: Namespace) -> int:
    """Replay rounds of a run."""
    from pfedmoe_mpi.commands.verify import command as verify

    rounds = str(given.settings.pop("rounds", 3))
    if not rounds.isdecimal() or not int(rounds):
        raise ConfigError(
            f"rounds = {rounds} of `verify` is not a number of rounds", "--rounds 3 replays three"
        )
    return verify.run(Path(given.source), int(rounds), given.settings)


def attack(given: Namespace) -> int:
    """Measure what a checkpoint gives away about the training rows."""
    from pfedmoe_mpi.attack import command

    words = given.shadows
    count = int(words[0]) if len(words) == 1 and words[0].isdecimal() else None
    shadows = tuple(map(Path, words)) if count is None else count
    flags = command.AttackFlags(
        given.kind, shadows, given.client, given.samples, given.trials, given.steps, given.json
    )
    return command.run(Path(given.source), flags, given.settings)


def inspect(given: Namespace) -> int:
    """Print a checkpoint, or its digest."""
    from pfedmoe_mpi.commands import inspect

    return inspect.run(Path(given.source), digest_only=given.digest)


def export(given: Namespace) -> int:
    """Write one client's model by tensor names."""
    from pfedmoe_mpi.commands import export

    return export.run(Path(given.source), given.client, Path(given.out))


def pack(given: Namespace) -> int:
    """Write a checkpoint as one complete file."""
    from pfedmoe_mpi.commands import pack

    return pack.run(Path(given.source), Path(given.out))


def prepare(given: Namespace) -> int:
    """Write data as one file; needs no MPI, may use the network on a login node."""
    settings = configured(given)
    from pfedmoe_mpi.commands import data

    print(data.prepare(settings, Path(given.out)))
    return EXIT_DONE


def partition(given: Namespace) -> int:
    """Draw a partition; needs no MPI."""
    settings = configured(given)
    from pfedmoe_mpi.commands import data

    print(data.write_partition(settings, Path(given.out)))
    print(f"wrote {given.out}")
    return EXIT_DONE


def fetch(given: Namespace) -> int:
    """Write published weights as files; needs no MPI, may use the network on a login node."""
    from pfedmoe_mpi.commands import weights

    print("\n".join(weights.fetch(given.names, Path(given.out))))
    return EXIT_DONE


def reproduce(given: Namespace) -> int:
    """Train the runs of a table, except those that are finished."""
    from pfedmoe_mpi.reproduce import grid

    table = Path(given.table)
    if given.list:
        runs = grid.expand(grid.read(table), given.settings, given.scale, given.only, given.task)
        if environment.launched_rank() == 0:
            print("\n".join(run.name for run in runs))
        return EXIT_DONE
    from pfedmoe_mpi.report import precision
    from pfedmoe_mpi.reproduce import command

    flags = command.ReproduceFlags(
        *(given.out, given.scale, given.only, given.task, given.dry, given.together),
        *(given.select, given.until, given.most, given.baseline),
    )
    return command.run(table, given.settings, flags, precision.precision)


def report(given: Namespace) -> int:
    """Write tables, figures and a page about runs; only `--models true` needs torch."""
    from pfedmoe_mpi.report import command

    return command.run(
        given.folders, given.out, given.text, given.baseline, given.target, given.models, given.select
    )


def translate(given: Namespace) -> int:
    """Print a command line of HtFLlib or PFLlib in this program's words."""
    from pfedmoe_mpi.commands import translate

    print(translate.flags_table() if given.flags else translate.translate(given.words).text())
    return EXIT_DONE


def bench(given: Namespace) -> int:
    """Measure this machine and print a table."""
    from pfedmoe_mpi import config

    settings = config.build(given.settings)
    from pfedmoe_mpi.bench import command

    return command.run(given.words, settings, given.settings, given.quick, given.figure)


def conformance(given: Namespace) -> int:
    """Hold methods to the contract of `algorithms/base.py`."""
    from pfedmoe_mpi.conformance import command

    chosen = [name.strip() for name in given.check.split(",") if name.strip()]
    return command.run(given.methods, chosen, given.settings)


def check(given: Namespace) -> int:
    """Print what this cluster can do: MPI, file system, GPU, signals."""
    from pfedmoe_mpi.commands import check

    return check.run(Path(given.folder))


def print_help(given: Namespace) -> int:
    """Print the help of a command or a group of commands, or the list of commands and methods."""
    name = " ".join(given.words)
    names = [command for command in arguments.COMMANDS if f"{command} ".startswith(f"{name} ")]
    if not name:
        commands = {command: each.summary for command, each in arguments.COMMANDS.items()}
        summaries = {method: methods.summary(method) for method in methods.names()}
        print(HELP.format(commands=_listed(commands), methods=_listed(summaries)))
    elif not names:
        hint = nearest(name, arguments.COMMANDS)
        raise ConfigError(f"there is no command {name}{hint}", "`pfedmoe-mpi --help` lists the commands")
    chosen = ["--algorithm", given.algorithm] if given.algorithm else []
    print("\n\n".join(parser.parser(command, chosen).format_help().rstrip() for command in names))
    return EXIT_DONE


def _listed(summaries: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:15} {summary}" for name, summary in summaries.items())


def completion(given: Namespace) -> int:
    """Print a shell's completion script."""
    try:
        print(parser.completion_script(given.shell))
    except ImportError as error:
        problem = "completion needs the package shtab, which is not installed"
        raise UserError(problem, "pip install 'pfedmoe_mpi[completion]'") from error
    return EXIT_DONE


FUNCTIONS: dict[str, Callable[[Namespace], int]] = {
    "run": run,
    "restart": restart,
    "fork": fork,
    "evaluate": evaluate,
    "verify": verify,
    "attack": attack,
    "inspect": inspect,
    "export": export,
    "pack": pack,
    "data prepare": prepare,
    "data partition": partition,
    "weights fetch": fetch,
    "reproduce": reproduce,
    "report": report,
    "translate": translate,
    "bench": bench,
    "conformance": conformance,
    "check": check,
    "help": print_help,
    "completion": completion,
}


def configured(given: Namespace) -> Config:
    """Return the configuration of a preset and a TOML file, if there are any, with the flags over them."""
    from pfedmoe_mpi import config
    from pfedmoe_mpi.config import presets

    preset = presets.read(getattr(given, "preset", ""))
    settings = config.read_toml(Path(given.config)) if given.config else {}
    return config.build({**preset, **settings, **given.settings})
