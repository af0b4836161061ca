"""Labels of compared runs: the method and the setting, each by what distinguishes it from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pfedmoe_mpi.report.load import Run
from pfedmoe_mpi.report.periods import periods

# Settings that do not separate groups: the replicate, the folder, and what affects rounding or speed only.
PROCESSOR = ("train.threads", "train.device", "train.deterministic", "train.graphs", "train.samples_in")
IGNORED = ("seed", "run.", *PROCESSOR, "eval.batch")
# Settings that define the problem, the same for every method; all others belong to the method.
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
# Settings whose change from one round on does not change how a run trains: files may have moved.
WITHOUT_EFFECT = (*IGNORED, "eval.", "data.", "partition.")


def grouping_settings(run: Run) -> dict[str, Any]:
    """Return the settings that separate groups: all but IGNORED, and `run.patience` if it may end the run.

    The value of a setting that a fork or a restart changed says until which round it was another one.
    """
    settings = {name: value for name, value in run.config.items() if not name.startswith(IGNORED)}
    patience = run.config.get("run.patience")
    return {**settings, **({"run.patience": patience} if patience else {}), **changed_during_training(run)}


def training_changes(run: Run) -> list[tuple[int, str, Any, Any]]:
    """Return (last round before, setting, before, after) of what forks and restarts changed in training."""
    names_rounds = str(run.config.get("train.schedule")) in {"cosine", "linear"}
    return [
        (period.after, name, old, new)
        for period in periods(run)
        for name, (old, new) in period.changes.items()
        if period.after and not name.startswith(WITHOUT_EFFECT)
        if None not in (old, new) and old != new and (name != "rounds" or names_rounds)
    ]


def changed_during_training(run: Run) -> dict[str, str]:
    """Return `OLD until round N, then NEW` of each setting that changed during training."""
    texts: dict[str, list[str]] = {}
    for after, name, old, new in training_changes(run):
        *before, _ = texts.get(name, [""])
        texts[name] = [*before, f"{value_text(old)} until round {after}", f"then {value_text(new)}"]
    return {name: ", ".join(parts) for name, parts in texts.items()}


def labels(firsts: Sequence[Run]) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Return (method, setting) of runs with distinct configurations, and notes on what the labels omit.

    A setting's label has only what distinguishes it from the others; a method's label has the values that
    most of its variants do not share. A value that changes only with the setting, such as augmentation by
    data set, does not make a variant.
    """
    changed = [changed_during_training(run) for run in firsts]
    firsts = [replace(run, config=grouping_settings(run), events=(), trunk=None) for run in firsts]
    by_algorithm: dict[str, list[Run]] = {}
    for run in firsts:
        by_algorithm.setdefault(run.algorithm, []).append(run)
    varying = {algorithm: _varying(runs) for algorithm, runs in by_algorithm.items()}
    overall = [name for name in _varying(firsts) if name != "algorithm"]
    problem = [name for name in overall if name.startswith(SETTING)]
    models = [n for n in overall if n.startswith("model.") and _varies_in_a_setting(n, problem, firsts)]
    setting = problem + models
    distinguishing = _distinguishing(setting, firsts)
    variant = [name for name in overall if _varies_in_a_setting(name, setting, firsts)]
    of_method = {algorithm: [n for n in names if n in variant] for algorithm, names in varying.items()}
    usual = {algorithm: _usual(of_method[algorithm], runs) for algorithm, runs in by_algorithm.items()}
    pairs = [
        (
            _method(run, of_method[run.algorithm], usual[run.algorithm]),
            settings_text(run.config, distinguishing) or _problem(run),
        )
        for run in firsts
    ]
    notes = [
        f"{algorithm}, unless its label says otherwise: {settings_text(settings, list(settings))}"
        for algorithm, settings in usual.items()
        if settings
    ]
    unlabelled = [name for name in overall if name not in distinguishing and name not in variant]
    within = {name for names in varying.values() for name in names}
    notes += _notes(unlabelled, within, setting, by_algorithm)
    return pairs, (*notes, *_unsaid(changed, pairs, notes))


def _unsaid(
    changed: Sequence[Mapping[str, str]], pairs: Sequence[tuple[str, str]], notes: Sequence[str]
) -> list[str]:
    """Return notes on what changed during training, where neither a label nor another note says so."""
    said = "\n".join([*(label for pair in pairs for label in pair), *notes])
    unsaid = (
        f"changed during training: {method} {name} = {text}"
        for settings, (method, _) in zip(changed, pairs, strict=True)
        for name, text in settings.items()
        if text not in said
    )
    return list(dict.fromkeys(unsaid))


