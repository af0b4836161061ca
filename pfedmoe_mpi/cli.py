"""The command line: one function per command, which imports what it needs of torch and MPI."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi import __version__, config, environment
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.config import methods as config_methods
from pfedmoe_mpi.errors import EXIT_DONE, EXIT_USER, ConfigError, LaunchError, UserError, nearest
from pfedmoe_mpi.mpi import session
from pfedmoe_mpi.reproduce import grid

USAGE = """\
python -m pfedmoe_mpi [run] [CONFIG.toml] [--section.field VALUE ...] [--dry true]
       python -m pfedmoe_mpi restart RUN_DIR|CHECKPOINT.h5 [--rounds N] [--section.field VALUE ...]
       python -m pfedmoe_mpi evaluate CHECKPOINT.h5 [--data.path PATH] [--json true]
       python -m pfedmoe_mpi inspect CHECKPOINT.h5 [--digest]
       python -m pfedmoe_mpi export CHECKPOINT.h5 --client 7 OUT.h5
       python -m pfedmoe_mpi data prepare|partition [CONFIG.toml] OUT.h5 [--section.field VALUE ...]
       python -m pfedmoe_mpi reproduce TABLE.toml [--scale 0.1] [--out FOLDER] [--only PATTERN] [--dry true]
       python -m pfedmoe_mpi report RUN_DIR ... [--out FOLDER] [--text true] [--baseline NAME]
               [--target 0.9] [--models false]
       python -m pfedmoe_mpi translate -- python main.py -data Cifar10 -algo FedProto ...
       python -m pfedmoe_mpi bench [WHAT ...] [--section.field VALUE ...]
       python -m pfedmoe_mpi check [FOLDER]
run, restart, evaluate, reproduce, bench and check run under mpirun or srun too."""

Settings = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Run a command; the exit code. What can be checked before MPI is told by the first rank only."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our characters ends no job
    named = bool(arguments) and arguments[0] in COMMANDS
    command = arguments[0] if named else "run"
    alone = command in WITHOUT_MPI
    try:
        if {"-h", "--help", "--version"} & set(arguments):
            command, alone = "help", True
        if alone and environment.launched_rank() > 0:
            return EXIT_DONE  # the first rank does it
        code = _help(arguments) if command == "help" else COMMANDS[command](arguments[named:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not alone:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return EXIT_DONE  # a reader who has seen enough, as `head`, is no fault
    except UserError as error:
        if alone or isinstance(error, LaunchError):
            session.print_error(error)
            return EXIT_USER
        return session.refuse(error)


def _help(arguments: Sequence[str]) -> int:
    print(__version__ if "--version" in arguments else _parser().format_help())
    return EXIT_DONE


def run(arguments: Sequence[str]) -> int:
    """Train from round 1."""
    words, flags, extra = _parse(arguments, {"dry": "false"})
    _at_most(words, 1, "one CONFIG.toml")
    settings = _configured(words, flags)
    dry = _boolean("dry", extra["dry"])
    from pfedmoe_mpi.run import job

    return job.run(settings, dry)


def restart(arguments: Sequence[str]) -> int:
    """Go on from a run folder or a checkpoint."""
    words, flags, _ = _parse(arguments, {})
    source = _exactly("restart", words, "RUN_DIR or CHECKPOINT.h5")[0]
    from pfedmoe_mpi.run import restart

    return restart.restart(Path(source), flags)


def evaluate(arguments: Sequence[str]) -> int:
    """Measure every client of a checkpoint."""
    words, flags, extra = _parse(arguments, {"json": "false"})
    source = _exactly("evaluate", words, "CHECKPOINT.h5")[0]
    from pfedmoe_mpi.commands import evaluate

    return evaluate.run(Path(source), flags, _boolean("json", extra["json"]))


def inspect(arguments: Sequence[str]) -> int:
    """Show a checkpoint, or its digest."""
    words, flags, _ = _parse([word for word in arguments if word != "--digest"], {})
    source = _exactly("inspect", words, "CHECKPOINT.h5")[0]
    _no_settings("inspect", flags)
    from pfedmoe_mpi.commands import inspect

    return inspect.run(Path(source), digest_only="--digest" in arguments)


def export(arguments: Sequence[str]) -> int:
    """Write one client's model by tensor names."""
    words, flags, extra = _parse(arguments, {"client": ""})
    source, out = _exactly("export", words, "CHECKPOINT.h5", "OUT.h5")
    _no_settings("export", flags)
    if not extra["client"].isdecimal():
        raise ConfigError(f"--client {extra['client'] or 'is missing'}", "--client 7 exports client 7")
    from pfedmoe_mpi.commands import export

    return export.run(Path(source), int(extra["client"]), Path(out))


