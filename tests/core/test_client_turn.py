"""A client's turn: the optimiser against torch's, what a step may change, and abandoned steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.config.sections import FaultSettings, Train
from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Batch, Normalise, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.parts import Module, Parts, Spec, Workbench
from pfedmoe_mpi.core.parts import Tensor as TensorPart
from pfedmoe_mpi.core.sgd import SGD, Phase, learning_rate_factor
from pfedmoe_mpi.core.turn import Engine, Turn
from pfedmoe_mpi.errors import StoppedError
from pfedmoe_mpi.federation.evaluation import measure
from pfedmoe_mpi.federation.faults import Faults
from pfedmoe_mpi.federation.round_sum import DROPPED, IN, MISSING, RoundSum
from pfedmoe_mpi.federation.training import train_member
from pfedmoe_mpi.mpi.comm import Comm

CPU = torch.device("cpu")


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 5))


class Two(Algorithm):
    """A shared and a private part, one after the other."""

    def __init__(self, *phases: Phase) -> None:
        self._phases = list(phases)

    def state(self) -> Spec:
        return {"shared": Module("body", body)}

    def client_state(self, client: int) -> Spec:
        return {
            "own": Module("head", lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))),
            "count": TensorPart((2,)),
        }

    def phases(self, role: str) -> list[Phase]:
        return self._phases

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.own(parts.shared(x))
        return logits


def phase(
    lr: Mapping[str, float], epochs: int = 1, momentum: float = 0.9, decay: float = 0.0, clip: float = 0.0
) -> Phase:
    return Phase(lr, epochs, momentum, decay, clip)


BOTH = {"shared": 0.1, "own": 0.03}
SPLIT = Split(torch.randn((25, 6), generator=torch.Generator().manual_seed(1)), torch.arange(25) % 3)


class Player:
    """One client, its vectors, and turns of it."""

    def __init__(
        self, *phases: Phase, poll: Callable[[], None] = lambda: None, rounds: int = 10, **train: Any
    ) -> None:
        self.method = Two(*phases)
        self.bench = Workbench(4, CPU)
        settings = Train(batch=6, **train)
        self.engine = Engine(CPU, Normalise((), (), 1, CPU), settings, 7, 4, rounds, poll)
        self.state = self.bench.initial(self.method.state())
        spec = self.method.client_state(0)
        self.client = Client(
            0, spec, self.bench.initial(spec, 0), dict.fromkeys(("train", "test", "validation"), SPLIT)
        )

    def turn(self, round: int = 1) -> Turn:
        parts = self.bench.parts((self.method.state(), self.state), (self.client.spec, self.client.vector))
        return Turn(self.engine, self.method.loss, self.client, parts, round, "client")

    def step(self, round: int = 1) -> tuple[Turn, Tensor, Tensor]:
        """Return (turn, shared vector, private vector) after a client step."""
        turn = self.turn(round)
        self.method.client_step(turn)
        turn.parts.check()
        private = self.bench.read(self.client.spec, turn.parts, torch.empty_like(self.client.vector))
        return turn, turn.parts.vector("shared").clone(), private


# The optimiser


@pytest.mark.parametrize(
    "chosen",
    [
        phase(BOTH),
        phase(BOTH, momentum=0.0),
        phase(BOTH, decay=0.05),
        phase(BOTH, momentum=0.0, decay=0.05),
        phase(BOTH, clip=0.1),
        phase(BOTH, momentum=0.5, decay=0.01, clip=0.5),
        phase({"own": 0.2}, decay=0.1, clip=0.2),
        phase({"shared": 0.0, "own": 0.1}),
    ],
    ids=["momentum", "plain", "decay", "plain decay", "clip", "everything", "one part", "no rate"],
)
def test_sgd_equals_torch_sgd(chosen: Phase) -> None:
    torch.manual_seed(0)
    player = Player(chosen)
    parts = player.turn().parts
    mine = SGD(parts, chosen, 0.5)
    modules = {"shared": body(), "own": nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))}
    for name, module in modules.items():
        module.load_state_dict(parts.modules()[name].state_dict())
        for each in (module, parts.modules()[name]):
            each.train()
            each.requires_grad_(name in chosen.lr)
    groups = [{"params": list(modules[name].parameters()), "lr": lr * 0.5} for name, lr in chosen.lr.items()]
    theirs = torch.optim.SGD(groups, momentum=chosen.momentum, weight_decay=chosen.weight_decay)
    for step in range(5):
        x, y = SPLIT.x[5 * step : 5 * step + 5], SPLIT.y[5 * step : 5 * step + 5]
        torch.manual_seed(step)
        mine.zero_grad()
        nn.functional.cross_entropy(parts.own(parts.shared(x)), y).backward()
        mine.step()
        torch.manual_seed(step)
        theirs.zero_grad()
        nn.functional.cross_entropy(modules["own"](modules["shared"](x)), y).backward()
        if chosen.clip:
            trained = [p for name in chosen.lr for p in modules[name].parameters()]
            norm = nn.utils.clip_grad_norm_(trained, chosen.clip)
            assert float(norm) > chosen.clip, "the joint norm is what is clipped"
        theirs.step()
        for name, module in modules.items():
            for (key, got), want in zip(
                parts.modules()[name].state_dict().items(), module.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=f"step {step}: {name}.{key}")
    parts.check()


def test_parameter_without_gradient_stays_unchanged() -> None:
    chosen = phase({"own": 0.1}, decay=0.1)
    parts = Player(chosen).turn().parts
    optimiser, before = SGD(parts, chosen, 1.0), parts.vector("own").clone()
    optimiser.step()
    assert torch.equal(parts.vector("own"), before)
    weight = parts.own[1].weight
    weight.grad = torch.ones_like(weight)
    old = weight.detach().clone()
    optimiser.step()
    torch.testing.assert_close(weight.detach(), old - 0.1 * (1 + 0.1 * old))


def test_learning_rate_schedules_have_their_values() -> None:
    assert [learning_rate_factor("constant", r, 4) for r in (1, 2, 4)] == [1, 1, 1]
    assert [learning_rate_factor("linear", r, 4) for r in (1, 2, 3, 4)] == [1, 0.75, 0.5, 0.25]
    cosine = [learning_rate_factor("cosine", r, 4) for r in (1, 2, 3, 4)]
    assert cosine == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    late = Player(phase(BOTH), schedule="linear", rounds=4).turn(3)
    assert late.rate == 0.5


def test_schedule_scales_the_steps() -> None:
    moved = []
    for schedule in ("constant", "linear"):
        player = Player(phase(BOTH, momentum=0.0), schedule=schedule, rounds=1000)
        _, shared, _ = player.step(1000)
        moved.append(float((shared - player.state)[:56].norm()))
    assert moved[1] < 0.01 * moved[0]


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
        stream=None,
    )
    faults = Faults(0, FaultSettings(), [1.0])
    with Comm.located(SimpleNamespace(rank=0), "client 0, round 1"):
        train_member(federation, faults, total, 0, player.client, player.state, 1, "client", tested=False)


def new_sum(player: Player) -> RoundSum:
    task: Any = SimpleNamespace(
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


def test_method_exception_names_rank_client_and_round() -> None:
    player = Player(phase({"nobody": 0.1}))
    with pytest.raises(KeyError) as caught:
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
