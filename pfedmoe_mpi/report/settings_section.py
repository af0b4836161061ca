"""The section of one run's page about its settings, versions and machine."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedmoe_mpi.config import methods
from pfedmoe_mpi.errors import UserError
from pfedmoe_mpi.models import names as model_names
from pfedmoe_mpi.report.document import Section
from pfedmoe_mpi.report.labels import value_text
from pfedmoe_mpi.report.load import STARTS, Run
from pfedmoe_mpi.report.tables import Column, Table, word
from pfedmoe_mpi.storage import untrusted_json

VERSIONS = (
    "code",
    "python",
    "torch",
    "numpy",
    "h5py",
    "mpi",
    "device",
    "threads",
    "precision",
    "ranks",
    "job",
)


def section(run: Run) -> Section:
    """Return the settings that differ from the default, all settings, and the versions of the first start."""
    return Section("The run", [*_settings(run), _versions(run)])


def _settings(run: Run) -> list[Table]:
    from pfedmoe_mpi import config

    defaults = {name: value_text(field.default) for name, field in config.fields().items()}
    automatic = {name: value_text(value) for name, value in automatic_settings(run).items()}
    rows = [[word(name), word(value_text(value))] for name, value in run.config.items()]
    changed = [
        [*row, word(defaults.get(row[0].text, "–"))]
        for row in rows
        if row[0].text != "run.dir"
        and row[1].text not in (defaults.get(row[0].text, "–"), automatic.get(row[0].text))
    ]
    titles = [Column(title, words=True) for title in ("setting", "value", "default")]
    notes = ["set by the user or by the data; what auto stands for is not listed"]
    return [
        Table("changed", "Settings that differ from the default", titles, changed, notes),
        Table("settings", "Configuration", titles[:2], rows, open=False),
    ]


def automatic_settings(run: Run) -> Mapping[str, Any]:
    """Return what `auto`, or 0 for model.dim, stands for in this run, as `federation.effective` resolves it.

    Without models in a run that did not record the shape of its samples.
    """
    start = "paper" if run.config.get("gate.module") else _declared(run, "gate_start", "paper")
    try:
        samples = untrusted_json.parse(run.started_with("samples"), "samples")
        shape, tokens = tuple(map(int, samples["shape"])), bool(samples["vocabulary"])
        pool = tuple(map(str, run.config["model.pool"]))
        shared = str(run.config["model.shared"])
        dim = model_names.resolve_dim([*pool, shared], 0)
    except (UserError, KeyError, TypeError, ValueError):  # an earlier version, or models that are gone
        return {"gate.start": start}
    different = model_names.auto_pool(shape, tokens, shared)
    automatic = (shared,) if _declared(run, "homogeneous", False) else different
    given = () if pool == automatic else pool
    return {
        "gate.start": start,
        "model.pool": automatic,
        "model.shared": model_names.auto_shared(shape, given, tokens),
        "model.dim": dim,
    }


def _declared(run: Run, name: str, default: Any) -> Any:
    """Return what the method's class, or the one it is derived from, assigns to this name, by their sources.

    Importing the method would need torch.
    """
    own = run.path / "code" / f"{run.algorithm}.py"  # of a method of the user's own
    source: Path | None = own if own.is_file() else methods.path(run.algorithm)
    try:
        while source:
            nodes = list(ast.walk(ast.parse(source.read_bytes())))
            for node in nodes:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                    return ast.literal_eval(node.value)
            source = _derived_from(nodes)
    except (OSError, SyntaxError, ValueError):
        pass
    return default


def _derived_from(nodes: Sequence[ast.AST]) -> Path | None:
    """Return the file in this program's folder of methods that a class of this source is derived from."""
    bases = {ast.unparse(base) for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and bases & {alias.asname or alias.name for alias in node.names}:
            package, _, module = (node.module or "").rpartition(".")
            if package == methods.PACKAGE:
                return methods.path(module)
    return None


def _versions(run: Run) -> Table:
    starts = [event for event in run.events if event["event"] in STARTS]
    first = starts[0] if starts else {}
    rows = [[word(name), word(value_text(first[name]))] for name in VERSIONS if first.get(name) is not None]
    columns = [Column("what", words=True), Column("at the first start", words=True)]
    return Table("versions", "Versions and machine", columns, rows)
