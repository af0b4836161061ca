"""What runs side by side are called: the method and the setting, each by what tells it from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pfedmoe_mpi.report.load import Run

# What makes no other configuration: the replicate, the folder, and what changes bits or speed but no method.
IGNORED = ("seed", "run.", "train.threads", "train.device", "eval.batch")
# What is the same problem for every method; all else belongs to the method.
SETTING = (
    "data.",
    "partition.",
    "clients",
    "participation",
    "unseen.",
    "join.",
    "stream.",
    "faults.",
    "rounds",
)


def counted(run: Run) -> dict[str, Any]:
    """The configuration without what makes no other one."""
    return {name: value for name, value in run.config.items() if not name.startswith(IGNORED)}


def labels(firsts: Sequence[Run]) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """(method, setting) of runs of unlike configurations, and notes on what these leave out.

    A setting is called by no more than tells it from the others, a method by what most of its variants do not
    have. What a method has otherwise in another setting only, as augmentation by data set, makes no variant.
    """
    by_algorithm: dict[str, list[Run]] = {}
    for run in firsts:
        by_algorithm.setdefault(run.algorithm, []).append(run)
    within = {name for same in by_algorithm.values() for name in _varying(same)}
    overall = [name for name in _varying(firsts) if name != "algorithm"]
    problem = [name for name in overall if name.startswith(SETTING)]
    models = [n for n in overall if n.startswith("model.") and _varies_in_a_setting(n, problem, firsts)]
    setting = problem + models
    telling = _telling(setting, firsts)
    variant = [name for name in overall if _varies_in_a_setting(name, setting, firsts)]
    own = {algorithm: [n for n in _varying(same) if n in variant] for algorithm, same in by_algorithm.items()}
    usual = {algorithm: _usual(own[algorithm], same) for algorithm, same in by_algorithm.items()}
    found = [
        (_method(run, own[run.algorithm], usual[run.algorithm]), shown(run.config, telling) or _problem(run))
        for run in firsts
    ]
    notes = [
        f"{algorithm}, where its name does not say otherwise: {shown(settings, list(settings))}"
        for algorithm, settings in usual.items()
        if settings
    ]
    left = [name for name in overall if name not in telling and name not in variant]
    return found, (*notes, *_unsaid(left, within, setting, by_algorithm))


def _unsaid(
    left: Sequence[str], within: set[str], setting: Sequence[str], by_algorithm: Mapping[str, Sequence[Run]]
) -> list[str]:
    """Notes on what varies and is in no name: along with the settings, or between methods."""
    firsts = [run for same in by_algorithm.values() for run in same]
    other = [name for name in left if name in within or name in setting]
    between = [
        name
        for name in left
        if not _is_section(name, firsts)
        and (name not in other or _varies_between_methods(name, setting, firsts))
    ]
    along = [f"{name} ({'; '.join(_values(name, firsts))})" for name in other if name not in between]
    notes = [f"differing between settings as well: {', '.join(along)}"] if along else []
    for name in between:
        values = (f"{kind} {' or '.join(_values(name, same))}" for kind, same in by_algorithm.items())
        notes.append(f"{name} differs between methods: {'; '.join(values)}")
    return notes


def _varying(runs: Sequence[Run]) -> list[str]:
    configs = [counted(run) for run in runs]
    names = dict.fromkeys(name for settings in configs for name in settings)
    return [name for name in names if len({repr(settings.get(name)) for settings in configs}) > 1]


def _is_section(name: str, firsts: Sequence[Run]) -> bool:
    """A method's own section is absent from the others' configurations."""
    return name.partition(".")[0] in {run.algorithm for run in firsts}


def _key(run: Run, names: Sequence[str]) -> str:
    return repr([run.config.get(name) for name in names])


def _telling(names: Sequence[str], firsts: Sequence[Run]) -> list[str]:
    """Names enough to tell the settings apart: of those that change together the first in SETTING, so that
    data are always named; models are last.
    """
    found: list[str] = []
    places = [*SETTING, "model."]
    for name in sorted(names, key=lambda name: next(n for n, at in enumerate(places) if name.startswith(at))):
        if len({_key(run, [*found, name]) for run in firsts}) > len({_key(run, found) for run in firsts}):
            found.append(name)
    return [name for name in names if name in found]


def _varies_in_a_setting(name: str, setting: Sequence[str], firsts: Sequence[Run]) -> bool:
    """Whether a method has several values of it in one setting; what is the setting's own never has."""
    places = {(run.algorithm, _key(run, setting)) for run in firsts}
    return len({(run.algorithm, _key(run, [*setting, name])) for run in firsts}) > len(places)


def _varies_between_methods(name: str, setting: Sequence[str], firsts: Sequence[Run]) -> bool:
    places = {_key(run, setting) for run in firsts}
    return len({_key(run, [*setting, name]) for run in firsts}) > len(places)


def _usual(names: Sequence[str], same: Sequence[Run]) -> dict[str, Any]:
    """What more than half of the variants of a method have."""
    variants = list({_key(run, names): run for run in same}.values())
    found = {}
    for name in names:
        key, number = Counter(_key(run, [name]) for run in variants).most_common(1)[0]
        if 2 * number > len(variants):
            found[name] = next(run.config.get(name) for run in variants if _key(run, [name]) == key)
    return found


def _method(run: Run, names: Sequence[str], usual: Mapping[str, Any]) -> str:
    told = [name for name in names if name not in usual or repr(run.config.get(name)) != repr(usual[name])]
    return run.algorithm + (f" ({shown(run.config, told)})".replace(f"{run.algorithm}.", "") if told else "")


def _problem(run: Run) -> str:
    """What a setting is called when there is one only."""
    data = run.config.get("data.name" if run.config.get("data.source") == "torchvision" else "data.source")
    return f"{data}, N = {run.clients}"


def _values(name: str, runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(value_text(run.config[name]) for run in runs if name in run.config))


def shown(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """`name = value, …` of some settings."""
    return ", ".join(f"{name} = {value_text(settings.get(name))}" for name in names)


def value_text(value: Any) -> str:
    """A setting as the flags take it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else "none" if value in ("", None) else str(value)
