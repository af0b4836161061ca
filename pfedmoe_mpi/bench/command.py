"""`bench`: what this machine reaches, as ratios of two things measured side by side in one run.

    mpirun -n 2 python -m pfedmoe_mpi bench [round] [ranks] [sum] [idle] [precision] [write]
    mpirun -f hostfile -n 2 python -m pfedmoe_mpi bench network
    python -m pfedmoe_mpi bench start [RANKS]

Both sides of a ratio are warmed up, then measured alternately and in alternating order; a time is that of the
slowest rank after a common start, the figures are medians, the ratio is the median over the pairs. Without
flags the data are synthetic, of CIFAR-10's size: 60,000 images of 3×32×32 for 10 clients of 2 classes each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi import config
from pfedmoe_mpi.bench.measurements import ALWAYS, DEFAULTS, PARTS, SEVERAL, Bench
from pfedmoe_mpi.bench.timing import HEADING
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.errors import EXIT_DONE, ConfigError, nearest
from pfedmoe_mpi.mpi import session
from pfedmoe_mpi.mpi.comm import Comm

if TYPE_CHECKING:
    pass


def run(words: list[str], settings: Config, flags: Mapping[str, Any]) -> int:
    """Measure the parts named by `words` (default: those that make sense on these ranks) and print the table.

    Raises:
        ConfigError: an unknown word, or a part that cannot be measured on these ranks or with these settings.
    """
    if "start" in words:
        from pfedmoe_mpi.bench import start

        return start.run([word for word in words if word != "start"], flags)
    for word in words:
        if word not in PARTS:
            known = ", ".join((*PARTS, "start"))
            raise ConfigError(f"bench does not know '{word}'{nearest(word, PARTS)}", f"it measures {known}")
    defaults = {name: value for name, value in DEFAULTS.items() if name not in flags}
    settings = config.build({**flags, **defaults, **ALWAYS})
    if settings.algorithm != "pfedmoe" and {"round", "sum"} & set(words):
        raise ConfigError("round and sum are measured for pfedmoe only", "leave out --algorithm")

    def work(world: Comm, code: str) -> int:
        return _measure(Bench(world, settings, flags), words, code)

    return session.under_mpi(work, settings.run.singleton)


def _measure(bench: Bench, words: Sequence[str], code: str) -> int:
    heading = bench.heading(code)
    chosen = [part for part in PARTS if part in words] or bench.sensible()
    if bench.world.size == 1 and SEVERAL & set(chosen):
        raise ConfigError("ranks and idle compare one rank with several", "mpirun -n 2 python -m …")
    bench.show([*heading, HEADING])
    for part in chosen:
        bench.show([line.text() for line in getattr(bench, part)()])
    return EXIT_DONE
