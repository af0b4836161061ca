"""Outputs of frozen layers are computed once per sample, wherever a tail is found, and change no result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pfedmoe_mpi.core import tail
from pfedmoe_mpi.core.batches import Normalise
from pfedmoe_mpi.core.kept import Kept
from pfedmoe_mpi.core.parts import Module, Spec
from pfedmoe_mpi.core.tail import Tail
from pfedmoe_mpi.federation import evaluation
from support.one_client import CPU, SPLIT, Player, Two, phase

ROWS: list[int] = []  # by call of a frozen layer


class Counted(nn.Module):
    """A frozen layer that notes how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        ROWS.append(len(x))
        y: Tensor = self.inner(x)
        return y


def frozen_body() -> nn.Module:
    return nn.Sequential(Counted(), nn.ReLU(), nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5)))


class Frozen(Two):
    def state(self) -> Spec:
        return {"shared": Module("body", frozen_body)}


def player(limit: int, keeps: bool = True) -> Player:
    made = Player(phase({"shared": 0.1, "own": 0.03}, epochs=3), method=Frozen)
    tails = {"body": Tail("2", 8)} if keeps else {}
    made.bench.kept = Kept(tails, Normalise((), (), 1, CPU), 4, lambda: None, limit)
    made.engine = replace(made.engine, kept=made.bench.kept)
    return made


@pytest.fixture(autouse=True)
def no_rows() -> None:
    ROWS.clear()


@pytest.mark.parametrize(("limit", "again"), [(1 << 20, 0), (0, 25)])
def test_rows_pass_frozen_layers_once(limit: int, again: int) -> None:
    """Beyond the limit they are computed once in every turn; the bits are the same."""
    expected = player(0, keeps=False)
    _, *without = expected.step()
    assert sum(ROWS) == 3 * 25
    ROWS.clear()
    one = player(limit)
    _, *found = one.step()
    assert ROWS == [4, 4, 4, 4, 4, 4, 1]
    for mine, other in zip(found, without, strict=True):
        torch.testing.assert_close(mine, other)
    _, *same = player(limit ^ (1 << 20)).step()
    assert all(map(torch.equal, found, same))
    other_split = replace(SPLIT)
    parts = one.turn().parts
    for split, computed in ((other_split, 25), (SPLIT, again), (SPLIT, 0)):
        ROWS.clear()
        measured = evaluation.measure(one.engine, one.method, parts, split)
        assert measured and measured.samples == 25 and sum(ROWS) == computed


def test_other_samples_are_computed() -> None:
    """A batch that was changed, by the method or by augmentation, is not the client's rows."""
    one = player(1 << 20)
    parts = one.turn().parts
    for batch in one.engine.batches(SPLIT):
        kept = parts.shared(batch.x)
        ROWS.clear()
        assert len(parts.shared(batch.x.clone())) == sum(ROWS)
        batch.x.add_(1)
        assert not torch.equal(parts.shared(batch.x), kept) and sum(ROWS) == 2 * len(kept)
    augmented = replace(one.engine, train=one.engine.train.model_copy(update={"augment": ("flip",)}))
    images = replace(SPLIT, x=SPLIT.x.view(25, 6, 1, 1))
    batch = next(augmented.epoch(images, torch.Generator()))
    ROWS.clear()
    parts.shared(batch.x.flatten(1))
    assert sum(ROWS) == len(batch.x)


class Skipping(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y + x.mean()


class Noisy(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + self.training * torch.rand(())
        y: Tensor = super().forward(x * scale)
        return y


def ice(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).requires_grad_(False)


FIRST = ice(nn.Linear(6, 8), nn.BatchNorm1d(8))
BATCH_ONLY = ice(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Sequential(FIRST, nn.ReLU(), nn.Linear(8, 5)), Tail("2", 8)),
        (nn.Sequential(FIRST, nn.Linear(8, 5), nn.ReLU()), Tail("1", 8, relu=True)),
        (nn.Sequential(FIRST, nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 5))), Tail("1", 8)),
        (nn.Sequential(FIRST, nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 5))), Tail("1", 8)),
        (FIRST, Tail(None, 8)),
        (nn.Sequential(FIRST, nn.Dropout(0.1), nn.Linear(8, 5)), None),
        (nn.Sequential(FIRST, nn.BatchNorm1d(8, affine=False), nn.Linear(8, 5)), None),
        (nn.Sequential(BATCH_ONLY, nn.Linear(8, 5)), None),
        (nn.Sequential(FIRST, nn.Linear(8, 5), nn.ReLU(inplace=True)), None),
        (nn.Sequential(nn.Linear(6, 8), ice(nn.Linear(8, 8)), nn.Linear(8, 5)), None),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), None),
        (Skipping(FIRST, nn.Linear(8, 5)), None),
        (Noisy(FIRST, nn.Linear(8, 5)), None),
    ],
    ids=lambda value: str(value)[:40].replace("\n", ""),
)
def test_tails(module: nn.Module, expected: Tail | None) -> None:
    assert tail.find(module, (6,)) == expected
