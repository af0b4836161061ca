"""The integer sum: exact in any order, within an ulp of the rational mean, an error outside its range."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from pfedmoe_mpi.algorithms.base import Block, Task
from pfedmoe_mpi.core import fixedpoint
from pfedmoe_mpi.core.fixedpoint import NotFiniteError, decode, encode
from pfedmoe_mpi.federation import gates, metrics, selection
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, MISSING, RoundSum

WEIGHTS = [37, 911, 5, 120, 64, 333, 1, 78, 250, 19]


def contributions(size: int, spread: float = 0.05) -> list[Tensor]:
    """Return ten clients' trained vectors: close to each other, as after one round."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(1, size, generator=generator) * spread
    return [base + 0.1 * spread * torch.randn(1, size, generator=generator) for _ in WEIGHTS]


def mean_of(values: list[Tensor], weights: list[int], total: int | None = None) -> Tensor:
    total = sum(weights) if total is None else total
    added = sum(encode(v, torch.tensor([w]), total) for v, w in zip(values, weights, strict=True))
    return decode(cast(Tensor, added), torch.tensor([sum(weights)]), total)


def exact(values: list[Tensor], weights: list[int], column: int) -> Fraction:
    numbers = [Fraction(float(v[0, column])) * w for v, w in zip(values, weights, strict=True)]
    return sum(numbers, Fraction(0)) / sum(weights)


def nearest(number: Fraction) -> np.float32:
    """Return the correctly rounded float32."""
    guess = np.float32(float(number))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda f: (abs(Fraction(float(f)) - number), int(f.view(np.uint32)) & 1))


def ulps(a: Tensor, b: Tensor) -> Tensor:
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs()


def test_sum_has_the_same_bits_in_any_split_and_order() -> None:
    values = contributions(1000)
    coded = [encode(v, torch.tensor([w]), sum(WEIGHTS)) for v, w in zip(values, WEIGHTS, strict=True)]
    expected = sum(coded)
    draw = np.random.default_rng(0)
    for _ in range(20):
        order = draw.permutation(len(coded))
        cuts = np.sort(draw.integers(0, len(coded) + 1, 3))
        zero = torch.zeros_like(coded[0])
        parts = [sum((coded[i] for i in part), zero) for part in np.split(order, cuts)]
        assert torch.equal(cast(Tensor, sum(parts, zero)), cast(Tensor, expected))
    floats = [v * (w / sum(WEIGHTS)) for v, w in zip(values, WEIGHTS, strict=True)]
    backwards = sum(reversed(floats))
    assert not torch.equal(cast(Tensor, sum(floats)), cast(Tensor, backwards)), "a float sum would not do"


@pytest.mark.parametrize("spread", [0.05, 1.0, 1000.0])
def test_mean_is_within_an_ulp_of_the_rational_mean(spread: float) -> None:
    values = contributions(400, spread)
    got = mean_of(values, WEIGHTS).squeeze(0)
    wanted = [exact(values, WEIGHTS, c) for c in range(400)]
    rounded = torch.from_numpy(np.array([nearest(w) for w in wanted]))
    # A number that all but cancels keeps the absolute precision of the point, 2^-40 per contribution.
    coarse = torch.tensor([abs(float(w)) < 2.0**-16 for w in wanted])
    assert int(ulps(got, rounded)[~coarse].max()) <= 1
    assert all(
        abs(Fraction(float(g)) - w) <= Fraction(12, 2**41) + abs(w) / 2**24
        for g, w in zip(got, wanted, strict=True)
    )


def test_integer_sum_is_closer_than_a_float32_sum() -> None:
    values = contributions(4000)
    rounded = torch.from_numpy(np.array([nearest(exact(values, WEIGHTS, c)) for c in range(4000)]))
    fixed = mean_of(values, WEIGHTS).squeeze(0)
    floats = sum(v * (w / sum(WEIGHTS)) for v, w in zip(values, WEIGHTS, strict=True))
    off = float((ulps(fixed, rounded) > 0).double().mean())
    off_float = float((ulps(cast(Tensor, floats).squeeze(0), rounded) > 0).double().mean())
    assert off < 0.01
    assert off_float > 0.2


