"""The definition of the Apptainer image, checked without Apptainer: its parts, and its steps in a folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.launcher import clean_environment
from support.paths import JOBS, ROOT

SECTIONS = {"files", "post", "environment", "runscript", "test", "labels", "help"}
TEXT = (JOBS / "pfedmoe.def").read_text(encoding="utf-8")
HEADER, *PARTS = re.split(r"^%(?=\w+$)", TEXT, flags=re.MULTILINE)
BODY = {part.partition("\n")[0]: part.partition("\n")[2] for part in PARTS}
FILES = [tuple(line.split()) for line in BODY["files"].splitlines() if line.strip()]


def test_definition_has_a_header_and_every_section_once() -> None:
    lines = [line for line in HEADER.splitlines() if line and not line.startswith("#")]
    keys = dict(line.split(": ", 1) for line in lines)
    assert keys["Bootstrap"] == "docker" and keys["From"].startswith("python:3.")
    minor = int(keys["From"].partition("python:3.")[2].partition("-")[0])
    assert minor >= 11, "requires-python"
    assert set(BODY) == SECTIONS and len(PARTS) == len(SECTIONS)


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_commands_of_a_section_parse(section: str) -> None:
    for shell in ("bash", "sh"):
        result = subprocess.run(
            [shell, "-n"], input=BODY[section], capture_output=True, encoding="utf-8", check=False, timeout=20
        )
        assert (result.returncode, result.stderr) == (0, "")


def test_a_failing_step_of_post_ends_the_build() -> None:
    assert BODY["post"].split()[:2] == ["set", "-e"]


def test_copied_files_exist_and_are_all_that_the_install_needs(tmp_path: Path) -> None:
    """They are installed as in %post, without dependencies, and %test's command runs from there."""
    copied = tmp_path / "opt"
    for source, target in FILES:
        assert target == f"/opt/pfedmoe/{source}"
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copied.mkdir(exist_ok=True)
        copy(ROOT / source, copied / source)
    (command,) = re.findall(r"python -m pip install --no-cache-dir '([^']+)'", BODY["post"])
    assert command == ".[mpich,report]"
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(tmp_path, *install, "--target", str(site), str(copied))
    environment = [
        line.split()[1].split("=") for line in BODY["environment"].splitlines() if "export" in line
    ]
    variables = dict(environment) | {"PYTHONPATH": str(site)}
    said = run(tmp_path, *BODY["test"].split()[1:-1], str(tmp_path), **variables)
    assert said.rstrip().endswith("all checks passed"), said
    assert run(tmp_path, "-c", "import pfedmoe_mpi; print(pfedmoe_mpi.__file__)", **variables).startswith(
        str(site)
    )


def run(folder: Path, *arguments: str, **variables: str) -> str:
    """Return the output of this Python with arguments."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=clean_environment("mpich", variables),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_installed_extras_are_those_of_the_readmes() -> None:
    """The README's first command has MPICH, and its section on reports their packages."""
    extras = re.search(r"'\.\[([\w,]+)\]'", BODY["post"])
    assert extras
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for extra in extras[1].split(","):
        assert f"pip install -e '.[{extra}]'" in readme, extra


def test_readme_runs_the_image_that_the_definition_builds() -> None:
    readme = (JOBS / "README.md").read_text(encoding="utf-8")
    build = "apptainer build pfedmoe.sif jobs/pfedmoe.def"
    assert f"    {build}\n" in readme and f"#     {build}\n" in HEADER
    assert "CONTAINER=pfedmoe.sif LAUNCH='srun --mpi=pmi2' sbatch -A ACCOUNT -p PARTITION" in readme
    assert "APPTAINERENV_MPI4PY_LIBMPI=" in readme
