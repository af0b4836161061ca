"""`bench gpu`: what a GPU's time goes to, against what the same GPU can do, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pfedmoe_mpi import config
from pfedmoe_mpi.bench.timing import Line, run_round
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.turn import Engine, Turn
from pfedmoe_mpi.federation.loop import Loop
from pfedmoe_mpi.mpi.comm import Comm

RANKS = (1, 2, 4, 8)  # that share the GPUs, as far as there are so many
PAPER = {"clients": 100, "participation": 0.1, "train.epochs": 10, "train.batch": 512}
PAPER_ROUNDS = 500
Build = Callable[[Comm, config.Config], Loop]


@dataclass(frozen=True)
class Limits:
    """What a device reaches: operations per second in float32 and bfloat16, and bytes per second."""

    fp32: float
    bf16: float
    bytes: float

    def seconds(self, operations: float, moved: float, precision: str) -> float:
        """Return the least time of so many operations and of moving so many bytes, each at its limit."""
        rate = self.bf16 if precision == "bf16" else self.fp32
        return max(operations / rate, moved / self.bytes)


def measure_limits(device: torch.device, side: int, size: int, repeats: int) -> Limits:
    """Measure a product of matrices (side, side), and a copy of `size` bytes, read and written."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones((side, side), device=device, dtype=dtype)
        out = torch.empty_like(a)
        rates.append(2 * side**3 / timed(partial(torch.mm, a, a, out=out), device, repeats))
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    goal = torch.empty_like(source)
    return Limits(rates[0], rates[1], 2 * size / timed(lambda: goal.copy_(source), device, repeats))


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median of the seconds of `work` until the device is done, after one run to warm up."""
    times = []
    for _ in range(1 + repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def synchronise(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the sum of the times of the kernels and copies of `work`, without the gaps between them."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        work()
        synchronise(device)
    events = profiled.key_averages()
    return 1e-6 * sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events)


def operations(work: Callable[[], Any]) -> float:
    """Return the floating-point operations of the matrix products and convolutions of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


