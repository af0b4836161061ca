"""The account of a run's differential privacy, of clients or of samples, and the forks that it refuses."""

from __future__ import annotations

from typing import Any, Protocol

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.sample_privacy import Account


class PrivacyAccount(Protocol):
    """ε after each round."""

    def entry(self, round: int) -> dict[str, Any]:
        """Return what a row says of privacy after a round; ε is null where it is infinite."""


def account_of(federation: Federation) -> PrivacyAccount | None:
    """Return the account of a federation, None without differential privacy."""
    return Account(federation) if federation.engine.samples else federation.private


def check_fork(federation: Federation) -> None:
    """Refuse a fork with noise, which has the addresses of its run's noise: from both together, the noise of
    a round can be taken off. Without noise its ε is infinite, and its rows say so.

    Raises:
        ConfigError: names the setting that ends the noise.
    """
    privacy = federation.config.privacy
    for name, value in (("noise", privacy.noise), ("epsilon", privacy.epsilon)):
        if value:
            raise ConfigError(
                f"privacy.{name} = {value:g}, but a fork adds the noise of its run once more, and ε does not "
                "cover what both show together",
                f"start a new run with another --seed, or fork with --privacy.{name} 0",
            )
