"""The account of a run's differential privacy, of clients or of samples."""

from __future__ import annotations

from typing import Any, Protocol

from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.federation.sample_privacy import Account


class PrivacyAccount(Protocol):
    """ε after each round."""

    def entry(self, round: int) -> dict[str, Any]:
        """Return what a row says of privacy after a round; ε is null where it is infinite."""


def account_of(federation: Federation) -> PrivacyAccount | None:
    """Return the account of a federation, None without differential privacy."""
    return Account(federation) if federation.engine.samples else federation.private
