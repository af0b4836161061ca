"""Addresses of random draws: the same on every machine, different in every coordinate."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import blake2b
from itertools import product

import torch

from pfedmoe_mpi.core import seeds

KNOWN = {
    (0, "", 0, -1): 4677951519191696690,
    (1, "cohort", 3, -1): 5119714359634550900,
    (2024, "batches", 17, 5): 8297863455089328409,
    (-1, "initial/shared", 0, 499): 3831291846530031294,
}


def test_addressed_draws_never_change() -> None:
    assert {place: seeds.address(*place) for place in KNOWN} == KNOWN
    address = b"".join(n.to_bytes(8, "little", signed=True) for n in (2024, 17, 5)) + b"batches"
    whole = int.from_bytes(blake2b(address, digest_size=8).digest(), "little")
    assert seeds.address(2024, "batches", 17, 5) == whole // 2
    assert seeds.address(1, "cohort", 3) == seeds.address(1, "cohort", 3, seeds.SERVER)


def test_every_coordinate_changes_the_draws() -> None:
    places = list(product((0, 1, 2**40), ("", "a", "ab", "b"), (0, 1, 2**33), (-1, 0, 1, 500)))
    found = {seeds.address(*place) for place in places}
    assert len(found) == len(places)
    assert all(0 <= number < 2**63 for number in found)
    assert max(found) > 2**62 and min(found) < 2**58, "all 63 bits are used"


def test_draws_are_the_same_in_another_process() -> None:
    code = (
        "from pfedmoe_mpi.core import seeds; import torch\n"
        "print(seeds.address(7, 'x', 2, 3))\n"
        "print(seeds.numpy_generator(7, 'x', 2, 3).integers(2**62))\n"
        "print(torch.randint(2**62, (1,), generator=seeds.torch_generator(7, 'x', 2, 3)).item())\n"
        "seeds.seed_global(7, 'x', 2, 3); print(torch.randint(2**62, (1,)).item())"
    )
    here = [
        seeds.address(7, "x", 2, 3),
        seeds.numpy_generator(7, "x", 2, 3).integers(2**62),
        torch.randint(2**62, (1,), generator=seeds.torch_generator(7, "x", 2, 3)).item(),
    ]
    seeds.seed_global(7, "x", 2, 3)
    here.append(torch.randint(2**62, (1,)).item())
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=120
    )
    assert [int(line) for line in there.stdout.split()] == [int(number) for number in here]


def test_generators_leave_global_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    generator = seeds.torch_generator(7, "x")
    torch.rand(5, generator=generator)
    assert torch.equal(torch.rand(3), expected)
    assert generator.device.type == "cpu"
