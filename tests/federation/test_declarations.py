"""What a method declares is checked before anything is written, and what a step returns when it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pfedmoe_mpi.report import settings_section
from pfedmoe_mpi.report.load import load_run
from support.launcher import Result
from support.small_federation import build_loop, write_data_files

SMALL = (
    *("--data.source", "synthetic", "--data.samples", "100", "--data.size", "8", "--clients", "2"),
    *("--model.shared", "mlp5", "--rounds", "1", "--train.device", "cpu"),
)
METHOD = """
from pfedmoe_mpi.algorithms.base import Algorithm, Block


class Mine(Algorithm):
    homogeneous = True

    def state(self):
        return {"model": self.task.model(self.task.pool[0])}

    def predict(self, parts, x):
        return parts.model(x)
"""


def hook(text: str) -> str:
    """Return the method with one more hook."""
    return METHOD + "\n    " + text.replace("\n", "\n    ") + "\n"


def private(part: str) -> str:
    return hook(f"def client_state(self, client):\n    return {{'{part}': self.task.head()}}")


def payload(block: str, name: str = "model") -> str:
    return hook(f"def payload(self, sizes):\n    return {{'{name}': {block}}}")


REFUSED = {
    "no answer": (METHOD.partition("    def predict")[0], "has no method predict"),
    "twice": (private("model"), "part 'model' is declared in state and in client_state"),
    "name": (private("vector"), "part 'vector' has the name of a method of Parts"),
    "phase": (
        hook("def phases(self, role):\n    return [self.phase({'modle': 0.1})]"),
        "phases: 'modle' is no part in state or client_state",
    ),
    "no block": (payload("5"), "payload: 'model' is 5, not a Block"),
    "weight": (
        payload("Block(sizes['model'], weight='sample')"),
        "weight = 'sample'; use one of samples, one, class_samples, class_one",
    ),
    "rows": (payload("Block(1, rows=3)"), "rows = 3, but weight = 'samples' needs 1"),
    "classes": (payload("Block(1, rows=3, weight='class_one')"), "weight = 'class_one' needs 10"),
    "slot": (payload("Block(sizes['model'], slot=True)"), "'model' is a slot, so override server_update"),
    "no part": (payload("Block(4)", "other"), "'other' is no part of the state of that size"),
    "size": (payload("Block(4)"), "'model' is no part of the state of that size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(assert_refused: Callable[..., str], tmp_path: Path, case: str) -> None:
    text, pattern = REFUSED[case]
    (tmp_path / "mine.py").write_text(text)
    message = assert_refused(pattern, *SMALL, "--algorithm", "mine.py", "--run.dir", "new")
    assert "mine.py" in message


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("None", TypeError, "client_step returns None, not the values of the payload by name"),
        (
            "{'model': turn.parts.vector('model')[:-1]}",
            ValueError,
            r"numbers as 'model', and payload declares 1 × \d+",
        ),
        (
            "{'model': turn.parts.vector('personal')}",
            KeyError,
            "the method declares no part 'personal' in state or client_state",
        ),
    ],
)
def test_a_step_that_returns_something_else_says_what(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "mine.py").write_text(hook(f"def client_step(self, turn):\n    return {text}"))
    loop = build_loop(write_data_files(tmp_path)["small"], str(tmp_path / "mine.py"), model__pool="auto")
    with pytest.raises(error, match=message):
        loop.run()


def test_report_knows_the_equal_models_that_the_method_needs(
    run_command: Callable[..., Result], tmp_path: Path
) -> None:
    """Also when the file has gone: the run has a copy."""
    (tmp_path / "mine.py").write_text(METHOD)
    run_command(*SMALL, "--algorithm", "mine.py", "--run.dir", "run")
    (tmp_path / "mine.py").unlink()
    run = load_run(tmp_path / "run")
    found = settings_section.automatic_settings(run)["model.pool"]
    assert list(found) == run.config["model.pool"] and len(found) == 1


def test_report_knows_what_a_method_is_derived_from(
    run_command: Callable[..., Result], tmp_path: Path
) -> None:
    """A start of the gate that differs from the one that the method inherits is a change."""
    derived = (
        "from pfedmoe_mpi.algorithms.pfedmoe import Options, PFedMoE\n\n\nclass Mine(PFedMoE):\n    pass\n"
    )
    (tmp_path / "mine.py").write_text(derived)
    run_command(*SMALL, "--algorithm", "mine.py", "--run.dir", "run")
    run = load_run(tmp_path / "run")
    assert settings_section.automatic_settings(run)["gate.start"] == run.config["gate.start"] == "even"
