"""A client's turn: what a step may change, its loss, and abandoned steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedmoe_mpi.config.sections import FaultSettings
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Batch, Split
from pfedmoe_mpi.core.parts import Parts, Workbench
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import StoppedError
from pfedmoe_mpi.federation.evaluation import measure
from pfedmoe_mpi.federation.faults import Faults
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, MISSING, RoundSum
from pfedmoe_mpi.federation.training import train_member
from pfedmoe_mpi.mpi.comm import Comm
from support.one_client import BOTH, CPU, SPLIT, Player, Two, phase

# What a step touches


def test_momentum_starts_at_zero_in_every_turn() -> None:
    player = Player(phase(BOTH, epochs=2))
    first = player.step()
    player.step(2)
    again = player.step()
    assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
    twice = Player(phase(BOTH), phase(BOTH))
    once = Player(phase(BOTH, epochs=2))
    assert not torch.equal(twice.step()[1], once.step()[1]), "a phase starts at zero too"


def test_turn_does_not_depend_on_earlier_draws() -> None:
    player = Player(phase(BOTH))
    first = player.step()[1]
    torch.rand(17)
    assert torch.equal(player.step()[1], first), "dropout draws from the turn's address"
    assert not torch.equal(player.step(2)[1], first)


def test_frozen_parts_and_their_statistics_do_not_move() -> None:
    for trained, frozen in (("shared", "own"), ("own", "shared")):
        player = Player(phase({trained: 0.1}))
        turn, shared, private = player.step()
        assert all(p.grad is None for p in turn.parts.parameters(frozen)), "no gradient is computed for it"
        moved = {
            "shared": not torch.equal(shared, player.state),
            "own": not torch.equal(private, player.client.vector),
        }
        assert moved == {trained: True, frozen: False}


def test_trained_statistics_move_without_weight_decay() -> None:
    player = Player(phase({"shared": 0.0, "own": 0.0}, decay=0.5))
    _, shared, _ = player.step()
    layout = player.bench.layout(player.method.state())
    now, start = layout.views(shared), layout.views(player.state)
    for name in now:
        moves = name.endswith(("running_mean", "running_var"))
        assert torch.equal(now[name], start[name]) is not moves, name

    # With rate 0 nothing but statistics moves, and decay does not enter them.
    undecayed = Player(phase({"shared": 0.0, "own": 0.0})).step()[1]
    assert torch.equal(shared, undecayed)
    assert not torch.equal(Player(phase(BOTH, decay=0.5)).step()[1], Player(phase(BOTH)).step()[1])


def test_tensor_part_is_writable_and_not_optimised() -> None:
    player = Player(phase(BOTH, decay=0.5))
    player.client.vector[-2:] = torch.tensor([3.0, 4.0])
    assert player.step()[2][-2:].tolist() == [3.0, 4.0]


def test_loss_is_the_last_epoch_mean_per_sample() -> None:
    player = Player(phase({"own": 0.0, "shared": 0.0}, epochs=3))
    seen: list[tuple[float, int]] = []
    loss = player.method.loss

    def recorded(parts: Parts, batch: Batch) -> Tensor:
        value = loss(parts, batch)
        seen.append((float(value.detach()), len(batch)))
        return value

    player.method.loss = recorded
    turn, _, _ = player.step()
    assert [n for _, n in seen] == [6, 6, 6, 7] * 3, "a last batch of one joins the one before it"
    last = seen[-4:]
    assert turn.loss == pytest.approx(sum(value * n for value, n in last) / 25)
    assert turn.samples == 25


def test_every_update_is_reported_the_last_one_too() -> None:
    seen: list[int] = []

    def enough(steps: int) -> bool:
        seen.append(steps)
        return steps == 6

    for chosen, updates in ((phase(BOTH), 4), (phase(BOTH, steps=5), 5), (phase(BOTH, steps=9), 6)):
        seen.clear()
        assert Player(chosen).turn().sgd(chosen, enough=enough) == updates
        assert seen == list(range(1, updates + 1))


def test_bf16_keeps_float32_vectors() -> None:
    player, exact = Player(phase(BOTH), precision="bf16"), Player(phase(BOTH))
    turn, shared, private = player.step()
    assert shared.dtype == private.dtype == torch.float32
    assert all(p.dtype == torch.float32 for m in turn.parts.modules().values() for p in m.parameters())
    wanted = exact.step()[1]
    assert not torch.equal(shared, wanted)
    torch.testing.assert_close(shared, wanted, rtol=0.1, atol=0.05)
    assert shared.view(torch.int32).bitwise_and(0xFFFF).count_nonzero() > len(shared) / 2, (
        "not rounded to bf16"
    )


# Measuring


def test_measuring_counts_and_changes_nothing() -> None:
    player = Player(phase(BOTH))
    turn = player.turn()
    before = turn.parts.vector("shared").clone()
    found = measure(player.engine, player.method, turn.parts, SPLIT)
    for module in turn.parts.modules().values():
        module.eval()
    logits = player.method.predict(turn.parts, SPLIT.x)
    assert found.samples == 25 and found.correct == int((logits.argmax(1) == SPLIT.y).sum())
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, SPLIT.y).detach()), rel=1e-5)
    assert found.alpha != found.alpha, "no gate"
    assert torch.equal(turn.parts.vector("shared"), before)
    nobody = measure(player.engine, player.method, turn.parts, Split(SPLIT.x[:0], SPLIT.y[:0]))
    assert (nobody.correct, nobody.samples) == (0, 0) and nobody.loss != nobody.loss


def test_training_batches_come_in_order_without_gradients() -> None:
    turn = Player(phase(BOTH)).turn()
    rows = [batch.rows for batch in turn.training_batches()]
    assert torch.cat(rows).tolist() == list(range(25)) and [len(r) for r in rows] == [7, 7, 7, 4]
    for batch in turn.training_batches():
        assert not turn.parts.shared(batch.x).requires_grad and not turn.parts.shared.training
        break


# Through the loop: a step that is abandoned, refused, or done


def play(player: Player, total: RoundSum) -> None:
    """Handle one client's step as the round loop does it."""
    federation: Any = SimpleNamespace(
        workbench=player.bench,
        parts=lambda client, state: player.bench.parts(
            (player.method.state(), state), (client.spec, client.vector)
        ),
        engine=player.engine,
        method=player.method,
        state_layout=SimpleNamespace(size=len(player.state)),
        client_layouts=[player.bench.layout(player.client.spec)],
        stream=None,
    )
    faults = Faults(0, FaultSettings(), [1.0])
    with Comm.located(SimpleNamespace(rank=0, names=["0"]), "client 0, round 1"):
        train_member(federation, faults, total, 0, player.client, player.state, 1, "client", tested=False)


