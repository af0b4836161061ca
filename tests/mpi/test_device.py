"""The ranks' GPUs, from what each rank sees."""

from __future__ import annotations

import pytest

from pfedmoe_mpi.mpi.device import assign, parts_of_gpus

FOUR = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
MIG = ["MIG-1", "MIG-2", "MIG-3"]


@pytest.mark.parametrize(
    ("visible", "positions"),
    [
        ([FOUR] * 4, [0, 1, 2, 3]),  # --gpus-per-node 4, a rank per GPU
        ([FOUR] * 8, [0, 1, 2, 3] * 2),  # two ranks per GPU
        ([FOUR] * 3, [0, 1, 2]),
        ([["GPU-a"]] * 5, [0] * 5),  # one GPU for all
        ([FOUR] * 2 + [["GPU-e", "GPU-f"]] * 2, [0, 1, 0, 1]),  # two hosts
        ([[name] for name in FOUR], [0] * 4),  # --gpus-per-task 1, --gpu-bind single:1
        ([["GPU-a"], ["GPU-a"], ["GPU-b"], ["GPU-b"]], [0] * 4),  # --gpu-bind single:2
        ([FOUR[:2], FOUR[2:]], [0, 0]),  # --gpus-per-task 2
        ([FOUR, FOUR[::-1]], [0, 0]),  # the nearest first: --gpu-bind closest
        ([FOUR[:2], FOUR[:1], FOUR[:2]], [0, 0, 1]),
        ([MIG] * 4, [0, 1, 2, 0]),
        ([[], FOUR, []], [None, 0, None]),
    ],
)
def test_ranks_take_the_gpus_they_see(visible: list[list[str]], positions: list[int | None]) -> None:
    assert assign(visible) == positions


def test_parts_of_a_host_take_gpus_after_each_other() -> None:
    """Runs at once, `reproduce --together`: each part of the ranks is assigned by itself."""
    four, two = list("abcd"), list("ab")
    assert [assign([four] * 2, [first] * 2) for first in (0, 2)] == [[0, 1], [2, 3]]
    assert [assign([two], [first]) for first in range(4)] == [[0], [1], [0], [1]]
    assert assign([["c"], []], [2, 2]) == [0, None]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, []),
        ("", []),
        ("0,1", []),
        ("GPU-8932f937-d72c,GPU-1", []),
        ("MIG-GPU-8932f937/1/0, MIG-c6d4f1ef-42e4", ["MIG-GPU-8932f937/1/0", "MIG-c6d4f1ef-42e4"]),
    ],
)
def test_parts_of_gpus_are_named_by_the_environment(text: str | None, parts: list[str]) -> None:
    assert parts_of_gpus({} if text is None else {"CUDA_VISIBLE_DEVICES": text}) == parts
