"""Settings of a method's file of one's own: what is answered where one of them is misspelt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

OWN = """
from pfedmoe_mpi.algorithms.fedavg import FedAvg
from pfedmoe_mpi.config.sections import Section


class Options(Section):
    inner: float = 0.5


class Mine(FedAvg):
    pass
"""


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        ("'my-own' cannot be the name of settings", ["--algorithm", "./my-own.py", "--my-own.inner", "4"]),
        ("no flag --mine.inenr\n  remedy: use --mine.inner", ["--algorithm", "mine.py", "--mine.inenr", "4"]),
        ("no algorithm 'a{300}'", ["--algorithm", "a" * 300]),
        ("no flag --a{300}.x", [f"--{'a' * 300}.x", "4"]),
        ("no algorithm 'mine'\n  remedy: use --algorithm mine.py", ["--algorithm", "mine"]),
        ("no flag --mine.x\n  remedy: use --algorithm mine.py", ["--algorithm", "mine", "--mine.x=4"]),
        ("class Options: .*copy cannot be the name of a setting", ["--algorithm", "copying.py"]),
        ("no setting 'mine.inenr'; did you mean 'mine.inner'", ["typo.toml"]),
        ("algorithm = .*mine.PY is not a file(.|\n)*write PATH/METHOD.py", ["--algorithm", "./mine.PY"]),
    ],
)
def test_settings_of_a_file_of_ones_own_are_named(
    assert_refused: Callable[..., str], tmp_path: Path, pattern: str, arguments: list[str]
) -> None:
    for name in ("mine.py", "my-own.py", "mine.PY"):
        (tmp_path / name).write_text(OWN)
    (tmp_path / "copying.py").write_text(OWN.replace("inner", "copy"))
    (tmp_path / "typo.toml").write_text('algorithm = "./mine.py"\n[mine]\ninenr = 4\n')
    assert_refused(pattern, *arguments)
