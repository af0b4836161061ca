"""The parts of `bench`: each measures two times side by side and returns lines of the table."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import config, environment
from pfedmoe_mpi.bench.progress import Stage, announce, estimated_round
from pfedmoe_mpi.bench.timing import QUICK_REPEATS, REPEATS, Line, Pair, run_round, side_by_side
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import ConfigError, StoppedError
from pfedmoe_mpi.mpi import device, launch
from pfedmoe_mpi.mpi.comm import Comm

if TYPE_CHECKING:
    from pfedmoe_mpi.federation.loop import Loop

# In the order of measurement; `start` is measured without MPI, see `bench.start`.
PARTS = ("round", "ranks", "sum", "idle", "precision", "write", "network", "gpu")
DEFAULTS = {
    "data.source": "synthetic",
    "data.samples": 60_000,
    "clients": 10,
    "partition.kind": "pathological",
    "train.batch": 128,
}
QUICK = {"data.samples": 6_000}
# A few of many rounds are measured; other ranks may wait long for a rank that is measured alone.
ALWAYS = {"rounds": 1_000_000, "run.timeout": 86_400.0}
WIDE_BATCH = 512
SEVERAL = {"ranks", "idle"}  # parts that need at least two ranks


class Bench:
    """The parts of `bench` as methods; every public method except `show` is collective."""

    def __init__(self, world: Comm, settings: Config, flags: Mapping[str, Any], quick: bool) -> None:
        self.world = world
        self.settings = settings
        self._flags = flags
        self._quick = quick
        self._repeats = QUICK_REPEATS if quick else REPEATS
        world.timeout = settings.run.timeout

    def show(self, lines: Sequence[str]) -> None:
        """Print lines, on rank 0 only."""
        if self.world.rank == 0:
            print("\n".join(lines), flush=True)

    def sensible(self) -> list[str]:
        """Return the parts that make sense on these ranks; with more ranks than cores, no speed-ups."""
        oversubscribed = any(self.world.gather(self.world.local()[1] > environment.CORES, "cores"))
        if oversubscribed:
            return ["idle", "write"]
        unfit = SEVERAL if self.world.size == 1 else set()
        if self.settings.algorithm != "pfedmoe":
            unfit = unfit | {"round", "sum"}
        unfit = unfit | {"gpu"} | ({"network"} if self.hosts == 1 else set())
        return [part for part in PARTS if part not in unfit]

    def heading(self, code: str) -> list[str]:
        """Return lines with date, versions and machine."""
        threads = device.threads(self.world, self.settings.train.threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
        import torch

        chosen = device.choose(self.world, self.settings.train.model_copy(update={"threads": threads}))
        self.device = chosen.device
        gpu = f", {chosen.model}" if chosen.device.type == "cuda" else ""
        ranks = f"{self.world.size} rank(s) of {threads} thread(s)"
        code = self.world.gather(code, "code")[0]
        return [
            f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}, pfedmoe_mpi {code}",
            f"torch {torch.__version__}, {launch.library()}",
            f"{device.processor()}{gpu}: {ranks} on {self.hosts} host(s), {environment.CORES} cores here",
            *([f"quick: {self._repeats} pairs instead of {REPEATS}, little data"] if self._quick else []),
        ]

    # Parts

    def round(self) -> list[Line]:
        """Compare a round with a bare loop over the same modules, batches and evaluations."""
        from pfedmoe_mpi.bench.bare_loop import BareLoop

        loop = self.loop
        bare = BareLoop(loop.federation, loop.state)
        split: list[dict[str, float]] = []

        def reference() -> float:
            seconds = self._timed(lambda: bare.run_round(loop.round))
            by_rank = self.world.gather(bare.seconds, "bench")
            split.append({name: max(rank[name] for rank in by_rank) for name in bare.seconds})
            return seconds

        expected = 2 * self._round_seconds(loop)
        rounds = self._side_by_side(
            "round", expected, lambda: self._timed(lambda: run_round(loop)), reference
        )
        lines = [rounds.line(f"round of {self._name(loop)} vs bare loop", 1.10)]
        for name in ("train", "evaluate", "sum", "wait"):
            ours = [row["seconds"][name] for row in loop.history[-self._repeats :]]
            if name in bare.seconds:
                pairs = [(a, b[name]) for a, b in zip(ours, split[-self._repeats :], strict=True)]
                lines.append(Pair.of(pairs).line(f"  its {name}, slowest rank"))
            else:
                lines.append(Line(f"  its {name}, slowest rank", f"{median(ours):.4g} s"))
        return lines

    def ranks(self) -> list[Line]:
        """Compare all ranks with one: the same federation on rank 0 alone while the others wait."""
        alone, loop = self._on_one_rank(self.settings), self.loop
        pair = self._rounds("ranks", loop, alone)
        what = f"speed-up of a round on {self.world.size} ranks over 1"
        return [pair.faster(what, 1.8 if self.world.size == 2 else None)]

    def sum(self) -> list[Line]:
        """Compare conversion, reduction and mean of a round's payload, without waiting, with the round."""
        loop = self.loop
        expected = self._round_seconds(loop)
        pair = self._side_by_side(
            "sum", expected, lambda: self._sum_once(loop), lambda: self._timed(lambda: run_round(loop))
        )
        return [pair.line("sum with conversion, as a share of the round", 0.01)]

    def _sum_once(self, loop: Loop) -> float:
        """Return the seconds of one sum on the slowest rank, without waiting; the result is dropped."""
        from pfedmoe_mpi.federation.round_sum import MEMBER_METRICS, RoundSum

        federation, method = loop.federation, loop.federation.method
        ranges = federation.state_layout.parts
        values = {name: loop.state[part].to(federation.engine.device) for name, part in ranges.items()}
        zeros = dict.fromkeys(MEMBER_METRICS, 0.0)
        state = loop.state.clone()
        self.world.wait("bench")
        started = time.perf_counter()
        cohort = method.cohort(loop.round)
        total = RoundSum(federation.task, cohort, method.payload(federation.state_layout.sizes))
        for position, (client, _) in enumerate(cohort):
            if federation.home[client] == self.world.rank:
                total.add(position, values, zeros)
        waited = self.world.sum(total.buffer, "bench")
        method.server_update({name: state[part] for name, part in ranges.items()}, total.means(), 1)
        return float(max(self.world.gather(time.perf_counter() - started - waited, "bench")))

    def idle(self) -> list[Line]:
        """Compare a round of one client on all ranks with one rank: the cost of idle ranks."""
        fixed = {**ALWAYS, "clients": 1, "partition.kind": "iid"}
        samples = 600 if self._quick else 6_000
        settings = config.build({**DEFAULTS, "data.samples": samples, **self._flags, **fixed})
        alone, loop = self._on_one_rank(settings), self._build(self.world, settings)
        pair = self._rounds("idle", loop, alone)
        return [pair.line(f"round of 1 client on {self.world.size} ranks vs 1 rank", 1.3)]

    def precision(self) -> list[Line]:
        """Compare bf16 with fp32: the training of all clients with batches of WIDE_BATCH."""
        loop = self.loop
        pair = self._side_by_side(
            "precision",
            2 * self._round_seconds(loop),
            lambda: self._timed(lambda: self._epochs(loop, "bf16")),
            lambda: self._timed(lambda: self._epochs(loop, "fp32")),
        )
        amx = loop.federation.engine.device.type == "cpu" and _has_amx()
        what = f"speed-up of bf16 over fp32 in training, B = {WIDE_BATCH}"
        return [pair.faster(what + (" (AMX)" if amx else ""), 1.7 if amx else None)]

    def _epochs(self, loop: Loop, precision: str) -> None:
        """Train this rank's clients from their current vectors; the result is dropped."""
        from pfedmoe_mpi.core.turn import Turn

        federation, method = loop.federation, loop.federation.method
        train = federation.engine.train.model_copy(update={"precision": precision, "batch": WIDE_BATCH})
        # No check for a stop: the other ranks wait for this rank's time.
        engine = replace(federation.engine, train=train, poll=lambda: None)
        for client, role in method.cohort(loop.round + 1):
            if client in federation.clients:
                member = federation.clients[client]
                parts = federation.parts(member, loop.state)
                method.client_step(Turn(engine, method.loss, member, parts, 1, role))

    def write(self) -> list[Line]:
        """Compare a checkpoint with a plain write of the same bytes by one rank; both end with an fsync."""
        from pfedmoe_mpi import checkpoint
        from pfedmoe_mpi.federation.loop import Loop, SilentObserver

        with _Folder(self.world, Path(self.settings.run.dir or ".")) as folder:
            loop = Loop(self.world, self.loop.federation, SilentObserver(), folder)
            seconds = self._timed(loop.save)
            path = folder / checkpoint.name(0, False)
            data = path.read_bytes() if self.world.rank == 0 else b""

            def plain() -> None:
                if self.world.rank == 0:
                    _write_plainly(folder / "plain", data)

            pair = self._side_by_side(
                "write", 2 * seconds, lambda: self._timed(loop.save), lambda: self._timed(plain)
            )
        size = len(data) / 1e6
        ours, reference = f"{size / pair.ours:.0f} MB/s", f"{size / pair.reference:.0f} MB/s"
        what = f"checkpoint of {size:.1f} MB vs plain write and fsync"
        return [Line(what, ours, reference, 1 / pair.ratio)]

    def network(self) -> list[Line]:
        """Measure what a round sends from host to host, and its time on this link."""
        from pfedmoe_mpi.bench import network

        loop = self.loop
        Stage("network", (1 + self._repeats) * self._round_seconds(loop), self.world.rank == 0)
        return network.measure(self.world, loop, self._repeats)

    def gpu(self) -> list[Line]:
        """Measure what a GPU's time goes to, against what it can do, and how many ranks share it best."""
        from pfedmoe_mpi.bench import gpu

        if self.world.rank == 0:
            announce("gpu: some minutes; the clients train on 1, 2, 4 and 8 ranks, with graphs and without")
        side, size = (4096, 2**28) if self._quick else (8192, 2**30)
        return gpu.Measurement(self.world, self.settings, self._build, self._repeats, side, size).lines()

    def check_gpus(self) -> None:
        """Check that every rank trains on a GPU; collective.

        Raises:
            ConfigError: on all ranks: one does not.
        """
        kinds = self.world.gather(self.device.type, "devices")
        if "cpu" in kinds:
            problem = f"bench gpu measures GPUs, and rank {kinds.index('cpu')} trains on a CPU"
            raise ConfigError(problem, "start it where ranks see a GPU; `bench round` measures CPUs, too")

    # Helpers of the parts

    @cached_property
    def hosts(self) -> int:
        """The number of hosts of the ranks."""
        return len(set(self.world.gather(platform.node(), "hosts")))

    @cached_property
    def loop(self) -> Loop:
        """The federation on all ranks."""
        return self._build(self.world, self.settings)

    def _build(self, comm: Comm, settings: Config) -> Loop:
        from pfedmoe_mpi.federation.build import build
        from pfedmoe_mpi.federation.loop import Loop, SilentObserver

        if comm.rank == 0 == self.world.rank:
            clients = "1 client" if settings.clients == 1 else f"{settings.clients} clients"
            announce(f"building {clients} on {comm.size} rank{'s' if comm.size > 1 else ''}")
        loop = Loop(comm, build(comm, settings, warn=False), SilentObserver(), None)
        if not loop.begin():
            raise StoppedError
        return loop

    def _on_one_rank(self, settings: Config) -> Loop | None:
        """Build the federation on rank 0 alone, None elsewhere; all ranks raise a UserError of rank 0."""
        part = self.world.split(0 if self.world.rank == 0 else -1)
        return self.world.attempt(lambda: self._build(part, settings) if part else None, "one rank")

    def _rounds(self, part: str, loop: Loop, alone: Loop | None) -> Pair:
        expected = self._round_seconds(loop) + (self._round_seconds(alone) if alone else 0)
        return self._side_by_side(
            part,
            expected,
            lambda: self._timed(lambda: run_round(loop)),
            lambda: self._timed(lambda: run_round(alone)),
        )

    def _side_by_side(
        self, part: str, expected: float, ours: Callable[[], float], reference: Callable[[], float]
    ) -> Pair:
        """Measure two times with the stage on stderr; `expected`: seconds of a pair, used on rank 0 alone."""
        stage = Stage(part, (1 + self._repeats) * expected, self.world.rank == 0)
        return side_by_side(ours, reference, self._repeats, stage.pair_done)

    def _round_seconds(self, loop: Loop) -> float:
        """Return the seconds of the last round, before the first an estimate; only rank 0 needs it."""
        if self.world.rank:
            return 0.0
        return float(loop.history[-1]["seconds"]["total"]) if loop.history else estimated_round(loop)

    def _timed(self, work: Callable[[], object]) -> float:
        """Return the seconds of `work` on the slowest rank, from a common start until the GPUs are done."""
        self.world.wait("bench")
        _synchronise()
        started = time.perf_counter()
        work()
        _synchronise()
        return float(max(self.world.gather(time.perf_counter() - started, "bench")))

    def _name(self, loop: Loop) -> str:
        """Return the data and the sizes of a round, for its row."""
        federation = loop.federation
        batch, epochs = federation.config.train.batch, federation.config.train.epochs
        return f"{federation.dataset.name}, N = {federation.task.clients}, B = {batch}, E = {epochs}"


class _Folder:
    """A temporary folder that all ranks see, created and removed by the root."""

    def __init__(self, world: Comm, parent: Path) -> None:
        self._world, self._parent = world, parent

    def __enter__(self) -> Path:
        def make() -> str:
            try:
                return tempfile.mkdtemp(prefix=".pfedmoe-bench-", dir=self._parent.absolute())
            except OSError as error:
                remedy = "name a writable folder to measure: --run.dir FOLDER"
                raise ConfigError(f"bench cannot write: {error}", remedy) from error

        self._path = Path(self._world.from_root(make, "bench folder"))
        return self._path

    def __exit__(self, *_: object) -> None:
        if self._world.rank == 0:
            shutil.rmtree(self._path, ignore_errors=True)


def _write_plainly(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _synchronise() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
