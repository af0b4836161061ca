"""`evaluate`: accuracy and loss of every client of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.data.summary import plain
from pfedmoe_mpi.errors import EXIT_DONE
from pfedmoe_mpi.federation import metrics
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.run.console import MOST_ROWS, worst_median_best
from pfedmoe_mpi.run.evaluate import evaluation_loop

NAMES = {"std": "population std"}  # over clients


def run(path: Path, overrides: Mapping[str, Any], as_json: bool) -> int:
    """Evaluate every client with the checkpoint's server state, and return the exit code.

    Under MPI each rank evaluates a part of the clients. A damaged checkpoint, or `overrides` that do not fit
    it, end with one message and the exit code of a user's mistake.
    """

    def work(world: Comm, code: str) -> int:
        source = world.from_root(path.absolute, "source")  # ranks may be in unlike folders
        with checkpoint.open_everywhere(world, source) as loaded:
            return _evaluate(world, loaded, overrides, as_json)

    return under_mpi(work, {"command": "evaluate", "--json": as_json, **overrides}, singleton=True)


def _evaluate(world: Comm, loaded: Checkpoint, overrides: Mapping[str, Any], as_json: bool) -> int:
    """Evaluate an open checkpoint, and print the result on rank 0; collective."""
    loop = evaluation_loop(world, loaded, overrides, protected=False)
    other_data = loop.federation.data_digest != loaded.identity["data_digest"]
    result = loop.evaluation()
    if world.rank == 0:
        result = {
            "round": loaded.round,
            "trained_since": loaded.finished,
            "other_data": other_data,
            **metrics.learning(result),
        }
        names = loop.federation.partition.client_names
        print(json.dumps(result) if as_json else _table(result, names))
    return EXIT_DONE


def _table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the result as lines of text: one per client, or the worst, the median and the best of many."""
    lines = [_heading(result)]
    accuracy, loss = result["clients"]["accuracy"], result["clients"]["loss"]
    shown = list(range(len(accuracy)))
    if len(shown) > MOST_ROWS:
        lines.append(f"worst, median and best of {len(shown)} clients; --json true prints all")
        shown = worst_median_best(accuracy)
    printable = plain(names, len(names))
    for client in shown:
        named = f"  {printable[client]}" if names else ""
        lines.append(
            f"client {client:4}  accuracy {_number(accuracy[client])}  loss {_number(loss[client])}{named}"
        )
    summary = {NAMES.get(name, name): value for name, value in result["accuracy"].items()}
    lines.append("  ".join(f"{name} {_number(value)}" for name, value in summary.items()))
    if result["auc"]["mean"] is not None:
        lines.append(f"AUC mean {_number(result['auc']['mean'])}  worst {_number(result['auc']['worst'])}")
    tuned = result["accuracy_tuned"]
    unseen = result["accuracy_unseen"]
    if unseen["mean"] is not None:
        lines.append(f"unseen clients: mean {_number(unseen['mean'])}  worst {_number(unseen['worst'])}")
    if tuned["mean"] is not None:
        lines.append(f"after tuning: mean {_number(tuned['mean'])}  worst {_number(tuned['worst'])}")
    return "\n".join(lines)


def _heading(result: Mapping[str, Any]) -> str:
    """Return after which round the clients are evaluated, and on which data."""
    completed = result["round"]
    clients = ", ".join(map(str, result["trained_since"]))
    ahead = f", except clients {clients}, already trained in round {completed + 1}" if clients else ""
    data = ", on data other than the training data" if result["other_data"] else ""
    return f"after round {completed}{ahead}{data}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
