"""Every method passes all conformance checks; every deliberately broken method fails its check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pfedmoe_mpi.config import methods
from pfedmoe_mpi.conformance.command import CHECKS
from support.launcher import error_message, run_program
from support.mpi_job import run_conformance, run_module
from support.paths import TESTS

BROKEN = sorted(path.stem for path in (TESTS / "broken").glob("*.py"))


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], str]:
    """{(check, method): verdict} of all checks on all methods, in one job."""
    _, output = run_conformance(timeout=550)
    found = re.findall(r"^(\w+) (\w+): (.*)$", output, re.MULTILINE)
    assert found, output
    return {(check, method): verdict for check, method, verdict in found}


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("check", CHECKS)
def test_method_passes_the_conformance_check(
    verdicts: dict[tuple[str, str], str], check: str, method: str
) -> None:
    assert verdicts.get((check, method), "the job ended before") == "pass"


def meant() -> dict[str, str]:
    """Return {broken method: the check it fails}, from their docstrings."""
    found = {
        name: re.search(r"^Fails: (\w+)$", (TESTS / "broken" / f"{name}.py").read_text(), re.MULTILINE)
        for name in BROKEN
    }
    assert all(found.values()), f"no check is named: {found}"
    return {name: match[1] for name, match in found.items() if match}


@pytest.fixture(scope="module")
def caught() -> dict[str, tuple[int, str]]:
    """{broken method: (exit code, output of its job)}.

    All are checked in one job. A method that ends the job gets its exit code, and those after it another job.
    """
    waiting = sorted(meant().items(), key=lambda item: item[1] == "idle")  # ends its job: the last
    found: dict[str, tuple[int, str]] = {}
    while waiting:
        words = [word for name, check in waiting for word in (check, str(TESTS / "broken" / f"{name}.py"))]
        job = run_module("broken_methods", *words, ranks=4, limit=200)
        codes = {name: int(code) for name, code in re.findall(r"^(\w+) ended with (\d+)$", job.output, re.M)}
        ended, waiting = waiting[: len(codes) + 1], waiting[len(codes) + 1 :]
        found |= {name: (codes.get(name, job.code), job.output) for name, _ in ended}
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_broken_method_fails_its_check(caught: dict[str, tuple[int, str]], name: str) -> None:
    check = meant()[name]
    code, output = caught[name]
    found = f"{check} {name}: FAIL" in output or (check == "idle" and "did not reach" in output)
    assert code == 1 and found, output


def test_every_designed_violation_has_a_broken_method() -> None:
    assert set(BROKEN) >= {
        *("replaced_module", "unseeded", "kept_momentum", "private_payload"),
        *("lonely_collective", "forgotten_buffers", "all_clients", "float_sum"),
        *("scaled_payload", "talking_loss", "remembering_server", "side_channel"),
    }


FROZEN = """
from pfedmoe_mpi.algorithms.base import Block
from pfedmoe_mpi.algorithms.fedper import FedPer


class Frozen(FedPer):
    def state(self):
        return {**super().state(), "still": self.task.head()}

    def payload(self, sizes):
        return {name: Block(size) for name, size in sizes.items() if name not in %s}

    def client_step(self, turn):
        return {n: v for n, v in super().client_step(turn).items() if n != "still"}

    def phases(self, role):
        return [self.phase({"base": 0.01, "head": 0.01})]
"""


@pytest.mark.parametrize(
    ("left_out", "verdict"), [("('still',)", "pass"), ("()", "FAIL shared tensor still")]
)
def test_module_that_is_neither_sent_nor_trained_may_stay(
    tmp_path: Path, left_out: str, verdict: str
) -> None:
    (tmp_path / "frozen.py").write_text(FROZEN % left_out)
    result = run_program(4, "conformance", "./frozen.py", "--check", "moves", cwd=tmp_path, timeout=120)
    assert f"moves frozen: {verdict}" in result.out + result.err


RAISING = """
from pfedmoe_mpi.algorithms.fedavg import FedAvg


class Raising(FedAvg):
    def client_step(self, turn):
        raise KeyError("no such part")
"""


def test_check_that_an_exception_ends_is_named(tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    checks = ("--check", "layouts,moves,restart")
    result = run_program(4, "conformance", "./raising.py", *checks, cwd=tmp_path, timeout=120)
    assert result.code == 1 and "layouts raising: pass" in result.out, result.out + result.err
    assert "KeyError: 'no such part'" in result.err and "\nduring moves of raising" in result.err, result.err


def test_setting_that_a_method_refuses_ends_all_ranks(tmp_path: Path) -> None:
    """The check asks one rank of the four, and the others wait for its answer."""
    words = ("conformance", "fedbn", "--server.optimiser", "yogi", "--check", "ranks")
    result = run_program(4, *words, cwd=tmp_path, timeout=60)
    error_message(result, "server.optimiser = yogi, but the server of fedbn has an update of its own")
