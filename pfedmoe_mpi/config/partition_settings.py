"""The section `partition` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pfedmoe_mpi.config.sections import LowerCase, Positive, Section


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
        ],
        LowerCase,
    ] = "dirichlet"
    """How samples are divided among clients; data that name their clients propose natural.
    Default: every client sees most classes, in different proportions."""
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
    """Share of a client's samples held out as its test set.
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
