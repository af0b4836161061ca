"""The section `privacy` of the configuration: masked sums and differential privacy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pfedmoe_mpi.config.sections import LowerCase, NotNegative, Section
from pfedmoe_mpi.errors import ConfigError


class PrivacySettings(Section):
    masked: bool = False
    """Add pairwise masks to every contribution, which cancel in the sum.
    Default: the sum has the same bits without them, and takes less time."""
    neighbours: int = Field(0, ge=0)
    """Members of the cohort with which each member shares masks; 0 = all.
    Default: as Bonawitz et al. 2017; the sparse graph of Bell et al. 2020 pays from some hundred members."""
    unit: Annotated[Literal["client", "sample"], LowerCase] = "client"
    """What differential privacy protects: all data of a client, or one sample of a client.
    Default: a contribution is what leaves a client."""
    clip: NotNegative = 0.0
    """C, largest L2 norm of a client's whole update, or of a sample's gradient; 0 = no limit.
    Default: no method of the papers limits it."""
    noise: NotNegative = 0.0
    """z, standard deviation of the noise in a sum, in multiples of `privacy.clip`; 0 = no noise.
    Default: no method of the papers adds any."""
    epsilon: NotNegative = 0.0
    """Choose `privacy.noise` so that the whole run has at most this ε at `privacy.delta`; 0 = as given.
    Default: the noise is as given."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """δ at which ε is computed.
    Default: usual in the literature; it should be below 1 / N."""
    sampling: Annotated[Literal["fixed", "poisson"], LowerCase] = "fixed"
    """How cohorts (unit = sample: batches) are drawn: a fixed number, or each member independently.
    Default: as in the papers; amplification by subsampling is accounted for independent draws alone."""

    @model_validator(mode="after")
    def _check(self) -> PrivacySettings:
        if self.unit == "sample" and not self.clip:
            problem = "privacy.unit = sample has no effect with privacy.clip = 0"
            raise ConfigError(problem, "--privacy.clip 1, or remove --privacy.unit")
        for name, value in (("noise", self.noise), ("epsilon", self.epsilon)):
            if value and not self.clip:
                problem = f"privacy.{name} = {value:g} needs a privacy.clip: noise is a multiple of it"
                raise ConfigError(problem, f"--privacy.clip 1, or remove --privacy.{name}")
        if self.epsilon and self.noise:
            problem = f"privacy.noise = {self.noise:g}, but privacy.epsilon = {self.epsilon:g} chooses it"
            raise ConfigError(problem, "remove --privacy.noise or --privacy.epsilon")
        return self

    @property
    def clips_clients(self) -> bool:
        """Whether every client's update is clipped."""
        return self.unit == "client" and self.clip > 0

    @property
    def unprotected(self) -> PrivacySettings:
        """The settings that draw the same cohorts, without masks, clip and noise."""
        return PrivacySettings(sampling="poisson" if self.draws_clients else "fixed")

    @property
    def draws_clients(self) -> bool:
        """Whether every client is drawn into a cohort independently."""
        return self.unit == "client" and self.sampling == "poisson"