def test_mean_of_one_or_equal_contributions_is_exact() -> None:
    value = torch.tensor([[1.0, -0.3, 0.1, 3.25e-3, -7e4]])
    coarse = torch.tensor([[2.0**-41, 1e-9]])
    assert torch.equal(mean_of([value], [7]), value)
    assert torch.equal(mean_of([value] * 3, [1, 2, 4]), value)
    assert (mean_of([coarse], [7]) - coarse).abs().max() <= 2.0**-41


def test_missing_client_changes_only_the_total_weight() -> None:
    values = contributions(300)
    total = sum(WEIGHTS)
    rest = WEIGHTS[1:]
    got = mean_of(values[1:], rest, total).squeeze(0)
    # Contributions keep the shares of the whole cohort, so the point's precision is that of the rest's share.
    point = Fraction(10, 2**41) * total / sum(rest)
    for column, value in enumerate(got.tolist()):
        wanted = exact(values[1:], rest, column)
        assert abs(Fraction(value) - wanted) <= point + abs(wanted) / 2**24


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**22, -(2.0**22), 3e38])
def test_nonfinite_and_too_large_values_are_refused(bad: float) -> None:
    value = torch.zeros(2, 3)
    value[1, 2] = bad
    with pytest.raises(NotFiniteError):
        encode(value, torch.tensor([3, 1]), 1000)
    assert torch.equal(encode(value, torch.tensor([3, 0]), 1000), torch.zeros(2, 3, dtype=torch.int64))


def test_full_range_is_used_without_overflow() -> None:
    largest = torch.tensor([[np.nextafter(np.float32(2.0**22), np.float32(0))]])
    for weights in ([1] * 3000, [10**9 - 1, 1], [2**31 + 1] * 7):
        for value in (largest, -largest):
            got = mean_of([value] * len(weights), weights)
            assert int(ulps(got, value).max()) <= 1, (len(weights), got, value)
    with pytest.raises(NotFiniteError):
        encode(torch.tensor([[1025.0]]), torch.tensor([1]), 10, scale=52)
    assert encode(torch.tensor([[1023.0]]), torch.tensor([10]), 10, scale=52).item() == 1023 * 2**52


def test_row_weights_are_separate_and_an_empty_row_is_nan() -> None:
    one, two = (
        torch.tensor([[1.0, 2.0], [5.0, 6.0], [0.0, 0.0]]),
        torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]),
    )
    two[1:] = float("nan")
    one[2] = float("inf")
    weights = torch.tensor([[1, 4, 0], [3, 0, 0]])
    total = 8
    added = encode(one, weights[0], total) + encode(two, weights[1], total)
    got = decode(added, weights.sum(0), total)
    assert torch.equal(got[:2], torch.tensor([[2.5, 3.5], [5.0, 6.0]]))
    assert bool(got[2].isnan().all())
    assert bool(decode(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([1, 0]), 1).numel() == 0)
    assert encode(torch.zeros(1, 0), torch.tensor([1]), 1).shape == (1, 0)
    assert not encode(torch.ones(1, 2), torch.tensor([0]), 0).any()


def test_rounding_is_to_nearest() -> None:
    unit = 2.0**-fixedpoint.SCALE
    value = torch.tensor([[0.4 * unit, 0.6 * unit, -0.6 * unit, 1.5 * unit, 2.5 * unit]])
    assert encode(value, torch.tensor([1]), 1).tolist() == [[0, 1, -1, 2, 2]]


# The round's buffer

COUNTS = np.array([[3, 1], [0, 4], [2, 2], [5, 0]])


def task() -> Task:
    nothing: Any = SimpleNamespace()
    return Task(nothing, (2,), 2, COUNTS, ("mlp1",), "mlp1", 4)


def new_sum(payload: Mapping[str, Block], clients: tuple[int, ...] = (0, 1, 3)) -> RoundSum:
    return RoundSum(task(), [(client, "client") for client in clients], payload)


MEASURED = {"train_loss": 1.5, "accuracy_before": 0.25, "bytes_down": 7.0}


