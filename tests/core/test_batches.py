"""Batches: the same numbers in the same memory order for any input; augmentation against plain loops."""

from __future__ import annotations

import math
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedmoe_mpi.core import augment, batches
from pfedmoe_mpi.core.batches import Normalise, Split, channels_last

CPU = torch.device("cpu")
PLAIN = Normalise((), (), 3, CPU)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split_of(n: int, shape: tuple[int, ...] = (3,)) -> Split:
    x = torch.rand((n, *shape), generator=generator(1))
    return Split(x, torch.arange(n))


# Which samples


@pytest.mark.parametrize(
    ("n", "size", "lengths"),
    [
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),
        (8, 4, [4, 4]),
        (1, 4, [1]),
        (5, 4, [5]),
        (3, 4, [3]),
        (3, 1, [1, 2]),
        (2, 1, [2]),
    ],
)
def test_last_batch_of_one_joins_the_previous_batch(n: int, size: int, lengths: list[int]) -> None:
    split = split_of(n)
    found = list(batches.epoch(split, size, PLAIN, (), generator()))
    assert [len(batch) for batch in found] == lengths
    rows = torch.cat([batch.rows for batch in found])
    assert sorted(rows.tolist()) == list(range(n))
    for batch in found:
        assert torch.equal(batch.y, split.y[batch.rows]) and torch.equal(batch.x, split.x[batch.rows])


def test_every_epoch_has_its_own_repeatable_order() -> None:
    split, draws = split_of(50), generator(3)
    first, second = ([b.rows for b in batches.epoch(split, 16, PLAIN, (), draws)] for _ in range(2))
    again = [b.rows for b in batches.epoch(split, 16, PLAIN, (), generator(3))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0]) and torch.cat(first).tolist() != list(range(50))


def test_evaluation_reads_a_split_once_in_order() -> None:
    split = split_of(10)
    found = list(batches.batches(split, 4, PLAIN))
    assert [batch.rows.tolist() for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(torch.cat([batch.x for batch in found]), split.x)
    assert list(batches.batches(split_of(0), 4, PLAIN)) == []


# Numbers and memory


def test_bytes_are_normalised() -> None:
    raw = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    assert PLAIN(raw).flatten().tolist() == pytest.approx([0.0, 1.0, 0.2, 0.4])
    normalise = Normalise((0.5, 0.1), (0.25, 2.0), 3, CPU)
    assert normalise(raw).flatten().tolist() == pytest.approx([-2.0, 2.0, 0.05, 0.15])
    assert normalise(raw).dtype == torch.float32 and raw.tolist() == [[[[0, 255]], [[51, 102]]]]
    features = Normalise((1.0, 2.0), (2.0, 4.0), 1, CPU)(torch.tensor([[3.0, 4.0]]))
    assert features.tolist() == [[1.0, 0.5]]


def strided(x: Tensor) -> list[Tensor]:
    """Return the same numbers in other memory orders and at other offsets."""
    wide = torch.zeros((*x.shape[:-1], x.shape[-1] * 2), dtype=x.dtype)
    wide[..., ::2] = x
    shifted = torch.zeros(x.numel() + 3, dtype=x.dtype)[3:].view(x.shape).copy_(x)
    result = [x.clone(), wide[..., ::2], shifted]
    if x.ndim == 4:
        result += [
            x.contiguous(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ]
        if x.shape[1] == 1:
            _, _, high, wide_ = x.shape
            result.append(x.clone().as_strided(x.shape, (high * wide_, 1, wide_, 1)))
            result.append(x.clone().as_strided(x.shape, (high * wide_, 12345, wide_, 1)))
    return result


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 1, 9), (4, 1, 1), (1, 1, 1), (13,), (5, 7)])
@pytest.mark.parametrize("augment", [(), ("flip", "crop", "erase")])
def test_batches_do_not_depend_on_memory_layout(
    shape: tuple[int, ...], kind: str, augment: tuple[str, ...]
) -> None:
    x = torch.randint(0, 255, (11, *shape), generator=generator(2)).to(getattr(torch, kind))
    y = torch.arange(11)
    for normalise in (PLAIN, Normalise((0.5,) * shape[0], (0.3,) * shape[0], len(shape), CPU)):
        wanted: list[Tensor] = []
        for form in strided(x):
            split = Split(form, y)
            found = [b.x for b in batches.batches(split, 4, normalise)]
            found += [b.x for b in batches.epoch(split, 4, normalise, augment, generator(5))]
            wanted = wanted or found
            for got, want in zip(found, wanted, strict=True):
                assert torch.equal(got, want) and got.stride() == want.stride()
                assert got.data_ptr() % 64 == 0, "a kernel's rounding may depend on alignment"
                assert got.untyped_storage().data_ptr() != form.untyped_storage().data_ptr()
                if len(shape) == 3:
                    c, h, w = shape
                    assert got.stride() == (c * h * w, 1, c * w, c)
                else:
                    assert got.is_contiguous()


def test_one_channel_convolution_ignores_strides() -> None:
    x = torch.rand((6, 1, 12, 12), generator=generator(4))
    weight = torch.rand((8, 1, 5, 5), generator=generator(5))
    results = [F.conv2d(PLAIN(form), weight) for form in strided(x)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_channels_last_changes_strides_only() -> None:
    for shape in [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 1), (0, 3, 4, 5), (1, 1, 1, 7)]:
        x = torch.rand(shape)
        assert torch.equal(channels_last(x), x)
        assert channels_last(x).stride() == (math.prod(shape[1:]), 1, shape[3] * shape[1], shape[1])
        shifted = torch.rand((shape[0] + 1, *shape[1:]))[1:]
        assert torch.equal(channels_last(shifted), shifted), "a slice keeps its place in the storage"
    assert channels_last(torch.rand(3, 4)).stride() == (4, 1)


