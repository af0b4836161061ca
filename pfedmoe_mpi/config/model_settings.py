"""The section `model`: architectures, the weights that they begin with, and what of them is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pfedmoe_mpi.config.sections import LowerCase, Name, Names, Positive, Section, Texts
from pfedmoe_mpi.models import names


class ModelSettings(Section):
    pool: Names = Field(("auto",), min_length=1)
    """Architectures, or classes of your own as FILE.py:NAME; client k takes number k mod length; auto =
    different ones if the method allows.
    Default: cnn1 to cnn5, client k takes number k mod 5 (the papers' different models), or a family like
    it for features and texts; one architecture where the method needs equal models."""
    shared: Name = "auto"
    """Architecture of the shared model or extractor; auto = the smallest of the family (texts: fasttext).
    Default: cnn5, the paper's choice; mlp5 for features, fasttext for texts."""
    dim: int = Field(0, ge=0, le=1_000_000_000)
    """Length d of a representation, the same everywhere; 0 = what the models define (CNN 500, text 64).
    Default: 500 by the papers' table; 50 for the MNIST family; 64 for texts, as wide as their embeddings."""
    stem: Annotated[Literal["small", "imagenet"], LowerCase] = "small"
    """First layers of torchvision's ResNets: `small` for 32-pixel images, `imagenet` as published.
    Default: 32-pixel images lose too much in ImageNet's first layers."""
    start: Annotated[Literal["own", "architecture", "one"], LowerCase] = "own"
    """First values of the clients' private parts: own = every client draws; architecture = equal for clients
    of one architecture, as in HtFLlib; one = besides, one head for all models whose heads agree in shape.
    Default: clients that have never met do not agree on a draw."""
    weights: Texts = ()
    """Files of weights in place of the initial draw: FILE for all architectures, or NAME=FILE,NAME=FILE.
    Default: the papers draw them, except FedJETs."""
    train: str = Field("all", min_length=1)
    """What of an extractor is trained: all, head (its last layer), norm, lora, or a pattern of its names.
    Default: the papers train all; the rest is kept once for all clients."""
    lora_rank: int = Field(4, ge=1, le=4096)
    """`lora`: rank r of the change of every linear layer.
    Default: the paper's tables vary little between 1 and 8."""
    lora_alpha: Positive = 4.0
    """`lora`: the change is scaled by α / r.
    Default: as the rank, as in the paper, so that the scale is 1."""
    keep_outputs: bool = True
    """Compute the outputs of frozen layers once per client, where nothing before them is trained.
    Default: faster by the share of the frozen layers; false computes them in every epoch and evaluation."""

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        named = [names.resolve_name(name) for name in (*self.pool, self.shared) if name != "auto"]
        names.resolve_dim(named, self.dim)
        return self