def data(arguments: Sequence[str]) -> int:
    """Prepare data or draw a partition; needs no MPI, may use the network on a login node."""
    words, flags, _ = _parse(arguments, {})
    if not words or words[0] not in {"prepare", "partition"}:
        example = "data prepare OUT.h5 --data.source folder --data.path FOLDER"
        raise ConfigError("data what? data prepare or data partition", example)
    if len(words) not in {2, 3}:
        raise ConfigError(f"data {words[0]} needs one output file", f"data {words[0]} [CONFIG.toml] OUT.h5")
    settings = _configured(words[1:-1], flags)
    from pfedmoe_mpi.commands import data

    work = data.prepare if words[0] == "prepare" else data.write_partition
    print(work(settings, Path(words[-1])))
    return EXIT_DONE


def reproduce(arguments: Sequence[str]) -> int:
    """Train a table of a paper: its runs one after the other, those that are finished passed over."""
    own = {"scale": "1", "out": "", "only": "", "task": "", "dry": "false", "list": "false"}
    words, flags, extra = _parse(arguments, own)
    table = Path(_exactly("reproduce", words, "TABLE.toml")[0])
    scale, dry = _number("scale", extra["scale"]), _boolean("dry", extra["dry"])
    if _boolean("list", extra["list"]):
        runs = grid.chosen(grid.expand(grid.read(table), flags, scale), extra["only"], extra["task"])
        if environment.launched_rank() == 0:
            print("\n".join(run.name for run in runs))
        return EXIT_DONE
    from pfedmoe_mpi.reproduce import command

    asked = command.Asked(extra["out"], scale, extra["only"], extra["task"], dry)
    return command.run(table, flags, asked)


def report(arguments: Sequence[str]) -> int:
    """Tables, figures and a page about runs; only `--models true` needs torch and MPI."""
    words, flags, extra = _parse(
        arguments, {"out": "", "text": "false", "baseline": "", "target": "", "models": "true"}
    )
    _no_settings("report", flags)
    if not words:
        raise ConfigError("report on which runs?", "report RUN_DIR ...")
    text = _boolean("text", extra["text"])
    from pfedmoe_mpi.report import command

    models = _boolean("models", extra["models"])
    return command.run(words, extra["out"], text, extra["baseline"], extra["target"], models)


def translate(arguments: Sequence[str]) -> int:
    """A command line of HtFLlib or PFLlib in this program's words."""
    from pfedmoe_mpi.commands import translate as room

    print(room.translate([word for word in arguments if word != "--"]).text())
    return EXIT_DONE


def bench(arguments: Sequence[str]) -> int:
    """Measure this machine and print a table."""
    words, flags, _ = _parse(arguments, {})
    settings = _configured([], flags)
    from pfedmoe_mpi.bench import command

    return command.run(words, settings, flags)


def check(arguments: Sequence[str]) -> int:
    """Tell what this cluster can do: MPI, file system, GPU, signals."""
    words, flags, _ = _parse(arguments, {})
    _at_most(words, 1, "one FOLDER")
    _no_settings("check", flags)
    from pfedmoe_mpi.commands import check as room

    return room.run(Path(words[0] if words else "."))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "restart": restart,
    "evaluate": evaluate,
    "inspect": inspect,
    "export": export,
    "data": data,
    "reproduce": reproduce,
    "report": report,
    "translate": translate,
    "bench": bench,
    "check": check,
}
WITHOUT_MPI = {"inspect", "export", "data", "report", "translate"}


