"""What the plan and the end of a run say of differential privacy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pfedmoe_mpi.federation.privacy_account import account_of
from pfedmoe_mpi.privacy import accountant

if TYPE_CHECKING:
    from pfedmoe_mpi.config.privacy_settings import PrivacySettings
    from pfedmoe_mpi.federation.federation import Federation

MUCH = 100.0  # noise, in multiples of the clip


def plan(federation: Federation) -> Iterator[str]:
    """Yield ε after all rounds, and what takes the protection away or leaves nothing to learn."""
    settings, account = federation.config, account_of(federation)
    if account is None:
        return
    entry = account.entry(settings.rounds)
    yield line(entry, settings.rounds)
    if not entry["noise"]:
        return
    yield from _unusual_noise(settings.privacy, entry["noise"])
    yield "warning: whoever knows the seed can draw the noise again: keep it secret for ε to hold"
    if federation.task.vocabulary:
        yield "warning: the vocabulary comes from the training texts without noise, and ε does not cover it"
    if entry["unit"] == "client" and entry["delta"] * settings.clients >= 1:
        yield (
            f"warning: privacy.delta = {entry['delta']:g} is not below 1 / clients = "
            f"{1 / settings.clients:g}, so it would allow to publish all data of a client"
        )


def _unusual_noise(privacy: PrivacySettings, noise: float) -> Iterator[str]:
    """Yield a warning if noise is far from what is usual."""
    asked = f"privacy.epsilon = {privacy.epsilon:g}"
    times = f"{noise:.3g} times the clip"
    usual = f"usual is {'--privacy.epsilon 8' if privacy.epsilon else '--privacy.noise 1'}"
    if noise > MUCH:
        what = f"{asked} needs noise {times}" if privacy.epsilon else f"the noise is {times}"
        yield f"warning: {what}, which may hide all that clients learn; {usual}"
    if privacy.epsilon and noise <= accountant.LEAST:
        yield f"warning: {asked} protects nothing: the least noise, {times}, has a lower ε; {usual}"


def line(entry: Mapping[str, Any], round: int) -> str:
    """Return a line on a row's entry `privacy`."""
    unit = "one client" if entry["unit"] == "client" else "one sample of a client"
    if not entry["noise"]:
        return f"privacy: {unit}: clips, without noise: no ε"
    epsilon, private = (
        "infinite" if entry.get(name) is None else f"{entry[name]:.3g}"
        for name in ("epsilon", "epsilon_private")
    )
    of = "all that the server sends"
    if entry["unit"] == "sample":
        of = f"what a client sends, {private} of its whole model"
    return (
        f"privacy: {unit}, noise {entry['noise']:.4g} times the clip: after round {round} "
        f"ε = {epsilon} of {of}, at δ = {entry['delta']:g}"
    )
