"""Flags of other programs: every word of the table gives a remedy that names settings of this one."""

from __future__ import annotations

import pytest

from pfedmoe_mpi import config, parser
from pfedmoe_mpi.config import flags, neighbours
from pfedmoe_mpi.errors import ConfigError

HERE = set(flags.settings())
THEIRS = [
    *(word for flag in neighbours.FLAGS if not flag.elsewhere for word in (flag.short, flag.long)),
    *neighbours.WORDS,
    *neighbours.ADVICE,
]


def refusal(flag: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parser.parser("run").read([flag, "3"])
    return caught.value


@pytest.mark.parametrize("word", sorted(set(THEIRS) - HERE - {"algorithm"}))
def test_remedy_names_the_setting_here(word: str) -> None:
    settings = neighbours.settings_for(word)
    assert set(settings) <= HERE
    for flag in {f"--{word}", f"--{word.replace('_', '-')}"}:
        error = refusal(flag)
        assert error.problem == f"there is no flag {flag}"
        assert [name for name in settings if f"--{name}" not in error.remedy] == []
        if not settings:
            assert error.remedy == neighbours.advice(word) != ""


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--lr", "use --train.lr or --train.lr_shared"),
        ("--batch-size", "use --train.batch"),
        ("--batch_size", "use --train.batch"),
        ("--epochs", "use --train.epochs"),
        ("--global_rounds", "use --rounds"),
        ("--num_clients", "use --clients"),
        ("-nc", "use --clients"),
        ("--lamda", "use --fedproto.weight, --fd.weight or --fedtgp.weight"),
        ("--times", "run once for each --seed 0, 1, 2, …: `report` reads seeds as replicates"),
        ("--resume", "`pfedmoe-mpi restart RUN_DIR` continues a run"),
        ("--checkpoint_evry", "use --run.checkpoint_every"),
        ("--share", "use --join.share or --pfedmoe.share"),
        ("--h", "`pfedmoe-mpi run --help` lists every flag"),
        ("--zzzzzz", "`pfedmoe-mpi run --help` lists every flag"),
    ],
)
def test_remedy(flag: str, remedy: str) -> None:
    assert refusal(flag).remedy == remedy


def test_a_file_gets_the_same_suggestions() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'epochs'; did you mean 'train.epochs'\?") as caught:
        config.build({"epochs": 3, "lr": 0.1})
    assert "no setting 'lr'; did you mean 'train.lr' or 'train.lr_shared'?" in caught.value.problem


def test_no_word_is_listed_twice() -> None:
    words = [word for _, words in neighbours._OTHERS for word in words.split()]
    assert len(words) == len(set(words))
    assert not set(neighbours.ADVICE) & set(words)
