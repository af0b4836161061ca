"""What every command accepts: its positional arguments, flags and examples.

Importing this needs no pydantic, numpy, torch or MPI.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

PROGRAM = "pfedmoe-mpi"


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


def width(text: str) -> float:
    """Read a width in points, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number of points above 0, not '{text}'")
    return value


def several(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, not '{text}'")
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
PRESET = argument(
    "--preset",
    default="",
    metavar="NAME",
    help="settings by one name, which the file and the flags override: paper = pFedMoE as published",
)
OUT = argument("out", metavar="OUT.h5", help="the file to write, which must not exist")
CHECKPOINT = argument("source", metavar="CHECKPOINT.h5", help="a checkpoint of a run")
REBUILT = "reconstruction"
BATCH = f"{REBUILT}: samples in a batch"
SHADOWS = (
    "membership by likelihood ratio: train N more runs of as many rounds, or use runs trained before "
    "[default none]"
)
SHELLS = ("bash", "zsh", "tcsh")
FILES = ("PATH", "FOLDER", "DIR", "OUT", ".h5", ".toml")  # in the names of arguments that are files

COMMANDS = {
    "run": Command(
        "Train from round 1.",
        (CONFIG, PRESET, switch("--dry", "print the plan and exit")),
        ("run --algorithm fedproto --rounds 60 --run.dir runs/NAME", "run CONFIG.toml --train.lr 0.02 --dry"),
        settings=True,
        mpi=True,
    ),
    "restart": Command(
        "Continue a run from its newest checkpoint, or from a given one.",
        (
            argument("source", metavar="RUN_DIR|CHECKPOINT.h5", help="a run folder or a checkpoint of it"),
            switch("--dry", "print the plan and exit"),
        ),
        ("restart runs/NAME", "restart runs/NAME/checkpoints/round-000020.h5 --rounds 80"),
        settings=True,
        mpi=True,
    ),
    "fork": Command(
        "Branch a run off one of its rounds, under settings that a restart refuses.",
        (
            argument("source", metavar="RUN_DIR", help="the folder of the run"),
            argument("--at", required=True, type=number, metavar="ROUND", help="a round with a checkpoint"),
            switch("--dry", "print the plan and exit"),
        ),
        (
            "fork runs/a --at 200 --gate.weights equal --run.dir runs/b",
            "fork runs/a --at 50 --algorithm fedprox",
        ),
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
    "verify": Command(
        "Replay rounds of a run from its checkpoints, compare every bit, and print a card.",
        (
            argument(
                "source", metavar="RUN_DIR", help="the folder of the run; --rounds N replays N rounds, not 3"
            ),
        ),
        ("verify runs/NAME", "verify runs/NAME --rounds 10 --data.path OTHER/cifar10.h5 > card.md"),
        settings=True,
        mpi=True,
    ),
    "attack": Command(
        "Measure what a checkpoint and a contribution give away.",
        (
            CHECKPOINT,
            argument(
                "--kind",
                required=True,
                choices=("membership", "reconstruction"),
                help="which rows were trained on, or a client's samples from one contribution",
            ),
            argument("--shadows", nargs="+", default=(), metavar="N|RUN_DIR", help=SHADOWS),
            argument("--client", type=number, metavar="K", help=f"{REBUILT}: the client [default first]"),
            argument("--samples", type=several, default=1, metavar="B", help=f"{BATCH}: 1 to 8 [default 1]"),
            argument(
                "--trials", type=several, default=4, metavar="N", help=f"{REBUILT}: batches [default 4]"
            ),
            argument(
                "--steps", type=several, default=300, metavar="N", help=f"{REBUILT}: descent [default 300]"
            ),
            switch("--json", "print JSON instead of a table"),
        ),
        (
            "attack runs/NAME/checkpoints/best.h5 --kind membership",
            "attack runs/s0/checkpoints/round-000020.h5 --kind membership --shadows runs/s1 runs/s2",
            "attack best.h5 --kind reconstruction --samples 2 --privacy.clip 0.1 --privacy.noise 1",
        ),
        settings=True,
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
    "pack": Command(
        "Write a checkpoint that relies on other files as one complete file.",
        (CHECKPOINT, OUT),
        ("pack round-000040.h5 OUT.h5", "pack runs/NAME/checkpoints/round-000040.h5 OUT.h5"),
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
    "weights fetch": Command(
        "Download published weights of networks, as files for model.weights.",
        (
            argument("names", nargs="+", metavar="NAME", help="a network of torchvision, or timm:NAME"),
            argument("--out", default=".", metavar="FOLDER", help="where to write NAME.pth [default .]"),
        ),
        (
            "weights fetch resnet18 --out weights",
            "weights fetch resnet18 timm:vit_tiny_patch16_224",
        ),
    ),
    "reproduce": Command(
        "Train the runs of a table that are not finished.",
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
            argument(
                "--select",
                default="",
                choices=("validation",),
                help="choose settings on validation rows, then train the chosen ones with fresh seeds",
            ),
            argument(
                "--together",
                type=several,
                default=1,
                metavar="K",
                help="train K runs at once, each on a part of the ranks [default 1]",
            ),
            argument(
                "--until",
                type=width,
                default=0.0,
                metavar="POINTS",
                help="add seeds until the 95 %% interval of every difference from --baseline is narrower",
            ),
            argument(
                "--most",
                type=several,
                default=20,
                metavar="SEEDS",
                help="--until: train no more seeds than these, and print how many it would take [default 20]",
            ),
            argument(
                "--baseline",
                default="",
                metavar="NAME",
                help="--until: method to compare the others with [default standalone]",
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
            argument(
                "folders",
                nargs="+",
                metavar="RUN_DIR",
                help="run folders, folders of them, and result files of PFLlib and HtFLlib",
            ),
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
            argument(
                "--select",
                default="",
                choices=("validation", "test", "last"),
                help="the round reported: best on validation rows, best on test rows (too high), or the last "
                "[default validation if all runs have such rows, else last]",
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
                help="any of round, ranks, sum, idle, precision, write, network, gpu; or start [RANKS], "
                "wide [RANKS], scale [PART...] [RANKS] or privacy [NUMBERS], alone and without mpirun "
                "[default those that make sense on these ranks]",
            ),
            argument(
                "--figure", default="", metavar="FILE", help="scale: draw cost against clients (.svg, .png)"
            ),
            switch("--quick", "take a minute: less data, fewer repetitions"),
        ),
        ("bench --quick", "bench round --train.batch 64", "bench wide 64", "bench scale"),
        settings=True,
        mpi=True,
    ),
    "conformance": Command(
        "Check on 4 ranks that methods, also those of your own, keep every promise to their users.",
        (
            argument("methods", nargs="*", metavar="METHOD|FILE.py", help="methods [default all]"),
            argument("--check", default="", metavar="NAME,...", help="only these checks [default all]"),
        ),
        ("conformance ./mine.py", "conformance fedavg fedprox --check ranks,restart"),
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
        (
            argument("words", nargs="*", metavar="COMMAND", help="a command [default: the list of commands]"),
            argument("--algorithm", metavar="FILE.py", help="a method's file, whose settings are listed too"),
        ),
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
