"""The parsers of command lines, made of `arguments.COMMANDS` with argparse.

Importing this needs no pydantic, numpy, torch or MPI; only the parser of a command with settings imports
`config.flags`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi.arguments import COMMANDS, FILES, PROGRAM, Command
from pfedmoe_mpi.errors import ConfigError, either
from pfedmoe_mpi.names import check_text

SETTINGS_NOTE = f"The settings that `{PROGRAM} run --help` lists are flags here, too."


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`s; flags and positional arguments may come in any order."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.settings: set[str] = set()
        self._algorithm = ""
        self._example = ""
        self.color = False  # from Python 3.14 on; the usage is part of messages

    def fill(self, command: Command, every_setting: bool, algorithm: str = "") -> Parser:
        """Add a command's arguments; settings are hidden in help, except in `run` or with `every_setting`.

        Args:
            algorithm: the file of a method whose settings are flags, too.
        """
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
            self._algorithm = algorithm
            self.settings = set(flags.settings(algorithm))
            flags.add_settings(self, every_setting or command is COMMANDS["run"], algorithm)
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
    def _sections(self) -> set[str]:
        """The sections that the flags set."""
        return {flag.rpartition(".")[0] for flag in self._flags}

    @property
    def _name(self) -> str:
        return self.prog.removeprefix(f"{PROGRAM} ")

    def _unknown(self, flag: str) -> ConfigError:
        """Return the error about a flag that the command does not have."""
        from pfedmoe_mpi.config import neighbours

        name = flag.lstrip("-").replace("-", "_")
        problem = f"there is no flag {flag}" if self.settings else f"{self._name} has no flag {flag}"
        if self.settings:
            from pfedmoe_mpi.config import config, methods

            if name in config.BOOKKEEPING:
                return ConfigError(f"{flag} is not a flag: the program writes it", f"remove {flag}")
            config.check_methods([name])
            section, dot, _ = name.partition(".")
            if self._algorithm and dot and section == methods.name(self._algorithm).replace("-", "_"):
                methods.check(self._algorithm)
            elif dot and section not in self._sections and (remedy := methods.file_remedy(section)):
                return ConfigError(problem, remedy)
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


def parser(name: str, words: Sequence[str] = ()) -> Parser:
    """Return the parser of one command; its flags depend on the method that the command line chooses."""
    algorithm = ""
    if COMMANDS[name].settings:
        from pfedmoe_mpi.config import flags

        algorithm = flags.method_file(words)
    return Parser(prog=f"{PROGRAM} {name}").fill(COMMANDS[name], every_setting=False, algorithm=algorithm)


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
