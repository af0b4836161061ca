"""What the hooks of a method of the user's own may do in a round, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support import launcher
from support.launcher import SMALL_RUN, error_message, read_metrics

METHOD = '''"""Mine: FedAvg with a change. 2026."""
import math
import sys
from pfedmoe_mpi.algorithms.base import TensorPart
from pfedmoe_mpi.algorithms.fedavg import FedAvg
from pfedmoe_mpi.errors import ConfigError

class Mine(FedAvg):
{body}
'''
RUN = (*SMALL_RUN, "--algorithm", "./mine.py", "--model.pool", "mlp5", "--rounds", "2", "--run.dir", "run")


def write_method(folder: Path, body: str) -> None:
    (folder / "mine.py").write_text(METHOD.format(body=body))


@pytest.mark.parametrize(
    ("members", "shown"),
    [("[3, 1]", "3, 1"), ("[1, 1]", "1, 1"), ("[0, 4]", "0, 4"), ("range(99, 0, -1)", "91, 90, …")],
)
def test_cohorts_name_clients_once_and_ascending(
    tmp_path: Path, session: launcher.Session, members: str, shown: str
) -> None:
    """Otherwise a row's values would be those of other clients."""
    write_method(
        tmp_path,
        f"""
    def cohort(self, round):
        return [(k, "client") for k in ([0, 2] if round == 1 else {members})]""",
    )
    result = session(*RUN, "--run.checkpoint_every", "1", cwd=tmp_path)
    error_message(result, rf"mine\.py: cohort: .*{shown} are not clients that train, each once")
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_first_cohort_that_cannot_be_leaves_no_run(tmp_path: Path, session: launcher.Session) -> None:
    body = """
    def cohort(self, round):
        return [(2, "client"), (0, "client")]"""
    write_method(tmp_path, body)
    error_message(session(*RUN, cwd=tmp_path), r"mine\.py: cohort: 2, 0 are not clients that train")
    assert not (tmp_path / "run").exists()


def test_error_with_a_message_in_the_servers_update_ends_the_job(tmp_path: Path) -> None:
    """Rank 0 updates alone; the others would wait for it for ten minutes."""
    write_method(
        tmp_path,
        """
    def server_update(self, state, means, round):
        raise ConfigError("the server cannot", "do not ask it")""",
    )
    started = time.monotonic()
    result = launcher.run_program(3, *RUN, cwd=tmp_path)
    assert result.code not in {0, 2, 75} and time.monotonic() - started < 60
    text = result.out + result.err
    assert text.count("RuntimeError: the server cannot") == 1 and "server update of round 1" in text, text


@pytest.mark.parametrize(("fill", "dropped"), [("math.nan", []), ("0.0", [0, 1, 2, 3])])
def test_private_values_may_stay_undefined_if_they_begin_so(
    tmp_path: Path, session: launcher.Session, fill: str, dropped: list[int]
) -> None:
    write_method(
        tmp_path,
        f"""
    def client_state(self, client):
        return {{"prototypes": TensorPart((3, 2), {fill})}}

    def client_step(self, turn):
        turn.parts.prototypes[0] = math.nan
        return super().client_step(turn)""",
    )
    result = session(*RUN, "--rounds", "1", cwd=tmp_path)
    if dropped:
        assert result.code == 1 and "the loss, gradient or vector of every client" in result.err
    else:
        assert result.code == 0, result.err
        assert read_metrics(tmp_path / "run")[0]["dropped"] == []


@pytest.mark.parametrize("end", ["raise ValueError('nothing to see')", "sys.exit('nothing to see')"])
def test_step_that_cannot_be_counted_does_not_end_the_run(
    tmp_path: Path, session: launcher.Session, end: str
) -> None:
    """The operations of a client step are counted on rows of zeros, which no client has."""
    write_method(
        tmp_path,
        f"""
    def loss(self, parts, batch):
        if not batch.x.std():
            {end}
        return super().loss(parts, batch)""",
    )
    result = session(*RUN, cwd=tmp_path)
    assert result.code == 0, result.err
    assert len(read_metrics(tmp_path / "run")) == 2
    assert "were not counted" in (tmp_path / "run" / "log" / "rank-0000.txt").read_text()
