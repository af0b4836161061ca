"""The configuration: typed, validated, read from TOML and overridden by flags.

A `Config` is immutable and complete: every field, here and in the sections beside it, has a range and a
default; the string below it is its help, with the reason for the default. Whatever can be checked without
data is checked here, before torch or MPI is imported. A method adds its own section by a class `Options` in
its file, which `methods.py` reads.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from pfedmoe_mpi import user_code
from pfedmoe_mpi.config import methods, neighbours, recorded, sections
from pfedmoe_mpi.config.model_settings import ModelSettings
from pfedmoe_mpi.config.new_clients import Join, Unseen
from pfedmoe_mpi.config.partition_settings import PartitionSettings
from pfedmoe_mpi.config.privacy_settings import PrivacySettings
from pfedmoe_mpi.config.sections import (
    Data,
    Eval,
    FaultSettings,
    Gate,
    Name,
    Run,
    Section,
    Server,
    StreamSettings,
    Train,
)
from pfedmoe_mpi.errors import ConfigError, did_you_mean
from pfedmoe_mpi.models import names
from pfedmoe_mpi.names import check_path, expanded

REFERENCES = (
    *("algorithm", "data.source", "model.pool", "model.shared"),
    *("gate.module", "fedjets.common_model"),
)
LISTS = ("model.pool", "model.weights")  # of several names; a comma in a folder's name separates none
PATHS = ("data.path", "partition.file", "run.dir", "run.code", "fedjets.common")
WEIGHTS = "model.weights"  # a path, or NAME=PATH for each architecture
BOOKKEEPING = ("run.table", "run.cell", "run.scale", "run.altered", "run.forked")  # not flags


class Config(Section):
    algorithm: Name = "pfedmoe"
    """The method to train; `pfedmoe-mpi --help` lists them.
    Default: the method this program is about."""
    rounds: int = Field(40, ge=1, le=1_000_000_000)
    """Communication rounds T, in total.
    Default: pfedmoe's accuracy on the digits has settled; the job takes less than two minutes on two
    cores."""
    clients: int = Field(20, ge=1, le=1_000_000)
    """Number of clients N; data that name their clients propose as many.
    Default: about 90 digits each, and each of five architectures four times."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share C of the clients in a round; the cohort is max(1, floor(C·N + ½)).
    Default: every client, as in the papers' N = 10."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Root of every random draw.
    Default: any number will do."""
    data: Data = Data()
    partition: PartitionSettings = PartitionSettings()
    model: ModelSettings = ModelSettings()
    unseen: Unseen = Unseen()
    join: Join = Join()
    stream: StreamSettings = StreamSettings()
    gate: Gate = Gate()
    train: Train = Train()
    server: Server = Server()
    faults: FaultSettings = FaultSettings()
    privacy: PrivacySettings = PrivacySettings()
    eval: Eval = Eval()
    run: Run = Run()

    @model_validator(mode="after")
    def _check(self) -> Config:
        methods.check(self.algorithm)
        _options(self.algorithm)
        partition, data = self.partition, self.data
        if partition.kind == "classes" and partition.classes_min > partition.classes:
            raise ConfigError(
                f"partition.classes_min = {partition.classes_min} is above partition.classes = "
                f"{partition.classes}",
                f"lower one or raise the other: --partition.classes {partition.classes_min}",
            )
        # Data or a split may propose another number of clients; it then counts as given.
        drawn = data.source in {"digits", "synthetic"} and not partition.file
        known = "clients" in self.model_fields_set or drawn
        if known and self.unseen_clients >= self.clients:
            raise ConfigError(
                f"unseen.clients = {self.unseen.clients:g} leaves no client to train, as clients = "
                f"{self.clients}",
                "lower --unseen.clients or raise --clients",
            )
        own = user_code.is_reference(data.source)
        if data.source not in {"digits", "synthetic"} and not data.path and not own:
            raise ConfigError(
                f"data.source = {data.source} reads a file or folder, and data.path is empty",
                "--data.path PATH",
            )
        if len(data.mean) != len(data.std):
            raise ConfigError(
                f"data.mean has {len(data.mean)} and data.std {len(data.std)} numbers",
                "give both as many numbers, one per channel: --data.mean 0.5,0.5,0.5 --data.std 0.5,0.5,0.5",
            )
        if any(value <= 0 for value in data.std):
            shown = ",".join(f"{value:g}" for value in data.std)
            raise ConfigError(f"data.std = {shown}: every number must be above 0", "--data.std 0.5,0.5,0.5")
        return self

    @property
    def options(self) -> Section:
        """The section of the chosen algorithm."""
        section: Section = getattr(self, self.method)
        return section

    @property
    def method(self) -> str:
        """The name of the chosen algorithm, which may be a file."""
        return methods.name(self.algorithm)

    @property
    def unseen_clients(self) -> int:
        """How many of the N clients never train."""
        wanted = self.unseen.clients
        return int(wanted * self.clients + 0.5 if wanted < 1 else wanted)

    @property
    def drawn_clients(self) -> int:
        """How many of the N clients are drawn to be measured, at least one."""
        wanted = self.eval.clients or self.clients
        return max(1, int(wanted * self.clients + 0.5 if wanted < 1 else wanted))

    @property
    def cohort_size(self) -> int:
        """K = max(1, floor(C·n + ½)) of the n clients that train."""
        return max(1, int(self.participation * (self.clients - self.unseen_clients) + 0.5))

    @property
    def expected_cohort(self) -> float:
        """K, or C·n where each of the n clients that train is drawn independently."""
        drawn = self.participation * (self.clients - self.unseen_clients)
        return drawn if self.privacy.draws_clients else self.cohort_size


@cache
def schema(algorithm: str = "") -> type[Config]:
    """Return `Config` with one section per method; a method that cannot be used gets an empty one.

    Args:
        algorithm: a file whose section is added.
    """
    sections: dict[str, Any] = {}
    every = {*methods.names(), *filter(user_code.is_reference, [algorithm])}
    for each in every:
        name = methods.name(each)
        if name in Config.model_fields or (each == algorithm and name in methods.names()):
            continue  # the check of the configuration refuses it
        try:
            options = _options(each)
        except ConfigError:
            options = Section
        sections[name] = (options, options())
    return create_model("Config", __base__=Config, **dict(sorted(sections.items())))


def _options(algorithm: str) -> Any:
    """Return the method's section.

    Raises:
        MethodError: the method cannot be used.
    """
    name = methods.name(algorithm)
    if name in Config.model_fields:
        reason = f"'{name}' is the name of a setting or section"
        raise methods.MethodError.at(methods.path(algorithm), None, reason)
    return methods.options(algorithm, Section)


def fields(algorithm: str = "") -> dict[str, Any]:
    """Return every setting by its dotted name, with pydantic's field: annotation, default, description.

    Args:
        algorithm: a file whose settings are added.
    """
    return _fields(schema(algorithm if user_code.is_reference(algorithm) else ""), "")


def _fields(model: type[BaseModel], prefix: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            settings |= _fields(kind, f"{prefix}{name}.")
        else:
            settings[prefix + name] = field
    return settings


def choices(field: Any) -> tuple[str, ...]:
    """Return the words that a field accepts, beside references if it takes these, else nothing."""
    kinds = get_args(field.annotation) if sections.OwnSource in get_args(field.annotation) else ()
    words = next((kind for kind in (field.annotation, *kinds) if get_origin(kind) is Literal), None)
    return tuple(map(str, get_args(words)))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a file by their dotted names; its relative paths become relative to it.

    A run's config.toml keeps its meaning: settings that did not exist yet are as they were then.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}", "check the path") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        ours = os.path.isdir(path) or path.suffix == ".h5"
        remedy = f"to continue a run: pfedmoe-mpi restart {path}" if ours else "correct the file"
        raise ConfigError(f"{path} cannot be read as TOML: {error}", remedy) from error
    tree = recorded.complete(tree) if recorded.is_recorded(tree) else tree
    return located(flatten(tree), path.resolve().parent)


def located(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with absolute paths; relative ones count from `folder`."""
    absolute = dict(settings)
    for name in PATHS:
        value = settings.get(name)
        if isinstance(value, str) and value and value != "pretrain":
            absolute[name] = str(folder / expanded(value))
    absolute = _with_items(absolute, (WEIGHTS,), partial(_located_weights, folder))
    return _with_references(absolute, partial(user_code.located, folder=folder))