def _parse(arguments: Sequence[str], extra: dict[str, str]) -> tuple[list[str], Settings, dict[str, str]]:
    """(words, settings by dotted name, the command's own flags)."""
    known = {**config.fields(), **extra}
    words: list[str] = []
    flags: Settings = {}
    found = dict(extra)
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name, joined, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name not in known:
            flag = word.partition("=")[0]
            raise ConfigError(f"there is no flag {flag}{nearest(name, known)}", "--help lists every flag")
        if not joined:
            bare = not rest or rest[0].startswith("--")
            if bare and not _is_boolean(known[name]):
                raise ConfigError(f"--{name} needs a value", f"--{name} VALUE")
            value = "true" if bare else rest.pop(0)
        if name in extra:
            found[name] = value
        else:
            flags[name] = value
    return words, config.located(flags, Path.cwd()), found


def _is_boolean(known: Any) -> bool:
    """Of a setting's field, or of the default of a command's own flag: alone it means true."""
    return known in {"true", "false"} if isinstance(known, str) else known.annotation is bool


def _configured(words: Sequence[str], flags: Settings) -> Config:
    """A TOML file, if any, with the flags over it."""
    if words and "." not in words[0] and not os.path.exists(words[0]):
        problem = f"{words[0]} is neither a command nor a configuration file{nearest(words[0], COMMANDS)}"
        raise ConfigError(problem, f"the commands are {', '.join(COMMANDS)}")
    settings = config.read_toml(Path(words[0])) if words else {}
    return config.build({**settings, **flags})


def _boolean(name: str, value: str) -> bool:
    if value.lower() not in {"true", "false"}:
        raise ConfigError(f"--{name} {value}: neither true nor false", f"--{name} true|false")
    return value.lower() == "true"


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"--{name} {value} is no number", f"--{name} 0.1") from None


def _no_settings(command: str, flags: Settings) -> None:
    if flags:
        raise ConfigError(f"{command} takes no --{next(iter(flags))}", "leave it out")


def _at_most(words: Sequence[str], number: int, what: str) -> None:
    if len(words) > number:
        hint = nearest(words[0], COMMANDS)
        raise ConfigError(f"at most {what} is expected, not {' '.join(words)}{hint}", USAGE)


def _exactly(command: str, words: Sequence[str], *what: str) -> Sequence[str]:
    if len(words) != len(what):
        usage = next(line.strip() for line in USAGE.splitlines() if f"pfedmoe_mpi {command} " in line)
        raise ConfigError(f"expected {' '.join(what)}, not {' '.join(words) or 'nothing'}", usage)
    return words


def _parser() -> argparse.ArgumentParser:
    """Only for its help text: every setting with its sentence, choices and default."""
    methods = "\n".join(f"  {name:12} {config_methods.summary(name)}" for name in config_methods.names())
    parser = argparse.ArgumentParser(
        prog="pfedmoe-mpi",
        usage=USAGE,
        description=f"Personalised federated learning under MPI.\n\nalgorithms:\n{methods}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        epilog="Lists are comma-separated, booleans true or false, alone true; names accept - for _.",
    )
    groups: dict[str, Any] = {}
    for name, field in config.fields().items():
        section = name.rpartition(".")[0] or "run"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        choices = config.choices(field)
        text = f"{field.description or ''} [{shown(field.default)}]".replace("%", "%%")
        metavar = "{" + ",".join(choices) + "}" if choices else "VALUE"
        groups[section].add_argument(f"--{name}", metavar=metavar, help=text)
    return parser


def shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return str(default).lower() if isinstance(default, bool) else str(default) or "none"
