"""What a client sends, and the mean that the server gets of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pfedmoe_mpi.core.fixedpoint import SCALE


@dataclass(frozen=True)
class Block:
    """One entry of the payload: `rows` vectors of `size` numbers, each averaged over the cohort.

    The weight of client k in row c is n_k, its training samples (`samples`); 1 (`one`); n_kc, its training
    samples of class c (`class_samples`); or 1 if n_kc > 0, else 0 (`class_one`). A slot carries the float32
    bit patterns of every member's (rows, size) exactly: a gather instead of a mean.
    """

    size: int
    rows: int = 1
    weight: Literal["samples", "one", "class_samples", "class_one"] = "samples"
    scale: int = SCALE  # bits after the binary point in the integer sum
    slot: bool = False
    update: bool = False  # the values are a change of the state's part of this name


@dataclass(frozen=True)
class Mean:
    """The weighted mean of a block. For a slot, both tensors have a leading axis of cohort members."""

    value: Tensor  # float32 (rows, size) on the CPU; NaN in a row of weight 0
    weight: Tensor  # int64 (rows,), the sum of the members' weights; with noise float64, the expected one
