"""The global generators of torch, numpy and Python, from which modules draw initial values and dropout.

This program's own modules draw from torch's; numpy's and Python's are only for the user's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed all of them from a number of up to 63 bits.

    `torch.manual_seed` would also queue a seed, with a stack trace, for a CUDA that is not in use: 2 ms each.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
    random.seed(number)
    np.random.seed((number & 0xFFFFFFFF, number >> 32))


@contextmanager
def kept() -> Iterator[None]:
    """Restore those on the CPU at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