class Measurement:
    """The lines of `bench gpu`; every method is collective.

    Args:
        build: builds a federation on the ranks of a communicator and prepares it for round 1.
        side: of the matrices, and `size` in bytes of the copy, by which the device's limits are measured.
    """

    def __init__(
        self, world: Comm, settings: config.Config, build: Build, repeats: int, side: int, size: int
    ) -> None:
        self._world, self._settings, self._build, self._repeats = world, settings, build, repeats
        self._side, self._size = side, size

    def lines(self) -> list[Line]:
        """Return all of them."""
        return [*self._client_steps(), *self._ranks(), *self._paper()]

    def _client_steps(self) -> list[Line]:
        """Compare the training of one client with its kernels and with the device's limits, on rank 0."""
        lines: list[Line] = []

        def alone(loop: Loop) -> None:
            device = loop.federation.engine.device
            limits = measure_limits(device, self._side, self._size, self._repeats)
            terms = (limits.fp32 / 1e12, limits.bf16 / 1e12, limits.bytes / 1e9)
            lines.append(
                Line(
                    "product fp32, bf16 (TFLOP/s); copy (GB/s)",
                    f"{terms[0]:.3g}, {terms[1]:.3g}",
                    f"{terms[2]:.4g}",
                )
            )
            seconds: dict[tuple[str, str], float] = {}
            for precision in ("fp32", "bf16"):
                for graphs in ("off", "on"):
                    lines.extend(self._client_step(loop, limits, precision, graphs, seconds))
            gain = seconds["fp32", "off"] / seconds["bf16", "off"]
            lines.append(Line("speed-up of bf16 over fp32 of a client's training", "", "", gain))

        self._on_ranks(1, self._settings, alone)
        return lines

    def _client_step(
        self,
        loop: Loop,
        limits: Limits,
        precision: str,
        graphs: str,
        seconds: dict[tuple[str, str], float],
    ) -> list[Line]:
        federation, device = loop.federation, loop.federation.engine.device
        if graphs == "on" and device.type != "cuda":
            return []
        work = client_step(loop, precision, graphs)
        ours, kernels = timed(work, device, self._repeats), kernel_seconds(work, device)
        seconds[precision, graphs] = ours
        what = f"{precision}, B = {federation.config.train.batch}, graphs {graphs}"
        first = Line(
            f"a client's training vs its kernels, {what}",
            f"{ours:.4g} s",
            f"{kernels:.4g} s",
            ours / kernels,
            1.5,
        )
        if graphs == "on":
            return [first]
        client = next(iter(federation.clients.values()))
        numbers = federation.state_layout.size + len(client.vector)
        steps = federation.config.train.updates(client.samples) * federation.config.train.epochs
        least = limits.seconds(operations(work), 5 * 4.0 * numbers * steps, precision)
        return [
            first,
            Line(
                f"  its kernels vs the limits, {precision}",
                f"{kernels:.4g} s",
                f"{least:.4g} s",
                kernels / least,
            ),
        ]

    def _ranks(self) -> list[Line]:
        """Measure the clients trained per second, with the ranks that share the GPUs."""
        lines: list[Line] = []
        for graphs in ("off", "on"):
            settings = config.changed(self._settings, {"train.graphs": graphs, "eval.every": 1_000_000})
            for ranks in (n for n in RANKS if n <= self._world.size):
                rate = self._clients_per_second(settings, ranks)
                lines.append(Line(f"clients per second, {ranks} rank(s), graphs {graphs}", f"{rate:.4g}"))
        return lines

    def _clients_per_second(self, settings: config.Config, ranks: int) -> float:
        seconds = self._round_seconds(settings, ranks)
        members = max(1, int(settings.participation * settings.clients + 0.5))
        return members / seconds

    def _round_seconds(self, settings: config.Config, ranks: int) -> float:
        """Return the median of the seconds of a round on so many ranks, on all ranks."""
        found: list[float] = []

        def rounds(loop: Loop) -> None:
            found.append(timed(lambda: run_round(loop), loop.federation.engine.device, self._repeats))

        self._on_ranks(ranks, settings, rounds)
        return max(median(times) for times in self._world.gather(found, "bench gpu") if times)

    def _paper(self) -> list[Line]:
        """Measure the round of the paper's CIFAR-10 cell; PAPER_ROUNDS of them are to take ten minutes."""
        settings = config.changed(self._settings, {**PAPER, "eval.every": 10})
        seconds = self._round_seconds(settings, self._world.size)
        what = f"round of N = 100, C = 10 %, E = 10, B = 512 on {self._world.size} rank(s)"
        minutes = Line(
            f"  {PAPER_ROUNDS} of them, over ten minutes", "", "", PAPER_ROUNDS * seconds / 600, 1.0
        )
        return [Line(what, f"{seconds:.4g} s"), minutes]

    def _on_ranks(self, ranks: int, settings: config.Config, work: Callable[[Loop], None]) -> None:
        """Build a federation on the first ranks and let these work, while the others wait."""
        part = self._world.split(0 if self._world.rank < ranks else -1)

        def measured() -> None:
            if part:
                part.timeout = self._world.timeout
                work(self._build(part, settings))

        self._world.attempt(measured, "bench gpu")


def client_step(loop: Loop, precision: str, graphs: str) -> Callable[[], None]:
    """Return the training of this rank's first client as a function; its result is dropped."""
    from pfedmoe_mpi.core.graphs import Graphs

    federation, method = loop.federation, loop.federation.method
    train = federation.engine.train.model_copy(update={"precision": precision})
    captured = Graphs(train.batch) if graphs == "on" else None
    engine: Engine = replace(federation.engine, train=train, poll=lambda: None, graphs=captured)
    members = [(number, role) for number, role in method.cohort(1) if number in federation.clients]
    number, role = members[0]
    member = federation.clients[number]

    def work() -> None:
        parts = federation.parts(member, loop.state)
        with suppress(NotFiniteError):
            method.client_step(Turn(engine, method.loss, member, parts, 1, role))

    return work
