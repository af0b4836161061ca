"""The repository's folders, and the environment in which a child process finds this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
JOBS = ROOT / "jobs"


def with_support(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which `python -m support.NAME` works from any folder."""
    folders = [str(TESTS), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(folders)}