def _located_weights(folder: Path, item: str) -> str:
    """Return FILE or NAME=FILE with absolute paths."""
    before, equals, after = item.partition("=")
    name, path = (before, after) if equals else ("", before)
    name = user_code.located(name, folder) if user_code.is_reference(name) else name
    return f"{name}{equals}{folder / expanded(path)}" if path else item


def relocated(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with the user's own files looked for by name in another folder."""
    return _with_references(settings, partial(user_code.relocated, folder=folder))


def _with_references(settings: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return the settings with a change of every reference to the user's own code."""

    def of_reference(item: str) -> str:
        return change(item) if user_code.is_reference(item) else item

    return _with_items(settings, REFERENCES, of_reference)


def _with_items(
    settings: Mapping[str, Any], names: Sequence[str], change: Callable[[str], str]
) -> dict[str, Any]:
    """Return the settings with a change of every item of some of them, which are texts or lists of texts."""
    changed = dict(settings)
    for name in names:
        value = settings.get(name)
        single = isinstance(value, str) and name not in LISTS
        items = [value] if single else value
        if isinstance(items, str):
            items = [item.strip() for item in items.split(",") if item.strip()]
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            items = [change(item) for item in items]
            changed[name] = items[0] if single else items
    return changed


def references(settings: Config) -> list[str]:
    """Return the references to code from outside of this program in a configuration."""
    flat = flatten(to_tree(settings))
    values = [flat.get(name) for name in REFERENCES[1:]]
    chosen = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    code = [methods.reference(settings.algorithm), *map(names.reference, filter(None, chosen))]
    return list(dict.fromkeys(filter(None, code)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of settings by their dotted names; names accept `-` for `_`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = prefix + name.replace("-", "_")
        flat |= flatten(value, dotted + ".") if isinstance(value, Mapping) else {dotted: value}
    return flat


def build(settings: Mapping[str, Any]) -> Config:
    """Return the checked configuration of settings by their dotted names.

    Raises:
        ConfigError: names every wrong setting, its value, what is expected, and the nearest name.
        MethodError: a setting of a method whose file cannot be used, or this method is chosen.
    """
    algorithm = str(settings.get("algorithm", ""))
    if user_code.is_reference(algorithm):
        methods.check(algorithm)
        _options(algorithm)
    every = fields(algorithm)
    unknown = [name for name in settings if name not in every]
    if unknown:
        check_methods(unknown)
        lines = "\n".join(_unknown(name, every) for name in unknown)
        raise ConfigError(lines, "`pfedmoe-mpi run --help` lists every setting")
    for name, value in settings.items():
        _check_truth(name, value, every[name].annotation is bool)
        if name in (*PATHS, WEIGHTS):
            check_path(f"{name} =", str(value), ConfigError)
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    try:
        return schema(algorithm if user_code.is_reference(algorithm) else "").model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*_explain(error, every)) from None


def check_methods(names: Iterable[str]) -> None:
    """Raise the MethodError of the first of these settings that belongs to a method that cannot be used."""
    for name in names:
        method, dot, _ = name.partition(".")
        if dot and method in methods.names() and method not in Config.model_fields:
            _options(method)


def _unknown(name: str, every: Iterable[str]) -> str:
    meant = [f"'{setting}'" for setting in neighbours.suggestions(name, every)]
    return f"there is no setting '{name}'{did_you_mean(meant)}"


def _check_truth(name: str, value: Any, truth: bool) -> None:
    """Accept true and false for booleans and nothing else; pydantic takes yes, on and 1, and true for 1."""
    if truth and str(value).lower() not in {"true", "false"}:
        raise ConfigError(f"{name} = {value!r}: expected true or false", f"--{name} true")
    if not truth and isinstance(value, bool):
        problem = f"{name} = {str(value).lower()}: true and false are not values of {name}"
        raise ConfigError(problem, "`pfedmoe-mpi run --help` shows what it accepts")


def _explain(error: ValidationError, every: Mapping[str, Any]) -> tuple[str, str]:
    """Return one line per wrong setting, with all alternatives of a union, and the remedy."""
    messages: dict[str, list[str]] = {}
    for item in error.errors():
        parts = [str(part) for part in item["loc"] if isinstance(part, str)]
        while len(parts) > 1 and ".".join(parts) not in every:
            parts.pop()
        place = ".".join(parts)
        simple = place and not isinstance(item["input"], dict | BaseModel)
        subject = f"{place} = {item['input']!r}" if simple else place
        messages.setdefault(subject, []).append(item["msg"].removeprefix("Value error, "))
    lines = [f"{subject}: {'; or: '.join(texts)}".removeprefix(": ") for subject, texts in messages.items()]
    return "\n".join(lines), "correct the setting; `pfedmoe-mpi run --help` shows what each accepts"


def given(config: Config, name: str) -> bool:
    """Return whether a setting, by its dotted name, was in what `config` was built from."""
    section, _, field = name.rpartition(".")
    return field in (getattr(config, section) if section else config).model_fields_set


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return the configuration with other values of some settings, all of which then count as given."""
    kept = flatten(config.model_dump(mode="json", exclude_unset=True))
    return build({**kept, **changes})


def to_tree(config: Config) -> dict[str, Any]:
    """Return all fields as plain TOML types, without the sections of other methods."""
    tree = config.model_dump(mode="json")
    kept = {config.method, *Config.model_fields}
    return {name: value for name, value in tree.items() if name in kept}


def to_toml(config: Config) -> str:
    """Return the effective configuration as the text of a TOML file."""
    import tomli_w

    return tomli_w.dumps({name: value for name, value in to_tree(config).items() if value != {}})
