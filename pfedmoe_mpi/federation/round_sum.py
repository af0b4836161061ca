"""The sum of a round: flags, metric slots and the payload's blocks in one int64 buffer, one reduction.

Every rank sends a buffer of the same length in every round, zeros if it trained no member. Position 0 counts
the ranks that were asked to stop; then one flag per cohort member, so that all ranks read from the result
whether to update or to save; then the members' metrics as float64 bits; then the blocks. Blocks may be masked
(`masked_round.py`); flags and metrics are the simulation's own and never are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Block, Mean, Task
from pfedmoe_mpi.config import methods
from pfedmoe_mpi.config.methods import MethodError
from pfedmoe_mpi.core import fixedpoint
from pfedmoe_mpi.privacy.client_release import ClientRelease

# Not trained yet; in the sum; left out: not finite, lost on the way, after the deadline.
MISSING, IN, DROPPED, LOST, LATE = range(5)
MEMBER_METRICS = ("train_loss", "accuracy_before", "bytes_up", "bytes_down")


class Masks(Protocol):
    """What hides the contributions of a round from all but their clients."""

    @property
    def costs(self) -> Mapping[str, object]:
        """What a row says of them."""

    def add(self, client: int, contribution: np.ndarray) -> None:
        """Add a member's masks to its contribution, uint64 (numbers,), in place, modulo 2^64."""


def check_cohort(task: Task, cohort: Sequence[tuple[int, str]]) -> None:
    """Raise MethodError unless a cohort is of clients that train, ascending."""
    members = [client for client, _ in cohort]
    if members != sorted({k for k in members if 0 <= k < task.clients} - task.unseen):
        shown = ", ".join(map(str, members[:10])) + (", …" if len(members) > 10 else "")
        reason = f"cohort: {shown} are not clients that train, each once, in ascending order"
        raise MethodError.at(methods.path(task.config.algorithm), None, reason)


