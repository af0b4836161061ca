"""`bench scale`: what thousands of clients cost, with a cohort of ten: setup, rounds, checkpoints, memory.

Like `bench start` it runs without a launcher and starts jobs itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pfedmoe_mpi import config, environment
from pfedmoe_mpi.bench import at_scale, interrupted, jobs
from pfedmoe_mpi.bench.at_scale import Case, Cost
from pfedmoe_mpi.bench.progress import announce
from pfedmoe_mpi.bench.start import launcher
from pfedmoe_mpi.data import Dataset
from pfedmoe_mpi.data.dataset import MemoryRows
from pfedmoe_mpi.data.sources.hdf5 import write_hdf5
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import EXIT_DONE, ConfigError, LaunchError, nearest
from pfedmoe_mpi.mpi import device

PARTS = ("clients", "writers", "fedavg", "restart")
RANKS = 2
LIMIT = 7200.0  # seconds for one job
FIGURES = (".svg", ".png", ".pdf")
IMAGES = {"data.source": "synthetic", "data.samples": 60_000, "data.size": 32}
CPU = {"train.device": "cpu"}
MOST = 4 * 2**30  # bytes of a rank's memory
COLUMNS = (
    *("clients", "setup, s", "round, s", "÷ first", "evaluation, s"),
    *("checkpoint, s", "written, MB", "÷ changed", "memory, GB"),
)
HEADING = f"{'':9}" + "".join(f"{column:>14}" for column in COLUMNS)


@dataclass(frozen=True)
class Sizes:
    """How large the federations are; those of `QUICK` only show that all of it works."""

    clients: tuple[int, ...] = (100, 300, 1_000, 3_000, 10_000)
    cohort: int = 10
    rounds: int = 20
    checkpoints: int = 4
    pairs: int = 20
    writers: int = 3_500
    rows: int = 200  # of a writer, on average
    fedavg: int = 100_000
    settings: Mapping[str, Any] = field(default_factory=dict)  # instead of the measured ones


TINY = {"model.pool": "mlp4,mlp5", "model.shared": "mlp5", "data.size": 8, "data.samples": 600}
LONG = {"train.epochs": 60, "rounds": 8}  # rounds that are long enough to be stopped, and enough of them
QUICK = Sizes((20, 60), 3, 4, 2, 3, 6, 40, 200, TINY)


def run(words: Sequence[str], flags: Mapping[str, Any], quick: bool = False, figure: str = "") -> int:
    """Measure and print the parts that `words` name, default all; a number there is that of the ranks.

    Args:
        figure: a file for the cost against the number of clients; empty: no figure.

    Raises:
        ConfigError: there are other words, or no figure can be written there.
        LaunchError: this runs under a launcher, there is no launcher, or a job fails.
    """
    numbers = [word for word in words if word.isdecimal()]
    chosen = [word for word in words if not word.isdecimal()] or PARTS
    _check(chosen, numbers, figure)
    ranks, sizes = int(numbers[0]) if numbers else RANKS, QUICK if quick else Sizes()
    print(f"{device.processor()}: {environment.CORES} cores, {ranks} rank(s), ", end="")
    print(f"{time.strftime('%Y-%m-%d %H:%M %z')}")
    print(HEADING, flush=True)
    with tempfile.TemporaryDirectory(prefix="pfedmoe-bench-") as folder:
        place = Path(folder)
        settings = {**IMAGES, **CPU, **flags, **sizes.settings}
        if {"clients", "restart"} & {*chosen}:
            settings |= _shared_out(place, settings, sizes)
        if "clients" in chosen:
            costs = [*_measured(place, ranks, "clients", _federations(place, settings, sizes))]
            if figure:
                _draw(costs, Path(figure))
        if "writers" in chosen:
            [*_measured(place, ranks, "writers", [_writers(place, sizes)])]
        if "fedavg" in chosen:
            [*_measured(place, ranks, "fedavg", [_fedavg(place, sizes)])]
        if "restart" in chosen:
            number, share = sizes.clients[-1], _participation(sizes.clients[-1], sizes)
            run = {**settings, **_divided(place, number), "participation": share, "rounds": sizes.rounds}
            run |= LONG if quick else {}
            for line in interrupted.compare(place, ranks, run, run["rounds"] // 2, MOST):
                print(line, flush=True)
    return EXIT_DONE


def _check(parts: Sequence[str], numbers: Sequence[str], figure: str) -> None:
    """Refuse words, launchers and figures before anything takes time."""
    for part in parts:
        if part not in PARTS:
            problem = f"'{part}' is not a part of bench scale{nearest(part, PARTS)}"
            raise ConfigError(problem, f"use any of {', '.join(PARTS)}, and a number of ranks")
    if len(numbers) > 1 or "0" in numbers:
        problem = f"bench scale takes one number of ranks, not {' '.join(numbers)}"
        raise ConfigError(problem, "pfedmoe-mpi bench scale 2")
    if environment.launched_size(os.environ) > 1:
        remedy = "run it without mpirun: pfedmoe-mpi bench scale 2"
        raise LaunchError("bench scale launches ranks itself", remedy)
    if not figure:
        return
    path = Path(figure)
    if path.suffix not in FIGURES or not path.absolute().parent.is_dir():
        problem = f"--figure = {figure} is not a file {', '.join(FIGURES)} in a folder that exists"
        raise ConfigError(problem, "--figure cost.svg")
    if "clients" not in parts:
        raise ConfigError("--figure shows the part clients, which is not measured", "add clients")
    if not importlib.util.find_spec("matplotlib"):
        raise ConfigError("--figure needs matplotlib", "pip install 'pfedmoe_mpi[report]'")


def _participation(clients: int, sizes: Sizes) -> float:
    return sizes.cohort / clients


def _shared_out(place: Path, settings: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Write a split for every number of clients, in which a client has as many rows; return settings."""
    built = config.build(dict(settings))
    with open_dataset(built.data, built.seed, clients=10, check=False) as data:
        order = np.random.default_rng(0).permutation(len(data))
    each = len(order) // max(sizes.clients)
    for number in sizes.clients:
        rows = order[: number * each].reshape(number, each)
        split = _divided(place, number)["partition.file"]
        Path(split).write_text(json.dumps(rows.tolist()), encoding="utf-8")
    return {"partition.min_samples": each}