def test_round_sum_adds_up_over_ranks() -> None:
    payload = {
        "model": Block(3),
        "classes": Block(2, rows=2, weight="class_samples"),
        "plain": Block(1, weight="one"),
    }
    ranks = [new_sum(payload) for _ in range(3)]
    values = {c: torch.tensor([1.0, 10.0, 100.0]) * (c + 1) for c in (0, 1, 3)}
    for rank, (position, client) in zip((1, 1, 2), enumerate((0, 1, 3)), strict=True):
        classes = torch.full((2, 2), float(client))
        classes[torch.from_numpy(COUNTS[client]) == 0] = float("nan")
        sent = {"model": values[client], "classes": classes, "plain": torch.tensor(float(client))}
        ranks[rank].add(position, sent, {**MEASURED, "train_loss": client + 0.5})
    total = new_sum(payload)
    total.buffer[:] = sum(rank.buffer for rank in ranks)
    assert total.flags.tolist() == [IN, IN, IN] and not total.stopped
    assert total.metrics().tolist() == [[0.5, 0.25, 4 * 8, 7], [1.5, 0.25, 4 * 6, 7], [3.5, 0.25, 4 * 6, 7]]
    means = total.means()
    expected = (4 * values[0] + 4 * values[1] + 5 * values[3]) / 13
    torch.testing.assert_close(means["model"].value, expected.view(1, 3), rtol=1e-7, atol=0)
    assert means["model"].weight.tolist() == [13]
    assert means["plain"].value.tolist() == [[pytest.approx(4 / 3)]] and means["plain"].weight.tolist() == [3]
    by_class = [[3 * 0 + 5 * 3, 8], [1 * 0 + 4 * 1, 5]]
    assert means["classes"].weight.tolist() == [8, 5]
    for row, (numerator, weight) in zip(means["classes"].value, by_class, strict=True):
        torch.testing.assert_close(row, torch.full((2,), numerator / weight))


