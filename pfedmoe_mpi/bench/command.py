"""The command `bench`: the speed of this machine, as ratios of two times measured side by side in one run.

    mpirun -n 2 python -m pfedmoe_mpi bench [round] [ranks] [sum] [idle] [precision] [write]
    mpirun -f hostfile -n 2 python -m pfedmoe_mpi bench network
    mpirun -n 8 python -m pfedmoe_mpi bench gpu
    python -m pfedmoe_mpi bench start [RANKS]
    python -m pfedmoe_mpi bench wide [RANKS]
    python -m pfedmoe_mpi bench scale [clients] [writers] [fedavg] [restart] [RANKS] [--figure FILE.svg]
    python -m pfedmoe_mpi bench privacy [NUMBERS]
    mpirun -n 2 python -m pfedmoe_mpi bench --quick

Both sides of a ratio are warmed up, then measured alternately and in alternating order. A time is that of the
slowest rank after a common start; times are medians, a ratio is the median over the pairs. Without flags the
data are synthetic, of CIFAR-10's size: 60,000 images of 3×32×32 for 10 clients of 2 classes each. With
`--quick` there are 6,000 images and fewer pairs: a first look, within about a minute on an idle machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pfedmoe_mpi import config, environment
from pfedmoe_mpi.bench.measurements import ALWAYS, DEFAULTS, PARTS, QUICK, SEVERAL, Bench
from pfedmoe_mpi.bench.progress import announce
from pfedmoe_mpi.bench.timing import HEADING
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, ConfigError, nearest
from pfedmoe_mpi.mpi import session
from pfedmoe_mpi.mpi.comm import Comm


def run(
    words: list[str], settings: Config, flags: Mapping[str, Any], quick: bool = False, figure: str = ""
) -> int:
    """Measure the parts named by `words` (default: those that make sense on these ranks); print the table.

    Raises:
        ConfigError: a part does not exist, or cannot be measured on these ranks or with these settings.
    """
    if "start" in words:
        from pfedmoe_mpi.bench import start

        return start.run([word for word in words if word != "start"], flags, quick)
    if "wide" in words:
        from pfedmoe_mpi.bench import wide

        return wide.run([word for word in words if word != "wide"])
    if "scale" in words:
        from pfedmoe_mpi.bench import scale

        return scale.run([word for word in words if word != "scale"], flags, quick, figure)
    if "privacy" in words:
        from pfedmoe_mpi.bench import privacy

        return privacy.run([word for word in words if word != "privacy"])
    if figure:
        raise ConfigError(
            "--figure is drawn by bench scale alone", "pfedmoe-mpi bench scale --figure cost.svg"
        )
    for word in words:
        if word not in PARTS:
            problem = f"'{word}' is not a part of bench{nearest(word, PARTS)}"
            raise ConfigError(
                problem, f"use one of {', '.join((*PARTS, 'start', 'wide', 'scale', 'privacy'))}"
            )
    defaults = {**DEFAULTS, **(QUICK if quick else {})}
    settings = config.build({**defaults, **flags, **ALWAYS})
    if settings.algorithm != "pfedmoe" and {"round", "sum"} & set(words):
        problem = f"--algorithm = {settings.algorithm}: round and sum are measured for pfedmoe only"
        raise ConfigError(problem, "remove --algorithm, or measure other parts")

    def work(world: Comm, code: str) -> int:
        return _measure(Bench(world, settings, flags, quick), words, code)

    if environment.launched_rank() == 0:
        announce("starting: every rank imports torch, a few seconds on an idle machine")
    given = {"command": "bench", "parts": words, "--quick": quick, **flags}
    return session.under_mpi(work, given, settings.run.singleton)


def _measure(bench: Bench, words: Sequence[str], code: str) -> int:
    heading = bench.heading(code)
    chosen = [part for part in PARTS if part in words] or bench.sensible()
    if bench.world.size == 1 and SEVERAL & set(chosen):
        remedy = "start two ranks: mpirun -n 2 python -m pfedmoe_mpi bench ranks idle"
        raise ConfigError("ranks and idle compare one rank with several, and there is one rank", remedy)
    if "gpu" in chosen:
        bench.check_gpus()
    bench.show([*heading, HEADING])
    for part in chosen:
        bench.show([line.text() for line in getattr(bench, part)()])
    return EXIT_DONE
