"""`jobs/tables/last_client.py`: all clients begin a round with the extractor that one trained before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pfedmoe_mpi.algorithms.pfedmoe import PFedMoE
from pfedmoe_mpi.core.turn import Turn
from support.paths import ROOT
from support.small_federation import build_loop, write_data_files

METHOD = str(ROOT / "jobs" / "tables" / "last_client.py")
ROUNDS = 6


def test_one_clients_extractor_is_what_all_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[int, list[Tensor]] = {}
    trained: dict[int, list[Tensor]] = {}
    step = PFedMoE.client_step

    def recorded(self: PFedMoE, turn: Turn) -> Mapping[str, Tensor]:
        begun.setdefault(turn.round, []).append(turn.parts.vector("shared").clone())
        values = step(self, turn)
        trained.setdefault(turn.round, []).append(values["shared"].clone())
        return values

    monkeypatch.setattr(PFedMoE, "client_step", recorded)
    data = write_data_files(tmp_path)["small"]
    settings = {"model__pool": "mlp5", "participation": 1.0, "rounds": ROUNDS, "train__epochs": 1}
    loop = build_loop(data, METHOD, **settings)
    assert loop.run()
    begun[ROUNDS + 1] = [loop.state]
    last = []
    for round, (a, b, c) in trained.items():
        new = begun[round + 1][0]
        assert all(torch.equal(each, new) for each in begun[round + 1])
        taken = [k for k, theta in enumerate((a, b, c)) if torch.allclose(theta, new, rtol=1e-6, atol=1e-9)]
        assert len(taken) == 1, "n_k θ_k / n_k of one client"
        last += taken
    assert len(last) == ROUNDS and len(set(last)) > 1, "another one after another round"