def test_nonfinite_member_adds_nothing() -> None:
    payload = {"good": Block(2), "bad": Block(2)}
    total = new_sum(payload)
    with pytest.raises(NotFiniteError):
        total.add(1, {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, MEASURED)
    assert not total.buffer.any()
    total.leave_out(1, DROPPED)
    assert total.flags.tolist() == [MISSING, DROPPED, MISSING]
    assert total.clients(DROPPED) == [1] and total.clients(MISSING) == [0, 3]
    assert np.isnan(total.metrics()[1]).all()
    total.add(0, {"good": torch.ones(2), "bad": torch.ones(2)}, MEASURED)
    assert torch.equal(total.means()["bad"].value, torch.ones(1, 2))
    assert total.means()["bad"].weight.tolist() == [4]


def test_omitted_block_has_no_weight_and_undeclared_raises() -> None:
    total = new_sum({"a": Block(2), "b": Block(1)})
    total.add(0, {"a": torch.ones(2)}, MEASURED)
    assert total.metrics()[0].tolist() == [1.5, 0.25, 8.0, 7.0]
    assert total.means()["b"].weight.tolist() == [0] and bool(total.means()["b"].value.isnan().all())
    with pytest.raises(AssertionError, match="private"):
        total.add(1, {"private": torch.ones(2)}, MEASURED)


def test_slots_carry_every_members_float32_bits() -> None:
    payload = {"slot": Block(2, rows=2, weight="class_samples", slot=True), "after": Block(1)}
    bits = np.array(
        [[0x7FC01234, 0xFFC0BEEF], [0x80000000, 0x00000001]], np.uint32
    )  # NaN payloads, -0, denormal
    value = torch.from_numpy(bits.view(np.float32))
    ranks = [new_sum(payload), new_sum(payload)]
    ranks[0].add(0, {"slot": torch.full((2, 2), 0.1), "after": torch.ones(1)}, MEASURED)
    ranks[1].add(1, {"slot": value, "after": torch.ones(1)}, MEASURED)  # client 1 has no samples of class 0
    total = new_sum(payload)
    total.buffer[:] = ranks[0].buffer + ranks[1].buffer
    mean = total.means()["slot"]
    assert mean.value.shape == (3, 2, 2) and mean.weight.tolist() == [[3, 1], [0, 4], [0, 0]]
    assert np.array_equal(mean.value[1].numpy().view(np.uint32), bits)
    assert torch.equal(mean.value[0], torch.full((2, 2), 0.1))
    assert total.metrics()[:2, 2].tolist() == [4 * 5, 4 * 3], "a row without weight is not sent"
    with pytest.raises(NotFiniteError):
        total.add(2, {"slot": torch.tensor([[float("inf"), 0.0], [0.0, 0.0]])}, MEASURED)


def test_stop_is_carried_by_the_sum() -> None:
    ranks = [new_sum({"a": Block(1)}) for _ in range(3)]
    ranks[0].request_stop()
    ranks[2].request_stop()
    total = new_sum({"a": Block(1)})
    total.buffer[:] = sum(rank.buffer for rank in ranks)
    assert total.stopped and not ranks[1].stopped and total.flags.tolist() == [MISSING] * 3


def test_empty_cohort_can_be_summed() -> None:
    total = new_sum({"a": Block(1), "s": Block(1, slot=True)}, ())
    assert total.metrics().shape == (0, 4) and total.means()["s"].value.shape == (0, 1, 1)
    assert bool(total.means()["a"].value.isnan().all())


# The row of a round


def test_row_has_weighted_means_and_null_for_unmeasured() -> None:
    total = new_sum({"a": Block(2)})
    total.add(0, {"a": torch.ones(2)}, {"train_loss": 1.0, "accuracy_before": 0.5, "bytes_down": 99})
    total.add(2, {"a": torch.ones(2)}, {"train_loss": 2.0, "accuracy_before": float("nan"), "bytes_down": 99})
    total.leave_out(1, DROPPED)
    evaluation = metrics.EvaluationSum(4, 2, 3)
    evaluation.clients[0] = [3, 4, 0.5, 0.6, 0.75, 0, 0, 1, 2, 2, 2, 0.7, 0.65, 0, 0]
    evaluation.clients[3] = [1, 2, float("inf"), float("nan"), float("nan"), 1, 2, 0, 0, 0, 0, 0.4, 0.5, 1, 4]
    evaluation.ranks[:] = [[1, 2, 3, 4, 5], [4, 3, 2, 1, 9]]
    evaluation.gates["by_class"][:] = [[2, 0, 4], [2**gates.SCALE, 0, 2**gates.SCALE]]
    details = {"seconds": 10.0, "simulated": 1.0, "unseen": {3}, "bytes_once": 5}
    row, other = (
        metrics.row(7, total, evaluation, COUNTS.sum(1).tolist(), tested, **details)
        for tested in ([4, 0, 0, 0], [4, 0, 0, 2])
    )
    assert other["accuracy_cohort"]["mean"] is None, "client 3 has test rows and was not measured"
    assert row["train_loss"] == pytest.approx((4 * 1.0 + 5 * 2.0) / 9)
    assert row["cohort"] == [0, 1, 3] and row["dropped"] == [1]
    assert row["accuracy"] == {"mean": 0.75, "weighted": 0.75, "std": 0.0, "worst": 0.75}
    assert row["accuracy_unseen"] == {"mean": 0.5, "weighted": 0.5, "std": 0.0, "worst": 0.5}
    assert row["accuracy_cohort"]["mean"] == 0.5 and row["accuracy_validation"]["mean"] is None
    everybody = metrics.evaluation_metrics(evaluation)
    assert everybody["accuracy"]["mean"] == 0.625 and everybody["accuracy_validation"]["mean"] == 0.5
    assert everybody["accuracy"]["weighted"] == pytest.approx(4 / 6)
    assert everybody["accuracy_unseen"]["mean"] is None
    assert row["clients"]["accuracy"] == [0.75, None, None, 0.5]
    assert row["clients"]["loss"] == [0.5, None, None, None], "JSON knows no infinity"
    assert row["clients"]["alpha"] == [0.6, None, None, None]
    assert row["clients"]["auc"] == [0.75, None, None, None] and row["auc"]["worst"] == 0.75
    assert row["clients"]["macro_f1"] == [0.7, None, None, 0.4] and row["macro_f1"]["mean"] == 0.7
    assert row["clients"]["balanced_accuracy"] == [0.65, None, None, 0.5]
    assert row["clients"]["test_samples"] == [4, 0, 0, 0] and row["test_samples"] == 4
    assert row["clients"]["accuracy_tuned"] == [None, None, None, 0.25]
    assert row["accuracy_tuned"]["mean"] == 0.25 and everybody["accuracy_tuned"]["mean"] is None
    assert row["accuracy_worst_tenth"] == 0.75 and everybody["accuracy_worst_tenth"] == 0.5
    assert row["clients"]["accuracy_before"] == [0.5, None, None, None]
    assert row["bytes"] == {"up": 8.0, "down": 99.0, "once": 5} and row["rss_mb"] == 9
    assert [row["seconds"][k] for k in ("train", "evaluate", "sum", "wait", "write", "total")] == [
        4,
        3,
        3,
        4,
        None,
        10,
    ]
    assert row["seconds_ranks"] == {"train": [1, 4], "evaluate": [2, 3], "sum": [3, 2], "wait": [4, 1]}
    assert row["alpha_class"] == [0.5, None, 0.25]
    assert row["accuracy_concepts"] == {"first": 0.5, "second": 1.0, "share": None}
    assert metrics.dumps(row)


def test_row_exists_without_clients_or_loss() -> None:
    for losses in ([], [float("nan")]):
        total = new_sum({"a": Block(1)})
        for position, loss in enumerate(losses):
            total.add(
                position,
                {"a": torch.ones(1)},
                {"train_loss": loss, "accuracy_before": float("nan"), "bytes_down": 99},
            )
        row = metrics.row(
            1,
            total,
            metrics.EvaluationSum(4, 1, 3),
            [4, 4, 4, 5],
            [0] * 4,
            seconds=1.0,
            simulated=1.0,
        )
        assert row["train_loss"] is None and row["accuracy"]["mean"] is None and row["alpha_class"] is None
        assert metrics.dumps(row)
        assert (
            row.keys()
            == metrics.row(
                *(2, total, metrics.EvaluationSum(4, 1, 3), [4] * 4, [1] * 4),
                seconds=1.0,
                simulated=1.0,
            ).keys()
        )


def test_best_round_is_the_first_with_the_highest_accuracy() -> None:
    def row(round: int, test: float | None, validation: float | None) -> metrics.Row:
        return {"round": round, "accuracy": {"mean": test}, "accuracy_validation": {"mean": validation}}

    on_test = [row(1, 0.5, None), row(2, 0.7, None), row(3, 0.7, None), row(4, None, None)]
    assert selection.selected_on(on_test) == "accuracy"
    assert selection.best(on_test) is on_test[1] and selection.best(on_test, [1, 3]) is on_test[2]
    assert not selection.improved(on_test[:2]) and not selection.exhausted(on_test, 1), "on test rows"
    held = [row(1, 0.9, 0.1), row(2, 0.1, 0.2), row(3, 0.5, 0.2), row(4, None, None), row(5, 1.0, 0.1)]
    assert selection.selected_on(held) == "accuracy_validation" and selection.best(held) is held[1]
    assert [selection.improved(held[:n]) for n in range(6)] == [False, True, True, False, False, False]
    ends = [[selection.exhausted(held[:n], patience) for n in range(1, 6)] for patience in (0, 1, 3, 4)]
    assert ends[0] == ends[3] == [False] * 5 and ends[2] == [False] * 4 + [True]
    assert ends[1] == [False, False, True, False, True], "decided where there is a measurement"
    assert selection.best([]) is None
    assert selection.best(on_test, after=2) is on_test[2] and selection.best(held, after=5) is None
    assert selection.improved(held[:3], after=2) and not selection.improved(held[:3])
    assert selection.exhausted(held[:3], 1) and not selection.exhausted(held[:3], 1, after=2)
