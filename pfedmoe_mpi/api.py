"""Runs from Python: in a notebook on one rank, in a script under mpirun on all ranks.

    from pfedmoe_mpi import restart, train
    result = train(algorithm="pfedmoe", rounds=20, model={"pool": ["nets.py:TinyViT", "cnn5"]})

Settings are those of the command line, as sections or with `__` for the dot: `train__lr=0.02`. They are
checked alike, and errors are raised. Ctrl-C stops a run with a checkpoint, from which `restart` resumes it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pfedmoe_mpi import config, environment, user_code
from pfedmoe_mpi.config import methods, presets
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.mpi.comm import Comm
from pfedmoe_mpi.mpi.session import call_under_mpi
from pfedmoe_mpi.report.load import Run, load_run
from pfedmoe_mpi.run import job
from pfedmoe_mpi.run import restart as restarting
from pfedmoe_mpi.run.folder import RunFolder

Prepared = tuple[Mapping[str, Any], Callable[[Comm, str], Path]]


def train(file: str | os.PathLike[str] | None = None, /, preset: str = "", **settings: Any) -> Run:
    """Train a new run and return it; collective.

    Args:
        file: a configuration file; `settings` override it.
        preset: name of settings that both override, see `--preset`.
        settings: by section, `train={"lr": 0.02}`, or `train__lr=0.02`. A model may be a class or a function
            that is defined at the top level of a file, `algorithm` the class of a method.

    Raises:
        UserError: on all ranks: a setting or the data cannot be used; nothing was written.
        RunError: on all ranks: the run cannot continue; what it wrote stays.
    """

    def prepare() -> Prepared:
        base = config.read_toml(Path(file)) if file else {}
        chosen = config.build({**presets.read(preset), **base, **_flat(settings)})
        end = environment.slurm_end() if environment.launched_rank() == 0 else None

        def work(world: Comm, code: str) -> Path:
            path = world.from_root(lambda: job.new_folder(chosen), "run folder")
            world.stop_at = environment.stop_time(chosen.run.walltime, end)
            with RunFolder(path) as folder:
                job.train(world, job.Start(chosen, folder, code))
                return folder.path

        return {"command": "train", **config.flatten(config.to_tree(chosen))}, work

    return load_run(call_under_mpi(prepare))


def restart(source: str | os.PathLike[str], **settings: Any) -> Run:
    """Continue a run from its folder's newest checkpoint or from one file, and return it; collective.

    Args:
        source: a run folder or a checkpoint.
        settings: as for `train`; only those that a restart may change.

    Raises:
        UserError, RunError: as in `train`.
    """

    def prepare() -> Prepared:
        changes = _flat(settings)
        end = environment.slurm_end() if environment.launched_rank() == 0 else None

        def work(world: Comm, code: str) -> Path:
            restarting.resume(world, Path(source), changes, code, end)
            path = Path(source).absolute()
            return Path(changes.get("run.dir") or (path if path.is_dir() else path.parent.parent))

        return {"command": "restart", **changes}, work

    return load_run(call_under_mpi(prepare))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted names with absolute paths, and objects as references to their files."""
    dotted = {name.replace("__", "."): value for name, value in config.flatten(settings).items()}
    values = {
        name: _method(value) if name == "algorithm" and isinstance(value, type) else _plain(value)
        for name, value in dotted.items()
    }
    return config.located(values, Path.cwd())


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _reference(value) if callable(value) else value


def _method(item: type) -> str:
    """Return the name of a method of this program, or the file of the user's own, by its class."""
    inside = item.__module__.removeprefix(f"{methods.PACKAGE}.")
    if inside != item.__module__:
        return inside.partition(".")[0]
    return user_code.split(_reference(item))[0]


def _reference(item: Any) -> str:
    """Return the reference to a class or function.

    Raises:
        ConfigError: it is not at the top level of a file that another process can import.
    """
    module, name = inspect.getmodule(item), getattr(item, "__qualname__", "")
    file = getattr(module, "__file__", None)
    if not name.isidentifier() or not file or module is None or module.__name__ == "__main__":
        raise ConfigError(
            f"{name or item!r} is not defined at the top level of a file, where a restart could find it",
            f"write it into a file, and pass 'FILE.py:{name if name.isidentifier() else 'NAME'}', "
            "for a method 'FILE.py'",
        )
    return f"{Path(file).absolute()}:{name}"
