"""The sections of the configuration: every setting with its type, range, default and a sentence of help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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


class Section(BaseModel):
    """A group of settings; unknown names are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Data(Section):
    source: Annotated[
        Literal["digits", "torchvision", "folder", "hdf5", "npz", "heart", "text", "words", "synthetic"],
        BeforeValidator(_name),
    ] = "digits"
    """Where samples come from; digits is inside the program; heart, npz, text and words propose settings."""
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
    length: int = Field(64, ge=1, le=4096)
    """Texts: how many words of a text are read."""
    vocabulary: int = Field(10_000, ge=1, le=1_000_000)
    """Texts: how many words have a token of their own, the most frequent in training rows."""
    samples: int = Field(2000, ge=10)
    """`synthetic`: how many samples to draw."""
    classes: int = Field(10, ge=2)
    """`synthetic`: how many classes to draw."""


class PartitionSettings(Section):
    kind: Annotated[
        Literal["iid", "pathological", "dirichlet", "classes", "natural"], BeforeValidator(_name)
    ] = "dirichlet"
    """How samples are dealt to clients; heart, npz and words propose natural."""
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
    """Architectures; client k takes number k mod length; auto = unlike ones if the method allows."""
    shared: Name = "auto"
    """Architecture of the shared model or extractor; auto = the smallest of the family (texts: fasttext)."""
    dim: int = Field(0, ge=0)
    """Length d of a representation, the same everywhere; 0 = what the models define (CNN 500, text 64)."""
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
    """What the gate sees: the sample (of a text its embeddings), the image at 8×8, or the shared features."""
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
    tensorboard: bool = False
    """Write accuracy, loss, seconds and bytes of every round into RUN/tensorboard, to be watched."""
    table: str = ""
    """Which table of a paper the run belongs to; written by `reproduce`, for reports."""
    cell: str = ""
    """Its place there, COLUMN/ROW; written by `reproduce`."""
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its rounds as a share of the table's; written by `reproduce`."""
    altered: Names = ()
    """Settings it has otherwise than the table; written by `reproduce`."""
