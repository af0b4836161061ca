"""The sections of the configuration but `model`: every setting with its type, range and default.

The string below a setting is its help: a sentence, then `Default: ` with the reason for the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pfedmoe_mpi import user_code
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names


def _name(value: Any) -> Any:
    """Return a name in lower case, with `_` for `-`; a reference to the user's own code is not changed."""
    if not isinstance(value, str) or user_code.is_reference(value):
        return value
    return value.replace("-", "_").lower()


def _items(value: Any) -> Any:
    """Return the items of a comma-separated flag, `a,b`, as a list."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _source(value: Any) -> Any:
    """Return a source's name; that of an installed package becomes a reference to its function."""
    value = _name(value)
    return user_code.installed(SOURCES).get(value, value) if isinstance(value, str) else value


def _own_source(value: str) -> str:
    """Return the reference to a function; raise ValueError for any other text."""
    if not user_code.is_reference(value):
        raise ValueError("a function of your own as FILE.py:NAME")
    names.check_object(value)
    return value


LowerCase = BeforeValidator(_name)
SOURCES = "pfedmoe_mpi.sources"  # a group of entry points
OwnSource = Annotated[str, AfterValidator(_own_source)]
Name = Annotated[str, BeforeValidator(_name)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_items)]
Files = Literal[
    "torchvision", "folder", "hdf5", "npz", "leaf", "tff", "table", "hf", "heart", "text", "words"
]
Source = Literal["digits", Files, "synthetic"]
Texts = Annotated[tuple[str, ...], BeforeValidator(_items)]
Changes = Annotated[
    tuple[Annotated[Literal["flip", "erase", "crop"], BeforeValidator(_name)], ...], BeforeValidator(_items)
]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_items)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], BeforeValidator(_items)]
Threads = Annotated[int, Field(ge=1, le=1024)]


