"""Reading checkpoints: inspect, digest, evaluate, export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint, client_file, seal
from pfedmoe_mpi.errors import EXIT_DONE
from pfedmoe_mpi.federation import metrics
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import under_mpi
from pfedmoe_mpi.run.evaluate import evaluation_loop

if TYPE_CHECKING:
    pass


def digest(loaded: Checkpoint) -> str:
    """SHA-256 over everything a restart would use; no time, memory, host or path.

    Vectors, round, partial sum, learning metrics (their shortest decimal form stands for the float's bits),
    data and partition digests, seed, and the method with its section.
    """
    state = sha256()
    method = loaded.config["algorithm"]
    facts = {
        "round": loaded.round,
        "algorithm": [method, loaded.config.get(method), loaded.config["seed"], loaded.config["model"]],
        "digests": [loaded.identity["data_digest"], loaded.identity["partition_digest"]],
        "layouts": [loaded.state_layout.digest, *(loaded.layout(k).digest for k in range(loaded.clients))],
        "history": [metrics.learning(row) for row in loaded.history],
    }
    state.update(json.dumps(facts, sort_keys=True).encode())
    state.update(loaded.state.tobytes())
    for client in range(loaded.clients):
        state.update(loaded.vector(client).tobytes())
    if loaded.partial is not None:
        state.update(loaded.partial.tobytes())
    return state.hexdigest()


def inspect(path: Path, *, digest_only: bool) -> int:
    """Print what is in a checkpoint, or its digest alone."""
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        print(digest(loaded) if digest_only else _description(loaded))
    return EXIT_DONE


def _description(loaded: Checkpoint) -> str:
    settings, identity = loaded.config, loaded.identity
    lines = [
        f"{loaded.path}: {settings['algorithm']}, round {loaded.round} of {settings['rounds']}",
        f"data {settings['data']['source']}, partition {settings['partition']['kind']}",
        f"format: {seal.FORMAT}",
    ]
    if loaded.partial is not None:
        lines.append(f"round {loaded.round + 1} in progress: clients {loaded.finished} are in its sum")
    if loaded.history:
        row = loaded.history[-1]
        lines.append(f"accuracy mean {row['accuracy']['mean']}, worst {row['accuracy']['worst']}")
        top = metrics.best(loaded.history)
        kind = "validation" if metrics.selected_on(loaded.history) == "accuracy_validation" else "test"
        lines.append(f"best on {kind}: round {top['round'] if top else None}")
    lines.append(f"server: {_layout(loaded.state_layout)}")
    kinds: dict[str, list[int]] = {}
    for client in range(loaded.clients):
        kinds.setdefault(loaded.layout(client).digest, []).append(client)
    lines += [
        f"clients {_numbers(members)}: {_layout(loaded.layout(members[0]))}" for members in kinds.values()
    ]
    lines += [f"{name}: {value}" for name, value in sorted(identity.items())]
    lines.append(f"digest: {digest(loaded)}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _layout(layout: Any) -> str:
    parts = [f"{name} {size:,}" for name, size in layout.sizes.items()]
    return f"{layout.size:,} numbers ({', '.join(parts)})" if parts else "nothing"


def _numbers(members: list[int]) -> str:
    return ", ".join(map(str, members[:8])) + (f", … ({len(members)})" if len(members) > 8 else "")


def export(path: Path, client: int, out: Path) -> int:
    """Write one client's model as a file of its own.

    Raises:
        CheckpointError: a damaged checkpoint, no such client, or an output that exists or cannot be written.
    """
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        client_file.write(loaded, client, out)
    print(f"wrote client {client} of {path} to {out}")
    return EXIT_DONE


def evaluate(path: Path, overrides: Mapping[str, Any], as_json: bool) -> int:
    """Measure every client of a checkpoint with the server's state; under MPI the clients are shared out."""

    def work(world: Comm, code: str) -> int:
        world.agree(lambda: checkpoint.verify(path, world.rank, world.size), "checking the checkpoint")
        with checkpoint.open_everywhere(world, path) as loaded:
            return _evaluate(world, loaded, overrides, as_json)

    return under_mpi(work, singleton=True)


def _evaluate(world: Comm, loaded: Checkpoint, overrides: Mapping[str, Any], as_json: bool) -> int:
    loop = evaluation_loop(world, loaded, overrides)
    other = loop.federation.data_digest != loaded.identity["data_digest"]
    result = loop.evaluation()
    if world.rank == 0:
        result = {"round": loaded.round, "trained_since": loaded.finished, "other_data": other, **result}
        print(json.dumps(result) if as_json else _table(result))
    return EXIT_DONE


def _table(result: Mapping[str, Any]) -> str:
    other = ", on other data than it was trained on" if result["other_data"] else ""
    since = ", ".join(map(str, result["trained_since"]))
    mixed = f", but clients {since}, who have trained in the next one" if since else ""
    lines = [f"after round {result['round']}{mixed}{other}"]
    for client, (accuracy, loss) in enumerate(
        zip(result["clients"]["accuracy"], result["clients"]["loss"], strict=True)
    ):
        lines.append(f"client {client:4}  accuracy {_number(accuracy)}  loss {_number(loss)}")
    lines.append("  ".join(f"{name} {_number(value)}" for name, value in result["accuracy"].items()))
    if result["auc"]["mean"] is not None:
        lines.append(f"AUC mean {_number(result['auc']['mean'])}  worst {_number(result['auc']['worst'])}")
    unseen = result["accuracy_unseen"]
    if unseen["mean"] is not None:
        lines.append(f"unseen clients: mean {_number(unseen['mean'])}  worst {_number(unseen['worst'])}")
    return "\n".join(lines)