class RoundSum:
    """The sum of one round over `cohort`, a list of (client, role)."""

    def __init__(
        self,
        task: Task,
        cohort: Sequence[tuple[int, str]],
        payload: Mapping[str, Block],
        release: ClientRelease | None = None,
    ) -> None:
        """Begin a sum without members; `release`: of clipped updates, with noise.

        Raises:
            MethodError: as `check_cohort`.
        """
        check_cohort(task, cohort)
        self._task = task
        self._release = release
        self.cohort = list(cohort)
        self.payload = payload
        number = len(self.cohort)
        self._metrics = slice(1 + number, 1 + number * (1 + len(MEMBER_METRICS)))
        self._places: dict[str, slice] = {}
        at = self._metrics.stop
        for name, block in payload.items():
            length = block.rows * (1 + block.size) * (number if block.slot else 1)
            self._places[name] = slice(at, at + length)
            at += length
        self.buffer = np.zeros(at, np.int64)
        self.masks: Masks | None = None
        self.unmasked: np.ndarray | None = None  # the blocks of a masked sum once it was opened

    @property
    def flags(self) -> np.ndarray:
        """MISSING, IN, DROPPED, LOST or LATE, (members,)."""
        return self.buffer[1 : 1 + len(self.cohort)]

    @property
    def stopped(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self.buffer[0])

    @property
    def blocks(self) -> np.ndarray:
        """A view of the blocks, int64 (numbers,)."""
        return self.buffer[self._metrics.stop :]

    @property
    def sent(self) -> np.ndarray:
        """The buffer as it is summed: modulo 2^64 if it is masked, so that no signed number overflows."""
        return self.buffer if self.masks is None else self.buffer.view(np.uint64)

    def request_stop(self) -> None:
        """Record that this rank was asked to stop."""
        self.buffer[0] = 1

    @property
    def empty(self) -> bool:
        """Whether the means are of nothing: no member is in the sum, and there is no noise."""
        return not self.clients(IN) and self._release is None

    def clients(self, *flags: int) -> list[int]:
        """Return the members with one of the flags."""
        return [client for (client, _), flag in zip(self.cohort, self.flags, strict=True) if flag in flags]

    def metrics(self) -> np.ndarray:
        """Return a view of the metrics, float64 (members, len(MEMBER_METRICS)); NaN: not measured."""
        return self.buffer[self._metrics].view(np.float64).reshape(len(self.cohort), len(MEMBER_METRICS))

    def add(self, position: int, values: Mapping[str, Tensor], metrics: Mapping[str, float]) -> None:
        """Add one member's contribution.

        Args:
            position: of the member in the cohort.
            values: (rows, size) or any shape of as many numbers, by block.
            metrics: MEMBER_METRICS; `bytes_up` may be missing: then it is the payload's float32 bytes.

        Raises:
            NotFiniteError: a value is NaN, infinite or out of range where its weight is positive.
        """
        assert set(values) <= set(self.payload), f"{set(values) - set(self.payload)} not declared in payload"
        client = self.cohort[position][0]
        if self._release:
            pieces = self._release.encode(values)
        else:
            pieces = {name: self._encode(name, client, value) for name, value in values.items()}
        sent = 0
        for name, (weight, numbers) in pieces.items():
            stretch = self._stretch(name, position)
            stretch[:] += np.concatenate([weight, numbers.ravel()])  # numpy wraps, as the masks need it
            sent += 4 * int((weight > 0).sum()) * self.payload[name].size
        if self.masks:
            self.masks.add(client, self.blocks.view(np.uint64))
        complete = {"bytes_up": sent, **metrics}
        self.metrics()[position] = [complete[name] for name in MEMBER_METRICS]
        self.flags[position] = IN

    def leave_out(self, position: int, why: int) -> None:
        """Flag a member that has trained but is not in the sum: DROPPED, LOST or LATE."""
        self.metrics()[position] = np.nan
        self.flags[position] = why

    def forget(self, why: int) -> None:
        """Flag the members left out for this reason as MISSING, so that they train again after a restart."""
        members = self.flags == why
        self.metrics()[members] = 0.0
        self.flags[members] = MISSING

    def _encode(self, name: str, client: int, value: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return a value's weights (rows,) and integers (rows, size): float32 bits or fixed point.

        Raises:
            NotFiniteError: as `add`.
        """
        block = self.payload[name]
        if value.numel() != block.rows * block.size:
            declared = f"payload declares {block.rows} × {block.size}"
            raise ValueError(f"client_step sends {value.numel()} numbers as '{name}', and {declared}")
        value = value.detach().cpu().float().reshape(block.rows, block.size)
        weight = self._task.weight(block.weight, client)
        if block.slot:
            if not bool(value[weight > 0].isfinite().all()):
                raise fixedpoint.NotFiniteError("a value is not finite")
            return weight.numpy(), value.contiguous().view(torch.int32).to(torch.int64).numpy()
        total = self._task.total_weight(block.weight, self.cohort)
        return weight.numpy(), fixedpoint.encode(value, weight, total, block.scale).numpy()

    def _stretch(self, name: str, position: int) -> np.ndarray:
        """Return a view of the block's numbers: the member's own in a slot, else those of all members."""
        block, place = self.payload[name], self.buffer[self._places[name]]
        length = block.rows * (1 + block.size)
        return place[position * length : (position + 1) * length] if block.slot else place

    def means(self) -> dict[str, Mean]:
        """Return every block's mean after the reduction."""
        return {name: self._mean(name, block) for name, block in self.payload.items()}

    def _mean(self, name: str, block: Block) -> Mean:
        assert self.masks is None or self.unmasked is not None, "a masked sum is opened first"
        place, start = self._places[name], self._metrics.stop
        blocks = self.blocks if self.unmasked is None else self.unmasked
        numbers = torch.from_numpy(blocks[place.start - start : place.stop - start])
        if block.slot:
            by_member = numbers.view(len(self.cohort), block.rows * (1 + block.size))
            value = by_member[:, block.rows :].to(torch.int32).view(torch.float32)
            value = value.reshape(len(self.cohort), block.rows, block.size)
            return Mean(value, by_member[:, : block.rows].clone())
        weight, value = numbers[: block.rows], numbers[block.rows :].view(block.rows, block.size)
        if self._release:
            return self._release.mean(name, value)
        total = self._task.total_weight(block.weight, self.cohort)
        return Mean(fixedpoint.decode(value, weight, total, block.scale), weight.clone())
