"""Other locales than UTF-8: all files are read and written in a named encoding."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

from support.launcher import run_program
from support.paths import ROOT

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CONFIG = """\
# Größe α
rounds = 1
clients = 2
model.pool = ["fasttext"]

[data]
source = "text"
path = "news.csv"

[run]
dir = "run"
"""


def environment(name: str, folder: Path) -> dict[str, str]:
    """Return the variables of a locale such as zh_CN.GBK, which is built in the folder."""
    if name == "C":
        return ASCII
    if not shutil.which("localedef"):
        pytest.skip("no localedef to build a locale")
    language, _, charset = name.partition(".")
    command = ["localedef", "-i", language, "-f", charset, str(folder / name)]
    built = subprocess.run(command, capture_output=True, check=False, timeout=120)
    if not (folder / name).exists():
        pytest.skip(f"localedef cannot build {name}: {built.stderr!r}")
    return {"LOCPATH": str(folder), "LC_ALL": name, "PYTHONUTF8": "0"}


@pytest.mark.parametrize("name", ["C", "zh_CN.GBK", "ja_JP.EUC-JP"])
def test_commands_work_in_other_locales(name: str, tmp_path: Path) -> None:
    """Files hold letters outside of the locale; the terminal gets `?` for them."""
    (tmp_path / "c.toml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "news.csv").write_text("sport é,goal नम\nβ news,bank α\n" * 30, encoding="utf-8")
    env = environment(name, tmp_path)
    for words in (
        ["--help"],
        ["c.toml"],
        ["restart", "run", "--rounds", "2"],
        ["report", "run", "--models", "false"],
    ):
        result = run_program(0, *words, cwd=tmp_path, env=env)
        assert result.code == 0 and "Traceback" not in result.err, result.err
    page = (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")
    assert "α" in page


def test_every_file_is_opened_with_its_encoding() -> None:
    """What the lint rule cannot see: methods of paths that have no annotation, and pipes."""
    missing = []
    for path in (ROOT / "pfedmoe_mpi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and _decodes(node) and "encoding" not in _keywords(node):
                missing.append(f"{path}:{node.lineno}")
    assert not missing
    for code in ("path.read_text()", "subprocess.run(command, text=True)"):
        call = ast.parse(code, mode="eval").body
        assert isinstance(call, ast.Call) and _decodes(call)


def _keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def _decodes(call: ast.Call) -> bool:
    """Return whether a call is of `Path.read_text`, `Path.write_text`, or a process with text pipes."""
    keywords = _keywords(call)
    if isinstance(call.func, ast.Attribute) and call.func.attr in {"read_text", "write_text"}:
        return not (isinstance(call.func.value, ast.Name) and call.func.value.id == "durable")
    return "True" in {keywords.get("text"), keywords.get("universal_newlines")}
