"""The disk space of a run, estimated before it trains: its run folder, and the scratch files of its ranks.

Cohorts are not drawn for it: of n clients, K of them in a round, n (1 - (1 - K/n)^t) are expected to have
trained after t rounds. From that and what a resumed run has follow, by the rule of `written.leans`, the
checkpoints that are complete, those that hold what changed, and the earlier files on which these rely.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.checkpoint.places import file_of
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.store import PAGE
from pfedmoe_mpi.federation.written import leans

LINE, BY_CLASS_OR_RANK = 1_300, 60  # bytes of a line of metrics.jsonl, and of it by class and rank
BY_CLIENT = 48  # bytes of the numbers of a measured client: accuracy, loss, F1 and others
OF_CLIENT = 32  # bytes of a checkpoint by client: the number of its layout, and where its rows begin
FILE, HEADER, SEAL, PLACE = 16_000, 300, 150, 64  # bytes of a checkpoint: once, by vector, by one elsewhere
STEPS = 1_000  # checkpoints that are followed
MOST_HOSTS = 4  # in a line


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a run leaves in its folder, and that it takes meanwhile.

    Attributes:
        checkpoints: of the newest ones and the files on which they rely, at the end.
        each: written by a checkpoint, on average.
        best: of best.h5, complete at the end; 0 if it is a name of one of those checkpoints.
        spare: that checkpoints take beyond these at some time, also while one is written.
        metrics: of metrics.jsonl and the clients' numbers by round.
        frozen: of the frozen tensors.
    """

    checkpoints: int
    each: int
    best: int
    spare: int
    metrics: int
    frozen: int = 0

    @property
    def total(self) -> int:
        """Bytes at the end of the run."""
        return self.checkpoints + self.best + self.metrics + self.frozen

    def line(self, keep: int, every: int) -> str:
        """Return the plan's line; the settings are run.keep and run.checkpoint_every."""
        best = f", best.h5 {in_units(self.best)}" if self.best else ""
        frozen = f", frozen tensors {in_units(self.frozen)}" if self.frozen else ""
        most = in_units(self.total + self.spare)
        metrics = in_units(self.metrics)
        return (
            f"disk: up to {in_units(self.total)} at the end and {most} while it trains: checkpoints "
            f"{in_units(self.checkpoints)} (run.keep = {keep}){best}, metrics {metrics}{frozen}; "
            f"each checkpoint writes {in_units(self.each)} on average (run.checkpoint_every = {every})"
        )


@dataclass(frozen=True)
class Done:
    """What there is before the next round.

    Attributes:
        round: how many rounds are complete.
        trained: the share of the clients that have a vector; 1 if a file of weights has their values.
        files: bytes of the files in the run's folder on which the next checkpoint may rely, the newest
            checkpoint last; none if the next one is complete, as in a new run and in another folder.
        live: by file, the share of all vectors that is needed there.
    """

    round: int = 0
    trained: float = 0.0
    files: Sequence[float] = ()
    live: Sequence[float] = ()

    @classmethod
    def of(cls, loaded: Checkpoint, clients: int, stays: bool) -> Done:
        """Return what a checkpoint has.

        Args:
            clients: how many train.
            stays: whether the run goes on in the checkpoint's folder.
        """
        places = loaded.places
        counts = np.bincount(places.rows["file"], minlength=len(places.files)).tolist()
        order = sorted(range(len(places.files)), key=lambda file: places.files[file] == loaded.path.name)
        trained = min(1.0, len(loaded.trained) / max(1, clients))
        if not stays:
            return cls(loaded.round, trained)
        files = [os.path.getsize(file_of(loaded.path, places.files[file])) for file in order]
        return cls(loaded.round, trained, files, [counts[file] / max(1, clients) for file in order])


NEW = Done()


