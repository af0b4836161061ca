"""The section `partition` of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pfedmoe_mpi.config.sections import LowerCase, Positive, Section
from pfedmoe_mpi.errors import ConfigError

# Settings of kinds that are drawn.
DRAWN = ("classes", "classes_min", "alpha", "balance", "shards", "tries")


class PartitionSettings(Section):
    kind: Annotated[
        Literal[
            "iid",
            "pathological",
            "dirichlet",
            "dirichlet_class",
            "quantity",
            "shards",
            "classes",
            "natural",
            "file",
        ],
        LowerCase,
    ] = "dirichlet"
    """How samples are divided among clients; data that name their clients propose natural.
    Default: every client sees most classes, in different proportions."""
    file: str = ""
    """A split that lists every client's rows: an HDF5 file of `data partition`, or JSON of other programs.
    Default: the split is drawn from the seed."""
    classes: int = Field(2, ge=1)
    """`pathological`: classes per client; `classes`: the most a client may draw.
    Default: the papers' pathological CIFAR-10."""
    classes_min: int = Field(1, ge=1)
    """`classes`: the fewest classes a client may draw.
    Default: clients of one class are the hardest case."""
    alpha: Positive = 1.0
    """Concentration of the Dirichlet draws: of each client's classes (`dirichlet`), of each class's clients
    (`dirichlet_class`), of the clients' sizes (`quantity`); the smaller, the more clients differ.
    Default: clients differ, and none is left with one class."""
    balance: bool = True
    """`dirichlet_class`: a client that has its equal share of all samples gets none of the classes that
    follow; false: sizes differ more, as in FL-bench.
    Default: as in PFLlib, HtFLlib and NIID-Bench."""
    shards: int = Field(2, ge=1)
    """`shards`: how many pieces of the samples sorted by class a client gets.
    Default: as McMahan et al. (2017)."""
    noise: float = Field(0.0, ge=0, le=1000)
    """Feature skew, with any kind: Gaussian noise of std σ · k / N on the samples of client k of N, as in
    NIID-Bench; of images in units of their range 0 to 1, of features in units of their std.
    Default: clients differ in labels only."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of a client's samples held out as its test set, unless `partition.file` lists test samples.
    Default: the papers' 8 : 2."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of a client's training samples held out to choose `best.h5`.
    Default: the papers hold none out."""
    min_samples: int = Field(10, ge=2)
    """The fewest samples a client may have.
    Default: with fewer, accuracy on the test share means little."""
    pool: Annotated[Literal["all", "official"], LowerCase] = "all"
    """`all` divides training and test images together; `official` keeps the data's own test images as test.
    Default: the papers divide 8 : 2 within each client."""
    tries: int = Field(100, ge=1, le=100_000)
    """Draws before giving up on `min_samples`.
    Default: a partition that fails this often cannot be drawn."""

    @model_validator(mode="before")
    @classmethod
    def _choose_file(cls, values: Any) -> Any:
        """Let a file decide the kind if none is given."""
        named = isinstance(values, dict) and values.get("file") and "kind" not in values
        return {**values, "kind": "file"} if named else values

    @model_validator(mode="after")
    def _check(self) -> PartitionSettings:
        if self.kind == "file" and not self.file:
            raise ConfigError(
                "partition.kind = file reads a split, and partition.file is empty",
                "--partition.file SPLIT.h5",
            )
        if self.kind != "file" and self.file:
            problem = f"partition.file = {self.file} has no effect with partition.kind = {self.kind}"
            raise ConfigError(problem, "remove --partition.kind, or --partition.file")
        for name in DRAWN if self.file else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                problem = f"partition.{name} = {getattr(self, name)} has no effect with partition.file"
                raise ConfigError(problem, f"remove --partition.{name}")
        return self
