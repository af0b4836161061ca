"""The configuration: typed, validated, read from TOML and overridden by flags.

A `Config` is immutable and complete: every field, here and in `sections.py`, has a default, a sentence of
help (the string below it) and a range. Whatever can be checked without data is checked here, before torch or
MPI is imported. An algorithm adds a section of its own by a class `Options` in its file, found by
`algorithms.options`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from pfedmoe_mpi.config import methods
from pfedmoe_mpi.config.sections import (
    Data,
    Eval,
    FaultSettings,
    Gate,
    Join,
    ModelSettings,
    Name,
    PartitionSettings,
    Run,
    Section,
    StreamSettings,
    Train,
    Unseen,
)
from pfedmoe_mpi.errors import ConfigError, nearest

PATHS = ("data.path", "run.dir", "fedjets.common")


class Config(Section):
    algorithm: Name = "pfedmoe"
    """The method to train; `--help` lists them."""
    rounds: int = Field(40, ge=1)
    """Communication rounds T, in total."""
    clients: int = Field(20, ge=1, le=1_000_000)
    """Number of clients N; heart and words propose as many as they have."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share C of the clients in a round; the cohort is max(1, floor(C·N + ½))."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Root of every random draw."""
    data: Data = Data()
    partition: PartitionSettings = PartitionSettings()
    model: ModelSettings = ModelSettings()
    unseen: Unseen = Unseen()
    join: Join = Join()
    stream: StreamSettings = StreamSettings()
    gate: Gate = Gate()
    train: Train = Train()
    faults: FaultSettings = FaultSettings()
    eval: Eval = Eval()
    run: Run = Run()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.algorithm not in methods.names():
            known = methods.names()
            hint = nearest(self.algorithm, known)
            raise ValueError(f"there is no algorithm '{self.algorithm}'{hint}; known: {', '.join(known)}")
        if self.partition.kind == "classes" and self.partition.classes_min > self.partition.classes:
            raise ValueError("partition.classes_min is above partition.classes; lower one or raise the other")
        if self.unseen_clients >= self.clients:
            raise ValueError("unseen.clients leaves nobody to train; lower it or raise clients")
        if self.data.source not in {"digits", "synthetic"} and not self.data.path:
            raise ValueError(f"data.source {self.data.source} needs --data.path, the file or folder to read")
        if len(self.data.mean) != len(self.data.std):
            raise ValueError("data.mean and data.std need as many numbers as each other, one per channel")
        if any(value <= 0 for value in self.data.std):
            raise ValueError("data.std must be positive in every channel")
        return self

    @property
    def options(self) -> Section:
        """The section of the chosen algorithm."""
        section: Section = getattr(self, self.algorithm)
        return section

    @property
    def unseen_clients(self) -> int:
        """How many of the N clients never train."""
        wanted = self.unseen.clients
        return int(wanted * self.clients + 0.5 if wanted < 1 else wanted)

    @property
    def cohort_size(self) -> int:
        """K = max(1, floor(C·n + ½)) of the n clients that train."""
        return max(1, int(self.participation * (self.clients - self.unseen_clients) + 0.5))


@cache
def schema() -> type[Config]:
    """`Config` with one section per algorithm that has options."""
    sections: dict[str, Any] = {}
    for name in methods.names():
        options = methods.options(name, Section)
        sections[name] = (options, options())
    return create_model("Config", __base__=Config, **sections)


def fields(model: type[BaseModel] | None = None, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, with pydantic's field: annotation, default, description."""
    found: dict[str, Any] = {}
    for name, field in (model or schema()).model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def choices(field: Any) -> tuple[str, ...]:
    """The admitted words of a Literal field, else nothing."""
    return tuple(map(str, get_args(field.annotation))) if get_origin(field.annotation) is Literal else ()


def read_toml(path: Path) -> dict[str, Any]:
    """The file as dotted names; its relative paths become relative to it."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}", "check the path") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        ours = path.is_dir() or path.suffix == ".h5"
        remedy = (
            f"`restart {path}` goes on with it, if it is a run or a checkpoint" if ours else "mend the file"
        )
        raise ConfigError(f"{path} cannot be read as TOML: {error}", remedy) from error
    return located(flatten(tree), path.resolve().parent)


def located(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with their paths absolute, relative ones taken from `folder`."""
    found = dict(settings)
    for name in PATHS:
        value = found.get(name)
        if isinstance(value, str) and value and value != "pretrain":
            found[name] = str(folder / Path(value).expanduser())
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted names; names accept `-` for `_`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = prefix + name.replace("-", "_")
        flat |= flatten(value, dotted + ".") if isinstance(value, Mapping) else {dotted: value}
    return flat


def build(settings: Mapping[str, Any]) -> Config:
    """A checked configuration from dotted names.

    Raises:
        ConfigError: names every wrong setting, its value, what is expected, and the nearest known name.
    """
    known = fields()
    unknown = [name for name in settings if name not in known]
    if unknown:
        hints = [f"there is no setting '{name}'{nearest(name, known)}" for name in unknown]
        raise ConfigError("\n".join(hints), "`python -m pfedmoe_mpi --help` lists every setting")
    for name, value in settings.items():
        _check_truth(name, value, known[name].annotation is bool)
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    try:
        return schema().model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*_explain(error)) from None


def _check_truth(name: str, value: Any, truth: bool) -> None:
    """Booleans are true or false, and numbers neither; pydantic takes yes, on and 1, and true for 1."""
    if truth and str(value).lower() not in {"true", "false"}:
        raise ConfigError(f"{name} = {value!r}: neither true nor false", f"--{name} true|false")
    if not truth and isinstance(value, bool):
        problem = f"{name} = {str(value).lower()}: true and false mean nothing here"
        raise ConfigError(problem, "`python -m pfedmoe_mpi --help` tells what it accepts")


def _explain(error: ValidationError) -> tuple[str, str]:
    """One line per wrong setting; a union's alternatives are told together."""
    known = fields()
    messages: dict[str, list[str]] = {}
    for item in error.errors():
        parts = [str(part) for part in item["loc"] if isinstance(part, str)]
        while len(parts) > 1 and ".".join(parts) not in known:
            parts.pop()
        place = ".".join(parts)
        simple = place and not isinstance(item["input"], dict | BaseModel)
        subject = f"{place} = {item['input']!r}" if simple else place or "settings"
        messages.setdefault(subject, []).append(item["msg"].removeprefix("Value error, "))
    lines = [f"{subject}: {'; or: '.join(found)}" for subject, found in messages.items()]
    return "\n".join(lines), "correct the setting; `python -m pfedmoe_mpi --help` tells what each accepts"


def given(config: Config, name: str) -> bool:
    """Whether a setting, by its dotted name, was in what `config` was built from."""
    section, _, field = name.rpartition(".")
    return field in (getattr(config, section) if section else config).model_fields_set


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values of some settings, all of which then count as given."""
    kept = flatten(config.model_dump(mode="json", exclude_unset=True))
    return build({**kept, **changes})


def to_tree(config: Config) -> dict[str, Any]:
    """Plain TOML types, all fields, without the sections of other algorithms."""
    tree = config.model_dump(mode="json")
    kept = {config.algorithm, *Config.model_fields}
    return {name: value for name, value in tree.items() if name in kept}


def to_toml(config: Config) -> str:
    """The effective configuration as a TOML file."""
    import tomli_w

    return tomli_w.dumps({name: value for name, value in to_tree(config).items() if value != {}})
