"""`inspect`: what a checkpoint holds, and the digest of its state."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from pfedmoe_mpi import checkpoint, user_code
from pfedmoe_mpi.checkpoint import Checkpoint, seal
from pfedmoe_mpi.config import recorded
from pfedmoe_mpi.errors import EXIT_DONE
from pfedmoe_mpi.federation import metrics, selection
from pfedmoe_mpi.federation.rebuilt import vectors
from pfedmoe_mpi.models.names import kind_of
from pfedmoe_mpi.run import privacy_lines


def run(path: Path, *, digest_only: bool) -> int:
    """Print a description of a checkpoint, or only its digest, and return the exit code.

    Raises:
        CheckpointError: a missing or damaged checkpoint.
    """
    with checkpoint.open_verified(path) as loaded:
        print(digest(loaded) if digest_only else _description(loaded))
    return EXIT_DONE


def digest(loaded: Checkpoint) -> str:
    """Return the SHA-256 over everything that a restart uses, but no time, memory, host or path.

    It covers vectors, drawn for clients that never trained, round, partial sum, learning metrics (in their
    shortest decimal form, which determines the float's bits), data and partition digests, seed, model
    settings, and the method with its section.
    """
    state = sha256()
    method = user_code.label(loaded.config["algorithm"])
    model, options = (recorded.without_later(loaded.config, section) for section in ("model", method))
    assert model is not None
    model.pop("weights", None)  # a path
    model["pool"] = [kind_of(name) for name in model["pool"]]
    if "shared" in model:
        model["shared"] = kind_of(str(model["shared"]))
    frozen = [identity["frozen"]] if "frozen" in (identity := loaded.identity) else []
    facts = {
        "round": loaded.round,
        "algorithm": [method, options, loaded.config["seed"], model],
        "digests": [identity["data_digest"], identity["partition_digest"], *frozen],
        "layouts": [loaded.state_layout.digest, *(loaded.layout(k).digest for k in range(loaded.clients))],
        "history": [metrics.fingerprint(row) for row in loaded.history],
    }
    state.update(json.dumps(facts, sort_keys=True).encode())
    state.update(loaded.state.tobytes())
    vector = vectors(loaded)
    with ThreadPoolExecutor(1) as hasher:  # the next vector is read or drawn meanwhile
        hashed = hasher.submit(state.update, b"")
        for client in range(loaded.clients):
            values = vector(client)
            hashed.result()  # so that no more than two vectors are in memory
            hashed = hasher.submit(state.update, values.data)
        hashed.result()
    state.update(loaded.moments.tobytes())
    if loaded.partial is not None:
        state.update(loaded.partial.tobytes())
    return state.hexdigest()


def _description(loaded: Checkpoint) -> str:
    """Return the lines that `inspect` prints."""
    settings, identity = loaded.config, loaded.identity
    method = user_code.label(settings["algorithm"])
    lines = [
        f"{loaded.path}: {method}, round {loaded.round} of {settings['rounds']}",
        f"data {settings['data']['source']}, partition {settings['partition']['kind']}",
        f"format: {seal.FORMAT}",
    ]
    if loaded.partial is not None:
        lines.append(f"round {loaded.round + 1} in progress: clients {loaded.finished} are in its sum")
    if loaded.history:
        row = loaded.history[-1]
        mean, worst = (_percent(row["accuracy"][key]) for key in ("mean", "worst"))
        lines.append(f"accuracy mean {mean}, worst {worst}")
        top = selection.best(loaded.history, after=settings["run"].get("forked", 0))
        kind = selection.ROWS[selection.selected_on(loaded.history)]
        lines.append(f"best on {kind}: round {top['round'] if top else None}")
        lines += [privacy_lines.line(row["privacy"], loaded.round)] if row.get("privacy") else []
    lines.append(f"server: {_sizes(loaded.state_layout) or 'nothing shared'}")
    same_layout: dict[str, list[int]] = {}
    for client in range(loaded.clients):
        same_layout.setdefault(loaded.layout(client).digest, []).append(client)
    lines += [
        f"clients {_listed(clients)}: {_sizes(loaded.layout(clients[0])) or 'nothing private'}"
        for clients in same_layout.values()
    ]
    lines += [f"{name}: {value}" for name, value in sorted(identity.items())]
    lines += [f"own code, {name}: {value}" for name, value in user_code.digests(loaded.code)]
    lines.append(f"digest: {digest(loaded)}")
    return "\n".join(lines)


def _sizes(layout: Any) -> str:
    """Return the length of a vector and of its parts; empty if it has none."""
    parts = [f"{name} {size:,}" for name, size in layout.sizes.items()]
    return f"{layout.size:,} numbers ({', '.join(parts)})" if parts else ""


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f} %"


def _listed(clients: list[int]) -> str:
    return ", ".join(map(str, clients[:8])) + (f", … ({len(clients)})" if len(clients) > 8 else "")