def _notes(
    unlabelled: Sequence[str],
    within: set[str],
    setting: Sequence[str],
    by_algorithm: Mapping[str, Sequence[Run]],
) -> list[str]:
    """Return notes on settings that vary without being in a label: between settings, or between methods."""
    firsts = [run for runs in by_algorithm.values() for run in runs]
    within_methods = [name for name in unlabelled if name in within or name in setting]
    between = [
        name
        for name in unlabelled
        if not _is_section(name, firsts)
        and name != "gate.start"  # its default depends on the method
        and (name not in within_methods or _varies_between_methods(name, setting, firsts))
    ]
    along = [f"{name} ({'; '.join(_values(name, firsts))})" for name in within_methods if name not in between]
    notes = [f"also different between settings: {', '.join(along)}"] if along else []
    for name in between:
        values = (
            f"{algorithm} {' or '.join(_values(name, runs))}" for algorithm, runs in by_algorithm.items()
        )
        notes.append(f"{name} differs between methods: {'; '.join(values)}")
    return notes


def _varying(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings that differ between runs."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [name for name in names if len({_key(run, [name]) for run in runs}) > 1]


def _is_section(name: str, firsts: Sequence[Run]) -> bool:
    """Return whether a setting is in a method's own section, which other methods' configurations lack."""
    return name.partition(".")[0] in {word for run in firsts for word in run.algorithm.split()}


def _key(run: Run, names: Sequence[str]) -> str:
    return repr([run.config.get(name) for name in names])


def _distinguishing(names: Sequence[str], firsts: Sequence[Run]) -> list[str]:
    """Return the fewest names that distinguish the settings.

    Of names that change together, the first in the order of SETTING, then models: data are always named.
    """
    kept: list[str] = []
    places = [*SETTING, "model."]
    for name in sorted(names, key=lambda name: next(n for n, at in enumerate(places) if name.startswith(at))):
        if len({_key(run, [*kept, name]) for run in firsts}) > len({_key(run, kept) for run in firsts}):
            kept.append(name)
    return [name for name in names if name in kept]


def _varies_in_a_setting(name: str, setting: Sequence[str], firsts: Sequence[Run]) -> bool:
    """Return whether a method has several values of `name` in one setting; never for names in `setting`."""
    groups = {(run.algorithm, _key(run, setting)) for run in firsts}
    return len({(run.algorithm, _key(run, [*setting, name])) for run in firsts}) > len(groups)


def _varies_between_methods(name: str, setting: Sequence[str], firsts: Sequence[Run]) -> bool:
    """Return whether methods differ in `name` within one setting."""
    groups = {_key(run, setting) for run in firsts}
    return len({_key(run, [*setting, name]) for run in firsts}) > len(groups)


def _usual(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """Return the values that more than half of a method's variants share."""
    variants = list({_key(run, names): run for run in runs}.values())
    usual = {}
    for name in names:
        key, number = Counter(_key(run, [name]) for run in variants).most_common(1)[0]
        if 2 * number > len(variants):
            usual[name] = next(run.config.get(name) for run in variants if _key(run, [name]) == key)
    return usual


def _method(run: Run, names: Sequence[str], usual: Mapping[str, Any]) -> str:
    """Return the method's label: the algorithm, and in brackets the values that are not the usual ones."""
    unusual = [name for name in names if name not in usual or repr(run.config.get(name)) != repr(usual[name])]
    return run.algorithm + (
        f" ({settings_text(run.config, unusual)})".replace(f"{run.algorithm}.", "") if unusual else ""
    )


def _problem(run: Run) -> str:
    """Return the label of the only setting."""
    data = run.config.get("data.name" if run.config.get("data.source") == "torchvision" else "data.source")
    return f"{data}, N = {run.clients}"


def _values(name: str, runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(value_text(run.config[name]) for run in runs if name in run.config))


def settings_text(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return `name = value, …` of the named settings."""
    return ", ".join(f"{name} = {value_text(settings.get(name))}" for name in names)


def value_text(value: Any) -> str:
    """Return a value as a flag accepts it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else "none" if value in ("", None) else str(value)
