"""The configuration: typed, validated, read from TOML and overridden by flags.

A `Config` is immutable and complete: every field has a default, a sentence of help (the string below it) and
a range. Whatever can be checked without data is checked here, before torch or MPI is imported. An algorithm
adds a section of its own by a class `Options` in its file, found by `algorithms.options`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from pfedmoe_mpi import algorithms
from pfedmoe_mpi.errors import ConfigError, nearest
from pfedmoe_mpi.models import names


def _name(value: Any) -> Any:
    """Names accept `-` for `_`."""
    return value.replace("-", "_").lower() if isinstance(value, str) else value


def _items(value: Any) -> Any:
    """`a,b` from a flag is a list of two."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(_name)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_items)]
Numbers = Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], BeforeValidator(_items)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


MOST_THREADS = 1024
PATHS = ("data.path", "run.dir", "fedjets.common")


class Section(BaseModel):
    """A group of settings; unknown names are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Data(Section):
    source: Annotated[
        Literal["digits", "torchvision", "folder", "hdf5", "npz", "synthetic"], BeforeValidator(_name)
    ] = "digits"
    """Where samples come from; `digits` is inside the program and needs no download."""
    path: str = ""
    """File or folder of the source (torchvision: the root that holds the downloaded data)."""
    name: str = "CIFAR10"
    """Which torchvision data set: MNIST, FashionMNIST, EMNIST, SVHN, CIFAR10 or CIFAR100."""
    size: int = Field(0, ge=0, le=1024)
    """Bring images to this many pixels a side; 0 leaves them as they are (digits: 32)."""
    mean: Numbers = ()
    """Subtracted from each channel of [0, 1] images; empty = the source's own constants."""
    std: Numbers = ()
    """Divides each channel after the mean; empty = the source's own constants."""
    samples: int = Field(2000, ge=10)
    """`synthetic`: how many samples to draw."""
    classes: int = Field(10, ge=2)
    """`synthetic`: how many classes to draw."""


class PartitionSettings(Section):
    kind: Annotated[
        Literal["iid", "pathological", "dirichlet", "classes", "natural"], BeforeValidator(_name)
    ] = "dirichlet"
    """How samples are dealt to clients."""
    classes: int = Field(2, ge=1)
    """`pathological`: classes per client; `classes`: the most a client may draw."""
    classes_min: int = Field(1, ge=1)
    """`classes`: the fewest classes a client may draw."""
    alpha: Positive = 1.0
    """`dirichlet`: concentration γ of the class proportions; small = unlike clients."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of a client's samples held out as its test set (the papers' 8 : 2)."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of a client's training samples held out to choose `best.h5`."""
    min_samples: int = Field(10, ge=2)
    """The fewest samples a client may end with."""
    pool: Annotated[Literal["all", "official"], BeforeValidator(_name)] = "all"
    """`all` deals training and test images together; `official` keeps the data's own test images as test."""
    tries: int = Field(100, ge=1, le=100_000)
    """Draws before giving up on `min_samples`."""


class ModelSettings(Section):
    pool: Names = Field(("auto",), min_length=1)
    """Architectures; client k takes number k mod length; auto = five unlike ones if the method allows."""
    shared: Name = "auto"
    """Architecture of the shared model or extractor; auto = the smallest of the pool's family."""
    dim: int = Field(0, ge=0)
    """Length d of a representation, the same everywhere; 0 = what the architectures define (CNN 500)."""
    stem: Annotated[Literal["small", "imagenet"], BeforeValidator(_name)] = "small"
    """First layers of torchvision's ResNets: `small` for 32-pixel images, `imagenet` as published."""

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        named = [names.resolve_name(name) for name in (*self.pool, self.shared) if name != "auto"]
        names.resolve_dim(named, self.dim)
        return self


class Gate(Section):
    hidden: int = Field(64, ge=1)
    """Width m of the gate's hidden layers (the paper does not give it; readings use 32, 64 and 128)."""
    layers: int = Field(2, ge=1)
    """Linear layers of the gate, the last one included."""
    input_norm: Annotated[Literal["switch", "layer", "batch", "none"], BeforeValidator(_name)] = "switch"
    """Normalisation of the flattened input."""
    batch_norm: bool = True
    """BatchNorm after every linear layer, the last one before the softmax."""
    activation: Annotated[Literal["sigmoid", "relu", "tanh", "gelu"], BeforeValidator(_name)] = "sigmoid"
    """Activation between the gate's layers."""
    input: Annotated[Literal["raw", "pooled", "shared"], BeforeValidator(_name)] = "raw"
    """What the gate sees: the sample, the image averaged down to 8×8, or the shared representation."""
    temperature: Positive = 1.0
    """The softmax is over logits / temperature: below 1 sharper, above 1 flatter."""
    routing: Annotated[Literal["soft", "top1"], BeforeValidator(_name)] = "soft"
    """soft mixes the experts; top1 takes the best one of each sample (straight-through gradient)."""
    weights: Annotated[Literal["sample", "learned", "equal"], BeforeValidator(_name)] = "sample"
    """Weights per sample, or the same for all: learned constants, or equal ones (static fusion)."""


class Unseen(Section):
    clients: NotNegative = 0.0
    """Clients that never train, with label combinations no training client has: below 1 a share of N."""
    private: Annotated[Literal["none", "average"], BeforeValidator(_name)] = "none"
    """What stands in for their private parts; average = the mean of what a method can average (pfedmoe)."""


