"""How a command line is split into positional arguments, settings and a command's own flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi import cli, config, parser
from pfedmoe_mpi.config import flags
from pfedmoe_mpi.errors import ConfigError


def read(line: str) -> dict[str, Any]:
    """Return what a command line of `run` gives, without what it leaves at its default."""
    given = vars(parser.parser("run").read(line.split()))
    extra = {name: given[name] for name in ("config", "dry") if given[name]}
    return {**given["settings"], **extra}


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("--rounds 3", {"rounds": "3"}),
        ("--rounds=3", {"rounds": "3"}),
        ("--rounds 3 --rounds 4", {"rounds": "4"}),
        ("--run.checkpoint-every 5", {"run.checkpoint_every": "5"}),
        ("--run.checkpoint-every=5", {"run.checkpoint_every": "5"}),
        ("--data.mean -0.5,0.1", {"data.mean": "-0.5,0.1"}),
        ("--data.mean=-0.5,0.1", {"data.mean": "-0.5,0.1"}),
        ("--data.mean -1", {"data.mean": "-1"}),
        ("--train.lr -x", {"train.lr": "-x"}),
        ("--train.augment flip,crop", {"train.augment": "flip,crop"}),
        ("--run.force", {"run.force": "true"}),
        ("--run.force --rounds 3", {"run.force": "true", "rounds": "3"}),
        ("--run.force FALSE", {"run.force": "FALSE"}),
        ("--run.force=", {"run.force": ""}),
        ("--dry", {"dry": True}),
        ("--dry True", {"dry": True}),
        ("--dry=false", {}),
        ("c.toml --rounds 3", {"config": "c.toml", "rounds": "3"}),
        ("--rounds 3 c.toml", {"config": "c.toml", "rounds": "3"}),
        ("--rounds 3 c.toml --dry", {"config": "c.toml", "rounds": "3", "dry": True}),
        ("--data.name a=b", {"data.name": "a=b"}),
        ("--data.name=a=b", {"data.name": "a=b"}),
    ],
)
def test_grammar(line: str, result: dict[str, Any]) -> None:
    assert read(line) == result


def test_values_may_be_empty_or_hold_spaces() -> None:
    words = ["--data.name", "", "--data.source", "a b", "--model.shared=c d"]
    given = parser.parser("run").read(words).settings
    assert given == {"data.name": "", "data.source": "a b", "model.shared": "c d"}


@pytest.mark.parametrize("line", ["--roun 3", "--train.l 3", "--data 3", "-r 3", "--", "- 3"])
def test_no_flag_is_abbreviated(line: str) -> None:
    with pytest.raises(ConfigError, match="no flag"):
        read(line)


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("report", "a --out f b --text true c", {"folders": ["a", "b", "c"], "out": "f", "text": True}),
        ("report", "a", {"models": True, "text": False}),
        ("report", "a --models false", {"models": False}),
        ("export", "a.h5 --client 7 b.h5", {"source": "a.h5", "out": "b.h5", "client": 7}),
        ("inspect", "--digest a.h5", {"digest": True, "source": "a.h5"}),
        ("inspect", "a.h5", {"digest": False}),
        ("reproduce", "t.toml --scale .5 --task 3", {"scale": 0.5, "task": "3", "dry": False}),
        ("data prepare", "--data.size 8 c.toml o.h5", {"config": "c.toml", "out": "o.h5"}),
        ("data prepare", "o.h5 --data.size 8", {"config": None, "out": "o.h5"}),
        ("bench", "start 16 --rounds 3", {"words": ["start", "16"], "settings": {"rounds": "3"}}),
        ("check", "", {"folder": "."}),
    ],
)
def test_arguments_of_commands(name: str, line: str, expected: dict[str, Any]) -> None:
    given = vars(parser.parser(name).read(line.split()))
    assert {key: given[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("line", "name", "rest"),
    [
        ("data prepare o.h5 --seed 3", "data prepare", "o.h5 --seed 3"),
        ("data --seed 3 prepare o.h5", "data prepare", "--seed 3 o.h5"),
        ("data --seed=3 prepare o.h5", "data prepare", "--seed=3 o.h5"),
        ("data --data.mean -1 partition o.h5", "data partition", "--data.mean -1 o.h5"),
        ("data --data.name prepare partition o.h5", "data partition", "--data.name prepare o.h5"),
        ("data o.h5 prepare", "data", "o.h5 prepare"),
        ("data --seed 3", "data", "--seed 3"),
        ("data --seed 3 prepare --help", "help", "data prepare"),
        ("--seed 3 restart runs/x", "run", "--seed 3 restart runs/x"),
        ("restart runs/x --version", "version", ""),
    ],
)
def test_flags_may_precede_the_command_of_a_group(line: str, name: str, rest: str) -> None:
    assert cli._command(line.split()) == (name, rest.split())


def test_paths_count_from_the_current_folder() -> None:
    given = parser.parser("restart").read(["runs/x", "--data.path", "d.h5"])
    assert given.settings == {"data.path": str(Path.cwd() / "d.h5")} and given.source == "runs/x"


@pytest.mark.parametrize("name", config.fields())
def test_bookkeeping_is_in_files_only(name: str, tmp_path: Path) -> None:
    """The program writes it into `config.toml`; the command line does not accept it."""
    assert (name in flags.settings()) == (name not in config.config.BOOKKEEPING)
    if name in config.config.BOOKKEEPING:
        with pytest.raises(ConfigError, match="is not a flag: the program writes it"):
            read(f"--{name} 1")
        (tmp_path / "c.toml").write_text(
            f"{name} = 1" if name in {"run.scale", "run.forked"} else f'{name} = "a"'
        )
        assert config.given(config.build(config.read_toml(tmp_path / "c.toml")), name)
