"""The sections `unseen` and `join` of the configuration: clients that never train, or not from the start."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pfedmoe_mpi.config.sections import LowerCase, NotNegative, Section


class Unseen(Section):
    clients: NotNegative = 0.0
    """Clients that never train, chosen by `unseen.by`: below 1 a share of N.
    Default: every client trains, as in pFedMoE's paper."""
    by: Annotated[Literal["labels", "client"], LowerCase] = "labels"
    """labels: clients with label combinations that no training client has; client: drawn from all clients.
    Default: as FedJETs' new clients; the data's own clients rarely differ in their sets of labels."""
    tune: int = Field(0, ge=0)
    """Epochs of tuning before a second measurement: of private modules, or of a copy of all without any
    (fedem: EM steps).
    Default: they are measured as they come."""
    shots: int = Field(10, ge=1)
    """`unseen.tune`: training samples of every class that they tune on.
    Default: between the 5 of few-shot benchmarks and all that a client has."""
    private: Annotated[Literal["none", "average"], LowerCase] = "none"
    """Private parts of these clients; average = the mean of what a method can average (pfedmoe).
    Default: no method sends more than its paper says."""


class Join(Section):
    share: float = Field(0.0, ge=0, lt=1)
    """Share of the training clients that join late, drawn once.
    Default: all clients train from the start."""
    round: int = Field(10, ge=1)
    """The first round in which they may train.
    Default: a quarter of the default run."""