def disk_use(
    settings: Config,
    state: int,
    clients: Sequence[int],
    rows: int,
    classes: int,
    ranks: int,
    frozen: int,
    done: Done = NEW,
) -> DiskUse:
    """Return the disk use of a run.

    Args:
        state: numbers of the server's vector.
        clients: numbers of the vector of each client that trains.
        rows: rows of the data in the partition.
        frozen: numbers of the frozen tensors.
    """
    line = LINE + BY_CLASS_OR_RANK * (classes + ranks)
    by_client = BY_CLIENT * min(settings.drawn_clients, settings.clients)

    def columns(round: int) -> int:
        return -(-round // settings.eval.every) * by_client

    def others(round: int) -> tuple[int, int]:
        return 4 * state + 8 * rows + OF_CLIENT * settings.clients + columns(round), FILE + round * line

    number, rounds = _scheduled(settings, done)
    sizes, relied = _follow(settings, rounds, clients, others, done)
    keep = settings.run.keep
    kept = _kept(sizes, relied, keep)
    earlier = max(0, min(keep, number) - len(sizes))  # kept ones that were not followed
    kept += earlier * sizes.mean()
    best, of_best = 0.0, np.zeros(len(sizes))
    if number > keep or relied.any():
        best = sum(others(settings.rounds)) + share_trained(settings, settings.rounds, done) * _space(clients)
        of_best = _of_best(sizes, relied, keep)
    copied = best if relied.any() else 0.0  # at the end
    most = max((kept + of_best)[:-1] + sizes[1:], default=0.0)
    most = max(float(most), float(kept[-1] + of_best[-1] + copied), kept[-1] + best)
    written = sizes[1:] if len(done.files) and len(sizes) > 1 else sizes
    metrics = settings.rounds * line + columns(settings.rounds)
    at_end = round(kept[-1]), round(written.mean()), round(best), round(most - kept[-1] - best)
    return DiskUse(*at_end, metrics, 4 * frozen)


def share_trained(settings: Config, rounds: int, done: Done = NEW) -> float:
    """Return the expected share of the clients that train that have done so after this many rounds."""
    return 1 - (1 - done.trained) * _share_outside(settings) ** (rounds - done.round)


def _share_outside(settings: Config) -> float:
    """Return the share of the clients that train that are not in the cohort of a round."""
    return max(0.0, 1 - settings.cohort_size / max(1, settings.clients - settings.unseen_clients))


def _scheduled(settings: Config, done: Done) -> tuple[int, list[int]]:
    """Return how many checkpoints there will be, and the first and the last STEPS of their rounds, ascending.

    The first is that of a resumed run. Those by the clock and by validation rows are not known before.
    """
    every, last = settings.run.checkpoint_every, settings.rounds
    first = max(1, done.round)
    middle = range(first // every * every + every, last, every)
    number = len(middle) + len({first, last})
    return number, sorted({first, *middle[-STEPS:], last})


def _follow(
    settings: Config,
    rounds: Sequence[int],
    clients: Sequence[int],
    others: Callable[[int], tuple[int, int]],
    done: Done,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of the checkpoints of these rounds, and those of the files on which each relies.

    Args:
        others: returns the bytes of a checkpoint beside clients' vectors: of numbers, and of texts.
    """
    vectors, space = 4 * sum(clients), _space(clients)
    files, live = np.array(done.files), np.array(done.live)
    sizes, relied = [*files[-1:]], [float(files[:-1].sum())] * bool(len(files))
    before = done.round  # the round of the checkpoint before
    for round in rounds[len(sizes) :]:
        outside = _share_outside(settings) ** (round - before)
        live = live * outside
        needed = live * len(clients) >= 0.5
        files, live = files[needed], live[needed]
        unchanged, before = float(live.sum()), round
        trained = share_trained(settings, round, done)
        held = fresh = max(0.0, trained - unchanged)
        numbers, texts = others(round)
        places = PLACE * unchanged * len(clients)
        if not leans(numbers, fresh * vectors, trained * vectors, float(files.sum())):
            files, live, held, places = np.empty(0), np.empty(0), trained, 0.0
        sizes.append(numbers + texts + places + held * space)
        relied.append(files.sum())
        files, live = np.append(files, sizes[-1]), np.append(live, held)
    return np.array(sizes), np.array(relied)


def _kept(sizes: np.ndarray, relied: np.ndarray, keep: int) -> np.ndarray:
    """Return the bytes of the `keep` newest checkpoints and the files that they need, after each is written.

    What a checkpoint needs is the oldest one of them, or needed by it, or between the two.
    """
    oldest = np.maximum(np.arange(len(sizes)) - keep + 1, 0)
    before = np.concatenate([[0.0], np.cumsum(sizes)])
    kept: np.ndarray = relied[oldest] + before[1:] - before[oldest]
    return kept


def _of_best(sizes: np.ndarray, relied: np.ndarray, keep: int) -> np.ndarray:
    """Return the most bytes that best.h5 needs beside the kept checkpoints, after each is written.

    While the oldest of these relies on the same complete one as best.h5, it needs hardly any other file.
    """
    number = np.arange(len(sizes))
    complete = np.maximum.accumulate(np.where(relied > 0, 0, number))
    before: np.ndarray = np.concatenate([[0.0], np.maximum.accumulate(sizes + relied)])
    return before[complete[np.maximum(number - keep + 1, 0)]]


def _space(clients: Iterable[int]) -> int:
    """Return the bytes that vectors take in a checkpoint: whole pages, with their headers and seals."""
    return sum(-(-(4 * size + HEADER) // PAGE) * PAGE + SEAL for size in clients if size)


def of_federation(federation: Federation, ranks: int, done: Done = NEW) -> DiskUse:
    """Return the disk use of a federation's run."""
    splits = (federation.partition.train, federation.partition.validation, federation.partition.test)
    rows = sum(len(split.flat) for split in splits)
    clients = [federation.client_layouts[client].size for client in federation.task.training]
    classes = federation.task.classes
    frozen = sum(layout.size for layout in federation.frozen.layouts.values())
    numbers = (federation.state_layout.size, clients, rows, classes, ranks, frozen)
    begun = not done.round and _begun(federation)
    return disk_use(federation.config, *numbers, done=Done(trained=1.0) if begun else done)


def _begun(federation: Federation) -> bool:
    """Return whether clients begin with values of a file, so that they have vectors before they train."""
    different = {id(spec): spec for spec in federation.specs}.values()
    return not all(federation.workbench.draws(spec) for spec in different)


# Scratch files


@dataclass(frozen=True)
class Scratch:
    """What a rank has for its clients' vectors: its host, the memory, and free bytes of run.scratch."""

    host: str
    memory: float
    free: float


def scratch_of(federation: Federation, host: str) -> Scratch:
    """Return what this rank has; without run.scratch the vectors are in the run folder."""
    store = federation.store
    return Scratch(host, store.budget, free_space(store.folder)[0])


def scratch_use(federation: Federation, ranks: Sequence[Scratch], done: Done = NEW) -> dict[str, float]:
    """Return by host the bytes of clients' vectors beyond the memory of its ranks, at the end of the run.

    The vectors of clients that do not train again are in the checkpoint of a resumed run.
    """
    settings, begun = federation.config, not done.round and _begun(federation)
    share = 1.0 if begun else share_trained(settings, settings.rounds - done.round)
    sizes = np.array([4 * layout.size for layout in federation.client_layouts], float)
    if not begun:
        sizes[sorted(federation.task.unseen)] = 0
    vectors = share * np.bincount(federation.home, -(-sizes // PAGE) * PAGE, len(ranks))
    by_host: dict[str, float] = {}
    for rank, needed in zip(ranks, vectors.tolist(), strict=True):
        by_host[rank.host] = by_host.get(rank.host, 0.0) + max(0.0, needed - rank.memory)
    return by_host


# The plan


def lines(federation: Federation, ranks: Sequence[Scratch], folder: Path, done: Done = NEW) -> Iterator[str]:
    """Yield what the run writes to scratch files and to its folder, with a warning where it does not fit."""
    settings, beyond = federation.config, scratch_use(federation, ranks, done)
    rounds = settings.rounds - done.round
    trained = round(len(federation.task.training) * share_trained(settings, rounds))
    again = f" in {rounds} rounds" if done.round else ""
    largest = sorted(((size, host) for host, size in beyond.items() if size), reverse=True)
    hosts = ", ".join(f"{in_units(size)} on {host}" for size, host in largest[:MOST_HOSTS])
    hosts += f", less on {len(largest) - MOST_HOSTS} other hosts" if len(largest) > MOST_HOSTS else ""
    where = settings.run.scratch or "the run folder"
    scratch = f"{hosts} beyond run.memory, in {where}" if hosts else "nothing beyond run.memory"
    yield f"scratch: {scratch}, once about {trained} of {settings.clients} clients have trained{again}"
    free_on = {rank.host: rank.free for rank in ranks} if settings.run.scratch else {}
    for host, free in free_on.items():
        if beyond[host] > free:
            yield (
                f"warning: {host} has {in_units(free)} free in run.scratch = {where}: another "
                "--run.scratch FOLDER has more, a larger --run.memory needs less"
            )
    use = of_federation(federation, len(ranks), done)
    checkpoints = folder / "checkpoints"  # may be a link to another disk
    free, existing = free_space(checkpoints)
    yield use.line(settings.run.keep, settings.run.checkpoint_every) + free_text(free, existing)
    needed = use.total + use.spare + (0 if settings.run.scratch else sum(beyond.values()))
    if needed > free + bytes_in(checkpoints):
        yield (
            "warning: this disk is too small: --run.keep 1 keeps fewer checkpoints, --run.dir FOLDER takes "
            "another disk"
        )


def free_space(folder: Path) -> tuple[float, Path]:
    """Return the free bytes where a folder is or will be, and what exists of its path.

    The bytes are infinite if they are unknown.
    """
    try:
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        return shutil.disk_usage(existing).free, existing
    except OSError:
        return float("inf"), folder


def free_text(free: float, existing: Path) -> str:
    """Return the end of a line on disk space: the free space that `free_space` returns, if it is known."""
    return f", {in_units(free)} free in {existing}" if free < float("inf") else ""


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a folder, 0 if it cannot be read; names of one file count once."""
    try:
        found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    except OSError:
        return 0
    return sum({each.st_ino: each.st_size for each in found}.values())


def in_units(size: float) -> str:
    """Return bytes as text with three digits, in kB, MB, GB or TB."""
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= 0.9995 * divisor:
            number = size / divisor
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"
    return f"{size / 1e3:.3g} kB"