def new_sum(player: Player) -> RoundSum:
    task: Any = SimpleNamespace(
        clients=1,
        unseen=frozenset(),
        weight=lambda rule, client: torch.tensor([25]),
        total_weight=lambda rule, cohort: 25,
        samples=lambda client: 25,
    )
    sizes = {"shared": len(player.state)}
    return RoundSum(task, [(0, "client")], player.method.payload(sizes))


@pytest.mark.parametrize("batches", [0, 1, 5])
def test_stopped_step_leaves_no_trace(batches: int) -> None:
    left = [batches]

    def poll() -> None:
        if left[0] == 0:
            raise StoppedError
        left[0] -= 1

    player = Player(phase(BOTH, epochs=2), poll=poll)
    before, total = player.client.vector.clone(), new_sum(player)
    with pytest.raises(StoppedError):
        play(player, total)
    assert torch.equal(player.client.vector, before) and not total.buffer.any()
    assert total.flags.tolist() == [MISSING]

    left[0] = -1  # again, to the end
    play(player, total)
    other = Player(phase(BOTH, epochs=2))
    undisturbed = new_sum(other)
    play(other, undisturbed)
    assert (total.buffer == undisturbed.buffer).all() and total.flags.tolist() == [IN]
    assert torch.equal(player.client.vector, other.client.vector)
    assert not torch.equal(player.client.vector, before)


@pytest.mark.parametrize(
    "rates", [{"shared": 1e30, "own": 0.1}, {"shared": 0.1, "own": 1e30}], ids=["sent", "kept"]
)
def test_nonfinite_step_is_left_out(rates: Mapping[str, float]) -> None:
    player = Player(phase(rates))
    before, total = player.client.vector.clone(), new_sum(player)
    play(player, total)
    assert torch.equal(player.client.vector, before)
    assert total.flags.tolist() == [DROPPED] and not total.means()["shared"].weight.any()


@pytest.mark.parametrize("error", [KeyError("nobody"), SystemExit("enough")], ids=["raises", "quits"])
def test_method_exception_names_rank_client_and_round(error: BaseException) -> None:
    def fails(parts: Parts, batch: Batch) -> Tensor:
        raise error

    player = Player(phase(BOTH))
    player.method.loss = fails
    with pytest.raises(type(error)) as caught:
        play(player, new_sum(player))
    assert caught.value.__notes__ == ["rank 0, client 0, round 1"]


def test_unbound_part_is_detected() -> None:
    player = Player(phase(BOTH))
    step = player.method.client_step

    def careless(turn: Turn) -> Mapping[str, Tensor]:
        turn.parts.own[1] = nn.Linear(5, 3)
        return step(turn)

    player.method.client_step = careless
    with pytest.raises(AssertionError, match="is no longer a view of the vector"):
        play(player, new_sum(player))


def test_initial_vectors_depend_on_seed_part_and_client() -> None:
    bench, spec = Workbench(4, CPU), Two().state()
    one = bench.initial(spec)
    seeds.seed_global(9, "elsewhere")
    assert torch.equal(bench.initial(spec), one) and torch.equal(Workbench(4, CPU).initial(spec), one)
    assert not torch.equal(Workbench(5, CPU).initial(spec), one)
    assert not torch.equal(bench.initial(spec, 1), bench.initial(spec, 2))