def _divided(place: Path, number: int) -> dict[str, Any]:
    return {"clients": number, "partition.file": str(place / f"{number}.json")}


def _federations(place: Path, settings: Mapping[str, Any], sizes: Sizes) -> list[Case]:
    """Return the cases of the part `clients`: all with the same rows a client and the same cohort."""

    def federation(number: int) -> dict[str, Any]:
        return {**settings, **_divided(place, number), "participation": _participation(number, sizes)}

    first = federation(sizes.clients[0])
    return [_case(place, federation(number), sizes, first) for number in sizes.clients]


def _case(
    place: Path, settings: Mapping[str, Any], sizes: Sizes, reference: Mapping[str, Any] | None = None
) -> Case:
    folder = tempfile.mkdtemp(dir=place)
    return Case(settings, folder, reference or {}, sizes.rounds, sizes.checkpoints, sizes.pairs)


def _writers(place: Path, sizes: Sizes) -> Case:
    """Write data of FEMNIST's shape whose clients are natural; return their case."""
    draw, path = np.random.default_rng(0), place / "writers.h5"
    counts = draw.integers(sizes.rows // 2, 3 * sizes.rows // 2, sizes.writers)
    rows, classes = int(counts.sum()), 62
    data = Dataset(
        name="writers",
        shape=(1, 28, 28),
        classes=classes,
        class_names=(),
        labels=np.arange(rows) % classes,
        client=np.repeat(np.arange(sizes.writers), counts),
        official_test=None,
        mean=(),
        std=(),
        dtype=np.dtype(np.uint8),
        store=MemoryRows(draw.integers(0, 256, (rows, 1, 28, 28), np.uint8)),
    )
    write_hdf5(path, data)
    settings: dict[str, Any] = {"data.source": "hdf5", "data.path": str(path), "clients": sizes.writers}
    settings |= {"partition.kind": "natural", "participation": _participation(sizes.writers, sizes)}
    models = {name: value for name, value in sizes.settings.items() if name.startswith("model.")}
    return _case(place, {**settings, **CPU, **models}, sizes)


def _fedavg(place: Path, sizes: Sizes) -> Case:
    """Return the case of many clients with a tiny model under FedAvg."""
    settings = {"data.source": "synthetic", "data.samples": 4 * sizes.fedavg, "data.size": 8}
    settings |= {"algorithm": "fedavg", "model.pool": "mlp5", "model.dim": 32, "clients": sizes.fedavg}
    settings |= {"partition.kind": "iid", "partition.min_samples": 4}
    return _case(place, {**settings, **CPU, "participation": _participation(sizes.fedavg, sizes)}, sizes)


def _measured(place: Path, ranks: int, part: str, cases: Sequence[Case]) -> list[Cost]:
    """Measure cases, each in a job of its own, and print their lines."""
    costs = []
    for case in cases:
        announce(f"{part}: {case.settings['clients']:,} clients")
        path = place / "case.json"
        path.write_text(json.dumps(asdict(case)), encoding="utf-8")
        _, said = jobs.run([*launcher(ranks), "-m", at_scale.__name__, str(path)], LIMIT)
        costs.append(Cost(**json.loads(said.splitlines()[-1])))
        shutil.rmtree(case.folder)  # some GB
        print(line(part, costs[-1]), flush=True)
    return costs


def line(part: str, cost: Cost) -> str:
    """Return a line of the table."""
    cells = (
        *(f"{cost.clients:,}", f"{cost.setup:.2f}", f"{cost.round:.3f}"),
        *(f"{cost.ratio:.2f}" if cost.ratio else "", f"{cost.evaluate:.2f}", f"{cost.checkpoint:.2f}"),
        *(f"{cost.written / 1e6:.1f}", f"{cost.written / max(1, cost.changed):.2f}" if cost.changed else ""),
        f"{cost.memory / 2**30:.2f}",
    )
    return f"{part:9}" + "".join(f"{cell:>14}" for cell in cells)


def _draw(costs: Sequence[Cost], path: Path) -> None:
    """Write the figure of cost against the number of clients, in the style of reports."""
    from pfedmoe_mpi.report import drawing

    def draw(canvas: Any, paint: drawing.Paint) -> None:
        left, right = drawing.panels(canvas, (3, 2))
        clients = [cost.clients for cost in costs]
        series = {"setup": "setup", "round": "round", "evaluate": "evaluation", "checkpoint": "checkpoint"}
        for number, (name, label) in enumerate(series.items()):
            look = drawing.style(number, paint).line(1)
            left.plot(clients, [getattr(cost, name) for cost in costs], label=label, **look)
        memory = [cost.memory / 2**30 for cost in costs]
        right.plot(clients, memory, **drawing.style(0, paint).line(1))
        left.set_yscale("log")
        left.set_ylabel("seconds")
        right.set_ylim(bottom=0)
        right.set_ylabel("memory of a rank, GB")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("clients")
        drawing.legend_above(canvas, left, 4)

    figure = drawing.Figure("scale", "Cost against clients", "", draw, panels=2)
    drawing.save_as(figure, path)
    print(f"figure {path}", file=sys.stderr)