class Section(BaseModel):
    """A group of settings; unknown names are rejected, and numbers that are not finite, as JSON has none."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Data(Section):
    source: Annotated[Source | OwnSource, BeforeValidator(_source)] = "digits"
    """Where samples come from, or FILE.py:NAME, a function of your own; digits needs no file.
    Default: needs no download."""
    path: str = ""
    """File or folder of the source (torchvision: the root that holds the downloaded data).
    Default: a source that needs one asks for it."""
    name: str = "CIFAR10"
    """Which torchvision data set: MNIST, FashionMNIST, EMNIST, SVHN, CIFAR10 or CIFAR100.
    Default: the data set of both papers."""
    label: str = ""
    """`table`, `hf`: the name of the column that holds the label; classes are its values in sorted order.
    Default: the class column that a file of Hugging Face declares; of other tables only you know it."""
    client: str = ""
    """`table`, `hf`: the name of the column that holds the client; natural is then the proposed partition.
    Default: a table need not name clients."""
    split: str = ""
    """`table`, `hf`: the name of the column that says train, test or validation, for an official test part.
    Default: parts are named by files or folders, such as train.csv and test.csv, or by none."""
    image: str = ""
    """`table`, `hf`: the name of the column that holds images, or their paths in the table's folder.
    Default: the image column that a file of Hugging Face declares, unless data.text is given."""
    text: Texts = ()
    """`table`, `hf`: the columns that hold the text, which are joined by spaces.
    Default: columns of texts are codes without an order."""
    categorical: Texts = ()
    """`table`, `hf`: columns of numbers that are codes without an order; each code is a column of 0 and 1.
    Default: numbers have an order; columns of texts are codes without being listed."""
    ignore: Texts = ()
    """`table`, `hf`: columns that are not features: identifiers, or what is known only after the label.
    Default: every other column is a feature."""
    size: int = Field(0, ge=0, le=1024)
    """Bring images to this many pixels a side; 0 leaves them as they are (digits: 32).
    Default: images as they are."""
    mean: Numbers = ()
    """Subtracted from each channel of [0, 1] images; empty = the source's own constants.
    Default: ImageNet's for CIFAR and folders, as in the authors' released code, else 0.5."""
    std: Numbers = ()
    """Divides each channel after the mean; empty = the source's own constants.
    Default: as data.mean."""
    tokens: Annotated[Literal["auto", "word", "char"], BeforeValidator(_name)] = "auto"
    """Texts: tokens are words (word) or characters (char).
    Default: characters for Shakespeare, as LEAF and TensorFlow Federated have it, else words."""
    length: int = Field(64, ge=1, le=4096)
    """Texts: how many words or characters of a text are read.
    Default: 97 of 100 items of AG News are no longer."""
    vocabulary: int = Field(10_000, ge=1, le=1_000_000)
    """Texts: how many words or characters have a token of their own, the most frequent in training rows.
    Default: 85 of 100 words that occur more than once in 6,000 items of AG News."""
    samples: int = Field(2000, ge=10)
    """`synthetic`: how many samples to draw.
    Default: a run takes seconds."""
    classes: int = Field(10, ge=2)
    """`synthetic`: how many classes to draw.
    Default: as CIFAR-10."""


class Gate(Section):
    hidden: int = Field(64, ge=1)
    """Width m of the gate's hidden layers, which the paper does not give.
    Default: the middle of the readings 32, 64 and 128."""
    layers: int = Field(2, ge=1)
    """Linear layers of the gate, the last one included.
    Default: as in the paper."""
    input_norm: Annotated[Literal["switch", "layer", "batch", "none"], BeforeValidator(_name)] = "switch"
    """Normalisation of the flattened input.
    Default: as in the paper."""
    batch_norm: bool = True
    """BatchNorm after every linear layer, the last one before the softmax.
    Default: as in the paper, placed before the softmax."""
    activation: Annotated[Literal["sigmoid", "relu", "tanh", "gelu"], BeforeValidator(_name)] = "sigmoid"
    """Activation between the gate's layers.
    Default: as in the paper."""
    input: Annotated[Literal["raw", "pooled", "shared"], BeforeValidator(_name)] = "raw"
    """What the gate sees: the sample (of a text its embeddings), the image at 8×8, or the shared features.
    Default: as in the paper."""
    temperature: Positive = 1.0
    """The softmax is over logits / temperature: below 1 sharper, above 1 flatter.
    Default: as in the paper."""
    routing: Annotated[Literal["soft", "top1"], BeforeValidator(_name)] = "soft"
    """soft mixes the experts; top1 takes the best one of each sample (straight-through gradient).
    Default: as in the paper."""
    module: str = ""
    """A gate of your own as FILE.py:NAME, called with (shape of its input, experts); its output are logits.
    Default: the gate of the paper, which the settings above describe."""
    weights: Annotated[Literal["sample", "learned", "equal"], BeforeValidator(_name)] = "sample"
    """Weights per sample, or the same for all: learned constants, or equal ones (static fusion).
    Default: as in the paper."""
    start: Annotated[Literal["auto", "paper", "even"], BeforeValidator(_name)] = "auto"
    """First weights: paper = drawn, so that they vary by sample; even = equal; of the program's own gate.
    Default: auto = even for pfedmoe, chosen on validation rows (jobs/tables/README.md), else paper."""

    @model_validator(mode="after")
    def _check(self) -> Gate:
        if self.module:
            names.check_object(self.module)
        if self.module and self.start == "even":
            problem = f"gate.start = even, but gate.module = {self.module} draws its own first weights"
            raise ConfigError(problem, "remove --gate.start, and begin with logits of 0 in the module")
        return self


class StreamSettings(Section):
    kind: Annotated[Literal["none", "abrupt", "gradual", "recurring"], BeforeValidator(_name)] = "none"
    """How a client's training data drift from one half of its classes to the other.
    Default: data do not change, as in the papers."""
    round: int = Field(20, ge=1)
    """abrupt: first round of the change; gradual: it starts here and takes as long; recurring: the period.
    Default: half of the default run."""


class Train(Section):
    epochs: int = Field(1, ge=1)
    """Local epochs E per round.
    Default: the smaller E of the paper."""
    steps: int = Field(0, ge=0)
    """Local updates per round in place of train.epochs, over as many epochs as they take; 0 = by epochs.
    Default: the papers count epochs."""
    batch: int = Field(16, ge=2)
    """Batch size B.
    Default: a client has about 70 digits, five steps a round (papers: 64 to 512)."""
    accumulate: int = Field(1, ge=1)
    """Batches per update: their mean gradient is that of one large batch, apart from batch normalisation.
    Default: an update for every batch; more batches save memory where B does not fit."""
    optimiser: Annotated[Literal["sgd", "adam", "adamw"], BeforeValidator(_name)] = "sgd"
    """Optimiser of the clients; its state starts at zero in every client step. Adam wants smaller rates.
    Default: as in the papers; for adam and adamw try train.lr, lr_shared and lr_gate = 0.001."""
    lr: NotNegative = 0.05
    """Learning rate η_ω of the client's own model.
    Default: with 0.01, the papers' value for ten times the data, 40 rounds of five steps are too short."""
    lr_shared: NotNegative = 0.05
    """Learning rate η_θ of what is shared.
    Default: as train.lr."""
    lr_gate: NotNegative = 0.1
    """Learning rate η_φ of the gate (the paper's grid: 0.001, 0.01, 0.1, 1), and η_α of pfedafm's weights.
    Default: 0.01 was 4 points worse on the digits after 30 rounds."""
    warmup: int = Field(0, ge=0)
    """Rounds W in which the learning rates rise linearly, r / (W + 1) in round r; train.schedule follows.
    Default: as in the papers."""
    schedule: Annotated[
        Literal["constant", "cosine", "linear", "step", "exponential"], BeforeValidator(_name)
    ] = "constant"
    """How the learning rates fall over the rounds (cosine and linear end at 0, step and exponential do not).
    Default: as in the papers."""
    gamma: float = Field(0.99, gt=0, le=1)
    """`step` and `exponential`: factor on the learning rates, every train.step_size rounds or every round.
    Default: HtFLlib's and PFLlib's."""
    step_size: int = Field(10, ge=1)
    """`step`: rounds between two falls.
    Default: four stages in a default run."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """`sgd`: momentum; starts at zero in every client step.
    Default: as in the authors' released code."""
    betas: Betas = Field((0.9, 0.999), min_length=2, max_length=2)
    """`adam`, `adamw`: β1, β2, decay of the means of the gradient and of its square.
    Default: torch's."""
    eps: Positive = 1e-8
    """`adam`, `adamw`: ε, added to the root of the mean square.
    Default: torch's."""
    weight_decay: NotNegative = 0.001
    """Weight decay of parameters (never of buffers): L2 for sgd and adam, decoupled for adamw.
    Default: as in the authors' released code."""
    clip: NotNegative = 50.0
    """Largest joint norm of the gradient; 0 = no clipping.
    Default: as in the authors' released code."""
    augment: Changes = ()
    """Any of flip, erase, crop (random crop with padding 4), applied in this order on the device.
    Default: digits must not be flipped; the authors' released code has flip,erase,crop for CIFAR."""
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(_name)] = "fp32"
    """fp32 means no TF32; bf16 computes under autocast, vectors stay float32.
    Default: the same bits on any processor of a kind."""
    threads: Threads | Literal["auto"] = 1
    """CPU threads of every rank; auto = the smallest cores ÷ ranks over all hosts.
    Default: more ranks are faster than more threads."""
    device: Annotated[Literal["auto", "cpu", "cuda"], BeforeValidator(_name)] = "auto"
    """auto takes a GPU where one is visible.
    Default: a GPU is faster where there is one."""
    deterministic: bool = True
    """On a GPU: only kernels that give the same bits every time; a CPU's always do.
    Default: the same bits on any GPU of a kind."""
    graphs: Annotated[Literal["off", "on"], BeforeValidator(_name)] = "off"
    """On a GPU: record a training step once per architecture as a CUDA graph, and replay it.
    Default: it has not been seen to be faster yet."""
    samples_in: Annotated[Literal["auto", "gpu", "host"], BeforeValidator(_name)] = "auto"
    """Memory of the samples: the GPU's, or the host's, from where they come by batch; auto = as they fit.
    Default: a GPU's own memory is faster."""

    def updates(self, rows: int) -> int:
        """Return the number of updates in an epoch over `rows` samples (see `core.batches.epoch`)."""
        batches = max(1, rows // self.batch + (rows % self.batch > 1))
        return -(-batches // self.accumulate)

    def passes(self, rows: int) -> float:
        """Return how many epochs over `rows` samples a client step takes: `epochs`, or what `steps` make."""
        return self.steps / self.updates(rows) if self.steps else self.epochs


MOMENTS = {"none": 0, "momentum": 1, "adam": 2, "yogi": 2}  # vectors kept from round to round


class Server(Section):
    optimiser: Annotated[Literal["none", "momentum", "adam", "yogi"], BeforeValidator(_name)] = "none"
    """How the server follows the mean of its clients' parameters: all the way, or by an optimiser.
    Default: the mean itself, as in the papers of most methods."""
    lr: NotNegative = 0.0
    """Learning rate η of the server's optimiser; 0 chooses 1 for momentum and 0.01 for adam and yogi.
    Default: 1 is the mean itself where momentum is 0; 0.1 let fedavg with yogi diverge on the digits."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """`momentum`: β, kept from round to round.
    Default: as in Reddi et al."""
    betas: Betas = Field((0.9, 0.99), min_length=2, max_length=2)
    """`adam`, `yogi`: β1, β2, decay of the means of the update and of its square.
    Default: as in Reddi et al."""
    tau: Positive = 0.001
    """`adam`, `yogi`: τ, degree of adaptivity; added to the root of the mean square, which begins as τ.
    Default: as in Reddi et al."""

    @model_validator(mode="after")
    def _check(self) -> Server:
        unused = [name for name, f in type(self).model_fields.items() if getattr(self, name) != f.default]
        if self.optimiser == "none" and unused:
            problem = f"server.{unused[0]} has no effect with server.optimiser = none"
            raise ConfigError(problem, "add --server.optimiser momentum, adam or yogi")
        return self

    @property
    def rate(self) -> float:
        """The learning rate η."""
        return self.lr or (1.0 if self.optimiser == "momentum" else 0.01)

    @property
    def moments(self) -> int:
        """Number of vectors that the optimiser keeps from round to round."""
        return MOMENTS[self.optimiser]


class FaultSettings(Section):
    nonfinite: Annotated[Literal["drop", "stop"], BeforeValidator(_name)] = "drop"
    """A client whose vector is not finite is left out of the round, or ends the run.
    Default: one bad client of hundreds should not end a long run."""
    dropout: float = Field(0.0, ge=0, le=1)
    """Probability that a cohort member trains and is lost before the sum, drawn every round.
    Default: no client is lost unless you ask for it."""
    straggler: float = Field(0.0, ge=0, le=1)
    """Share of the clients that are slow, drawn once.
    Default: no client is slow unless you ask for it."""
    slowdown: float = Field(10.0, ge=1)
    """How many times as long a slow client takes, in simulated time.
    Default: far beyond the differences that the models cause by themselves."""
    deadline: NotNegative = 0.0
    """Members that take longer are left out of the sum: simulated time, 1 = the mean client; 0 = none.
    Default: a synchronous server waits for all."""


class Eval(Section):
    every: int = Field(1, ge=1)
    """Measure every this many rounds, and always in the last.
    Default: curves without gaps."""
    clients: NotNegative = 0.0
    """Clients measured in such a round, drawn anew, besides the cohort: below 1 a share of N; 0 = all.
    Default: means are over all clients, as in pFedMoE's paper."""
    last: Annotated[Literal["all", "drawn"], BeforeValidator(_name)] = "all"
    """Clients measured in the last round: all, or drawn as in the others.
    Default: the result of a run is over all clients."""
    batch: int = Field(512, ge=1)
    """Batch size of evaluations.
    Default: fills a core or a GPU without much memory."""


class Run(Section):
    dir: str = ""
    """Run folder; empty = runs/ALGORITHM-TIME.
    Default: no run overwrites another."""
    checkpoint_every: int = Field(10, ge=1)
    """Write a checkpoint every this many rounds, and after the first, the last and the best on validation.
    Default: writing takes a tenth of a second, a round takes seconds."""
    checkpoint_minutes: NotNegative = 5.0
    """Write one, too, after a round that ends this many minutes after the last one; 0 = by rounds alone.
    Default: a run that is killed loses minutes, however long its rounds are."""
    patience: int = Field(0, ge=0)
    """End after this many rounds without a better accuracy on validation rows; 0 trains all rounds.
    Default: the papers train a fixed number of rounds."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints to keep, beside best.h5 and the earlier files on which these rely.
    Default: one to fall back on; a complete one is as large as all models that have trained."""
    memory: NotNegative | Literal["auto"] = "auto"
    """Memory of each rank for its clients' vectors, in GB; the rest of them goes to run.scratch.
    Default: auto = half of a rank's share of what the job may still use on its host."""
    scratch: str = ""
    """Folder of a node's own disk for the vectors beyond run.memory, for this start; empty = the run folder.
    Default: the run folder has to have space for all clients' vectors anyway."""
    force: bool = False
    """Rename a run folder of this name; nothing is ever deleted.
    Default: nothing is overwritten."""
    timeout: NotNegative = 0.0
    """Seconds to wait for other ranks before the job ends; 0 = ten times the longest round, at least 600.
    Default: ten times the longest round, at least ten minutes."""
    walltime: NotNegative | Literal["auto"] = "auto"
    """Seconds after which the job must have ended; auto = Slurm's end time, if there is one; 0 = no limit.
    Default: a Slurm job has its own limit, any other job has none."""
    singleton: bool = False
    """Allow one rank where the launcher asked for more (each rank believes it is alone).
    Default: ranks that cannot see each other are a mistake."""
    code: str = ""
    """Folder in which restart and evaluate look for your own files by name, before their recorded place.
    Default: files stay where they were; RUN_DIR/code has a copy of each."""
    changed_code: bool = False
    """Continue although your own code changed since the checkpoint; the difference is printed.
    Default: a run is one program from its first round to its last."""
    tensorboard: bool = False
    """Write accuracy, loss, seconds and bytes of every round into RUN/tensorboard.
    Default: metrics.jsonl has everything, and the package tensorboard is an extra."""
    table: str = ""
    """The table of a paper that the run belongs to; written by `reproduce`, for reports.
    Default: the run belongs to no table."""
    cell: str = ""
    """Its cell of that table, COLUMN/ROW; written by `reproduce`.
    Default: the run belongs to no table."""
    scale: float = Field(1.0, gt=0)
    """Its rounds as a share of the table's; written by `reproduce`.
    Default: all rounds."""
    altered: Names = ()
    """Its settings that differ from the table's; written by `reproduce`.
    Default: the run belongs to no table."""
    forked: int = Field(0, ge=0)
    """How many of its rounds are another run's; written by `fork`. Default: none."""