class Join(Section):
    share: float = Field(0.0, ge=0, lt=1)
    """Share of the training clients that join late, drawn once."""
    round: int = Field(10, ge=1)
    """The first round in which they may train."""


class StreamSettings(Section):
    kind: Annotated[Literal["none", "abrupt", "gradual", "recurring"], BeforeValidator(_name)] = "none"
    """How a client's training data drift from one half of its classes to the other."""
    round: int = Field(20, ge=1)
    """abrupt: first round of the change; gradual: it starts here and takes as long; recurring: the period."""


class Train(Section):
    epochs: int = Field(1, ge=1)
    """Local epochs E per round."""
    batch: int = Field(16, ge=2)
    """Batch size B."""
    lr: NotNegative = 0.05
    """Learning rate η_ω of the client's own model."""
    lr_shared: NotNegative = 0.05
    """Learning rate η_θ of what is shared."""
    lr_gate: NotNegative = 0.1
    """Learning rate η_φ of the gate (the paper's grid: 0.001, 0.01, 0.1, 1)."""
    schedule: Annotated[Literal["constant", "cosine", "linear"], BeforeValidator(_name)] = "constant"
    """How the learning rates fall over the rounds (cosine and linear end at 0)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD momentum; starts at zero in every client step."""
    weight_decay: NotNegative = 0.001
    """L2 weight decay of parameters (never of buffers)."""
    clip: NotNegative = 50.0
    """Largest joint norm of the gradient; 0 = no clipping."""
    augment: Names = ()
    """Any of flip, erase, crop (random crop with padding 4), applied in this order on the device."""
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(_name)] = "fp32"
    """fp32 means no TF32; bf16 computes under autocast, vectors stay float32."""
    threads: int | Literal["auto"] = 1
    """CPU threads of every rank; auto = the smallest cores ÷ ranks over all hosts."""
    device: Annotated[Literal["auto", "cpu", "cuda"], BeforeValidator(_name)] = "auto"
    """auto takes a GPU where one is visible."""

    @model_validator(mode="after")
    def _check(self) -> Train:
        if isinstance(self.threads, int) and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be 1 to {MOST_THREADS}, or auto")
        unknown = set(self.augment) - {"flip", "erase", "crop"}
        if unknown:
            raise ValueError(f"augment knows flip, erase and crop, not {', '.join(sorted(unknown))}")
        return self


class FaultSettings(Section):
    nonfinite: Annotated[Literal["drop", "stop"], BeforeValidator(_name)] = "drop"
    """A client whose vector is not finite is left out of the round, or ends the run."""
    dropout: float = Field(0.0, ge=0, le=1)
    """Probability that a cohort member trains and is lost before the sum, drawn every round."""
    straggler: float = Field(0.0, ge=0, le=1)
    """Share of the clients that are slow, drawn once."""
    slowdown: float = Field(10.0, ge=1, allow_inf_nan=False)
    """How many times as long a slow client takes, in simulated time."""
    deadline: NotNegative = 0.0
    """Members that take longer are left out of the sum: simulated time, 1 = the mean client; 0 = none."""


class Eval(Section):
    every: int = Field(1, ge=1)
    """Measure every this many rounds, and always in the last."""
    batch: int = Field(512, ge=1)
    """Batch size of evaluations."""


class Run(Section):
    dir: str = ""
    """Run folder; empty = runs/ALGORITHM-TIME."""
    checkpoint_every: int = Field(10, ge=1)
    """Write a checkpoint every this many rounds, and always after the last."""
    keep: int = Field(3, ge=1)
    """How many of the newest checkpoints to keep, beside best.h5."""
    force: bool = False
    """Rename a run folder that is in the way; nothing is ever deleted."""
    timeout: NotNegative = 0.0
    """Seconds to wait for other ranks before the job ends; 0 = ten times the longest round, at least 600."""
    walltime: NotNegative | Literal["auto"] = "auto"
    """Seconds after which the job must be over; auto = Slurm's end time, if there is one; 0 = no limit."""
    singleton: bool = False
    """Allow one rank where the launcher asked for more (each rank believes it is alone)."""


class Config(Section):
    algorithm: Name = "pfedmoe"
    """The method to train; `--help` lists them."""
    rounds: int = Field(40, ge=1)
    """Communication rounds T, in total."""
    clients: int = Field(20, ge=1, le=1_000_000)
    """Number of clients N."""
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
        if self.algorithm not in algorithms.names():
            known = algorithms.names()
            hint = nearest(self.algorithm, known)
            raise ValueError(f"there is no algorithm '{self.algorithm}'{hint}; known: {', '.join(known)}")
        if self.partition.kind == "classes" and self.partition.classes_min > self.partition.classes:
            raise ValueError("partition.classes_min is above partition.classes; lower one or raise the other")
        if self.unseen_clients >= self.clients:
            raise ValueError("unseen.clients leaves nobody to train; lower it or raise clients")
        if self.data.source in {"folder", "hdf5", "npz", "torchvision"} and not self.data.path:
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
    for name in algorithms.names():
        options = algorithms.options(name, Section)
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


def to_tree(config: Config) -> dict[str, Any]:
    """Plain TOML types, all fields, without the sections of other algorithms."""
    tree = config.model_dump(mode="json")
    kept = {config.algorithm, *Config.model_fields}
    return {name: value for name, value in tree.items() if name in kept}


def to_toml(config: Config) -> str:
    """The effective configuration as a TOML file."""
    import tomli_w

    return tomli_w.dumps({name: value for name, value in to_tree(config).items() if value != {}})