# Augmentation


def augment_images(x: Tensor, names: tuple[str, ...], draws: torch.Generator) -> Tensor:
    places = augment.draw(x.shape[1:], torch.rand((len(x), augment.DRAWS), generator=draws))
    return augment.apply(x, names, places)


def images(n: int, channels: int = 2, high: int = 12, wide: int = 10) -> Tensor:
    """Return images without a zero pixel or two equal pixels."""
    return 1 + torch.arange(n * channels * high * wide, dtype=torch.float32).view(n, channels, high, wide)


def augmented_pixel_by_pixel(x: Tensor, names: tuple[str, ...], draws: np.ndarray) -> np.ndarray:
    """Flip, erase and crop every image pixel by pixel."""
    out = x.numpy().copy()
    n, _, high, wide = out.shape
    for k in range(n):
        d = draws[k]
        image = out[k].copy()
        if "flip" in names and d[0] < 0.5:
            image = image[:, :, ::-1].copy()
        if "erase" in names and d[1] < 0.5:
            area, ratio = (0.04 + 0.16 * d[2]) * high * wide, 0.5 * 4.0 ** d[3]
            tall = min(max(round(math.sqrt(area * ratio)), 1), high)
            broad = min(max(round(math.sqrt(area / ratio)), 1), wide)
            top, left = math.floor(d[4] * (high - tall + 1)), math.floor(d[5] * (wide - broad + 1))
            image[:, top : top + tall, left : left + broad] = 0
        if "crop" in names:
            top, left = int(d[6] * 9), int(d[7] * 9)
            window = np.zeros_like(image)
            for row in range(high):
                for column in range(wide):
                    r, c = row + top - 4, column + left - 4
                    if 0 <= r < high and 0 <= c < wide:
                        window[:, row, column] = image[:, r, c]
            image = window
        out[k] = image
    return out


@pytest.mark.parametrize(
    "names", [("flip",), ("erase",), ("crop",), ("crop", "flip"), ("erase", "crop", "flip")], ids="+".join
)
def test_augmentation_equals_plain_loops(names: tuple[str, ...]) -> None:
    x = images(60)
    got = augment_images(x.clone(), names, generator(9))
    draws = torch.rand((60, 8), generator=generator(9)).double().numpy()
    assert np.array_equal(got.numpy(), augmented_pixel_by_pixel(x, names, draws))
    assert torch.equal(augment_images(x.clone(), tuple(reversed(names)), generator(9)), got), (
        "the order is fixed"
    )
    assert not torch.equal(augment_images(x.clone(), names, generator(10)), got)


def test_augmentation_has_the_stated_frequency_and_size() -> None:
    x = torch.ones((4000, 1, 32, 32))
    x[:, :, :, :16] = 2
    flipped = augment_images(x, ("flip",), generator())[:, 0, 0, 0] == 1
    assert 0.47 < float(flipped.double().mean()) < 0.53
    gone = (augment_images(x, ("erase",), generator()) == 0).sum(dim=(1, 2, 3)).double() / 1024
    hit = gone > 0
    assert 0.47 < float(hit.double().mean()) < 0.53
    assert 0.035 < float(gone[hit].min()) < 0.05 and 0.18 < float(gone[hit].max()) < 0.22
    assert abs(float(gone[hit].mean()) - 0.12) < 0.005
    erased = augment_images(torch.ones((4000, 1, 32, 32)), ("erase",), generator())[:, 0] == 0
    everywhere = erased.double().mean(dim=0)
    assert float(everywhere.min()) > 0, "corners are reached"
    cropped = augment_images(torch.ones((4000, 1, 32, 32)), ("crop",), generator())[:, 0] == 1
    rows = cropped.any(dim=2).sum(dim=1)
    assert set(rows.tolist()) == {28, 29, 30, 31, 32}, "up to four rows of padding come in"


def test_image_smaller_than_the_rectangle_is_accepted() -> None:
    got = augment_images(images(200, 1, 1, 1), ("flip", "erase"), generator())
    assert got.shape == (200, 1, 1, 1) and float(got.abs().max()) > 0


def test_samples_that_are_not_images_are_not_augmented() -> None:
    split = split_of(6, (5,))
    (batch,) = batches.epoch(split, 10, PLAIN, ("flip", "crop", "erase"), generator())
    assert torch.equal(batch.x, split.x[batch.rows])


def test_augmentation_repeats_with_its_generator() -> None:
    split = Split(images(20), torch.arange(20))
    one, two = (
        [b.x for b in batches.epoch(split, 8, PLAIN, ("flip", "crop"), generator(1))] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(split.x, images(20)), "samples stay as they came"


@pytest.mark.parametrize("used", [1, 2, 4])
def test_an_epoch_draws_as_if_batch_by_batch(used: int) -> None:
    """One that ends early leaves the generator as its batches alone would have."""
    split, draws, expected = Split(images(28), torch.arange(28)), generator(7), generator(7)
    names = ("flip", "erase", "crop")
    rows = torch.randperm(28, generator=expected).split(8)
    with closing(batches.epoch(split, 8, PLAIN, names, draws)) as epoch:
        found = list(islice(epoch, used))
    for batch, chosen in zip(found, rows, strict=used == 4):
        assert torch.equal(batch.x, augment_images(split.x[chosen], names, expected))
    assert torch.equal(draws.get_state(), expected.get_state())
