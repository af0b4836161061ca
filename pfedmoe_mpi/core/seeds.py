"""Random generators by address.

Every generator is seeded by BLAKE2 of the packed address `(seed, purpose, round, client)`. So no generator
state is ever saved, a client's result does not depend on the clients trained before it, and a restart repeats
exactly.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SERVER = -1  # the client number of draws that belong to no client


def address(seed: int, purpose: str, round: int = 0, client: int = SERVER) -> int:
    """Return a 63-bit number from the address, the same on every machine."""
    return int.from_bytes(key(seed, purpose, round, client, 8), "little") >> 1


def key(seed: int, purpose: str, round: int = 0, client: int = SERVER, length: int = 32) -> bytes:
    """Return bytes of the address, at most 64, the same on every machine."""
    packed = struct.pack("<qqq", seed, round, client) + purpose.encode()
    return blake2b(packed, digest_size=length).digest()


def numpy_generator(seed: int, purpose: str, round: int = 0, client: int = SERVER) -> np.random.Generator:
    """Return a numpy generator of the address, for draws about data and cohorts."""
    return np.random.Generator(np.random.PCG64(address(seed, purpose, round, client)))


def torch_generator(seed: int, purpose: str, round: int = 0, client: int = SERVER) -> torch.Generator:
    """Return a torch generator on the CPU, so that a draw is the same for every device that uses it."""
    import torch

    generator = torch.Generator()
    generator.manual_seed(address(seed, purpose, round, client))
    return generator


def seed_global(seed: int, purpose: str, round: int = 0, client: int = SERVER) -> None:
    """Seed the global generators from the address, for initialisation and dropout."""
    from pfedmoe_mpi.models import generators  # imports torch

    generators.seed(address(seed, purpose, round, client))
