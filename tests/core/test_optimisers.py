"""The optimisers of a client step against torch's, learning rates by round, and what an update is made of."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedmoe_mpi.config.sections import Train
from pfedmoe_mpi.core.batches import Batch
from pfedmoe_mpi.core.parts import Module, Parts, Spec
from pfedmoe_mpi.core.sgd import Optimiser, Phase, learning_rate_factor
from support.launcher import clean_environment
from support.one_client import BOTH, SPLIT, Player, Two, body, phase
from support.paths import with_support

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
        phase(BOTH, optimiser="adam"),
        phase(BOTH, optimiser="adam", decay=0.05, clip=0.1, betas=(0.0, 0.9)),
        phase(BOTH, optimiser="adamw", decay=0.05),
        phase(BOTH, optimiser="adamw", decay=0.5, clip=0.1, betas=(0.5, 0.9), eps=1e-3),
        phase(BOTH, optimiser="adamw", decay=0.5, plain=frozenset({"own"})),
        phase(BOTH, decay=0.5, plain=frozenset({"own"})),
    ],
    ids=[
        *("momentum", "no momentum", "decay", "only decay", "clip", "everything", "one part", "no rate"),
        *("adam", "adam with everything", "adamw", "adamw with everything", "adamw and plain", "plain"),
    ],
)
def test_update_equals_that_of_torch(chosen: Phase) -> None:
    torch.manual_seed(0)
    player = Player(chosen)
    parts = player.turn().parts
    mine = Optimiser(parts, chosen, 0.5)
    modules = {"shared": body(), "own": nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))}
    for name, module in modules.items():
        module.load_state_dict(parts.modules()[name].state_dict())
        for part in (module, parts.modules()[name]):
            part.train()
            part.requires_grad_(name in chosen.lr)
    theirs = [torch_optimiser(modules[name], name, chosen, lr * 0.5) for name, lr in chosen.lr.items()]
    for step in range(5):
        x, y = SPLIT.x[5 * step : 5 * step + 5], SPLIT.y[5 * step : 5 * step + 5]
        torch.manual_seed(step)
        mine.zero_grad()
        nn.functional.cross_entropy(parts.own(parts.shared(x)), y).backward()
        # The same gradients for both: Adam makes steps of full length of those that are rounding errors.
        for name, module in modules.items():
            for ours, copy in zip(parts.parameters(name), module.parameters(), strict=True):
                copy.grad = None if ours.grad is None else ours.grad.clone()
        mine.step()
        torch.manual_seed(step)
        modules["own"](modules["shared"](x))  # for the running statistics
        if chosen.clip:
            trained = [p for name in chosen.lr for p in modules[name].parameters()]
            norm = nn.utils.clip_grad_norm_(trained, chosen.clip)
            assert float(norm) > chosen.clip, "the joint norm is what is clipped"
        for each in theirs:
            each.step()
        for name, module in modules.items():
            for (key, got), want in zip(
                parts.modules()[name].state_dict().items(), module.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=f"step {step}: {name}.{key}")
    parts.check()


def torch_optimiser(module: nn.Module, name: str, chosen: Phase, lr: float) -> torch.optim.Optimizer:
    """Return torch's optimiser of a part; clipping is up to the caller."""
    if name in chosen.plain:
        return torch.optim.SGD(module.parameters(), lr=lr)
    decay = chosen.weight_decay
    if chosen.optimiser == "sgd":
        return torch.optim.SGD(module.parameters(), lr=lr, momentum=chosen.momentum, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[chosen.optimiser]
    return kind(module.parameters(), lr=lr, betas=chosen.betas, eps=chosen.eps, weight_decay=decay)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_parameter_without_gradient_stays_unchanged(kind: str) -> None:
    chosen = phase({"own": 0.1}, decay=0.1, optimiser=kind)
    parts = Player(chosen).turn().parts
    optimiser, before = Optimiser(parts, chosen, 1.0), parts.vector("own").clone()
    optimiser.step()
    assert torch.equal(parts.vector("own"), before)
    weight = parts.own[1].weight
    weight.grad = torch.ones_like(weight)
    old = weight.detach().clone()
    optimiser.step()
    wanted = old - 0.1 * (1 + 0.1 * old) if kind == "sgd" else old - 0.1  # the first update of this weight
    torch.testing.assert_close(weight.detach(), wanted)


def test_learning_rate_schedules_have_their_values() -> None:
    def factors(rounds: int = 4, **train: Any) -> list[float]:
        return [learning_rate_factor(Train(**train), r, rounds) for r in range(rounds + 1)]

    assert factors() == [1, 1, 1, 1, 1]
    assert factors(schedule="linear") == [1, 1, 0.75, 0.5, 0.25]
    assert factors(schedule="cosine") == pytest.approx([1, 1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert factors(schedule="exponential", gamma=0.5) == [1, 1, 0.5, 0.25, 0.125]
    assert factors(schedule="step", gamma=0.5, step_size=2) == [1, 1, 1, 0.5, 0.5]
    assert factors(7, schedule="linear", warmup=3) == [1, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    assert factors(6, schedule="step", warmup=1, step_size=2, gamma=0.1)[1:] == pytest.approx(
        [0.5, 1, 1, 0.1, 0.1, 0.01]
    )
    assert factors(3, warmup=9) == pytest.approx([1, 0.1, 0.2, 0.3]), "a warm-up longer than the run"
    late = Player(phase(BOTH), schedule="linear", rounds=4).turn(3)
    assert late.rate == 0.5


def test_schedule_scales_the_steps() -> None:
    moved = []
    for schedule in ("constant", "linear"):
        player = Player(phase(BOTH, momentum=0.0), schedule=schedule, rounds=1000)
        _, shared, _ = player.step(1000)
        moved.append(float((shared - player.state)[:56].norm()))
    assert moved[1] < 0.01 * moved[0]


# What an update is made of


class Linear(Two):
    """The same parts without batch normalisation and dropout."""

    def state(self) -> Spec:
        return {"shared": Module("linear", lambda: nn.Linear(6, 5))}

    def client_state(self, client: int) -> Spec:
        return {"own": Module("last", lambda: nn.Linear(5, 3))}

    def predict(self, parts: Parts, x: Tensor) -> Tensor:
        logits: Tensor = parts.own(parts.shared(x).tanh())
        return logits


@pytest.mark.parametrize(
    ("batch", "accumulate", "large", "updates"),
    [(6, 3, 18, 2), (6, 2, 12, 2), (4, 3, 12, 2), (6, 99, 25, 1), (2, 2, 4, 6)],
)
def test_accumulated_batches_make_one_large_batch(
    batch: int, accumulate: int, large: int, updates: int
) -> None:
    """25 samples: the last batch, and the last group of batches, is a smaller or a larger one."""
    many = Player(phase(BOTH, accumulate=accumulate, clip=0.3), method=Linear, batch=batch)
    one = Player(phase(BOTH, clip=0.3), method=Linear, batch=large)
    (turn, shared, own), (other, *wanted) = many.step(), one.step()
    torch.testing.assert_close(shared, wanted[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(own, wanted[1], rtol=0, atol=1e-6)
    assert not torch.equal(shared, many.state) and turn.loss == pytest.approx(other.loss, rel=1e-5)
    assert Train(batch=batch, accumulate=accumulate).updates(25) == updates == Train(batch=large).updates(25)
    assert many.turn().sgd(many.method.phases("client")[0]) == updates


def losses(steps: int, **others: Any) -> tuple[Any, list[tuple[float, int]]]:
    """Return a turn of as many steps, and loss and size of each of its batches."""
    player = Player(phase(BOTH, epochs=7, steps=steps, **others))
    seen: list[tuple[float, int]] = []
    loss = player.method.loss

    def recorded(parts: Parts, batch: Batch) -> Tensor:
        value = loss(parts, batch)
        seen.append((float(value.detach()), len(batch)))
        return value

    player.method.loss = recorded
    return player.step()[0], seen


@pytest.mark.parametrize(("steps", "counted"), [(1, 1), (4, 4), (6, 6), (8, 4), (9, 5)])
def test_steps_replace_epochs(steps: int, counted: int) -> None:
    """An epoch has four batches; an incomplete last one counts with the one before it."""
    turn, seen = losses(steps)
    assert [size for _, size in seen] == ([6, 6, 6, 7] * 3)[:steps]
    last = seen[-counted:]
    assert turn.loss == pytest.approx(sum(v * n for v, n in last) / sum(n for _, n in last))


def test_steps_are_updates_and_equal_as_many_epochs() -> None:
    assert [size for _, size in losses(3, accumulate=3)[1]] == [6, 6, 6, 7, 6, 6, 6]
    by_steps, by_epochs = Player(phase(BOTH, epochs=9, steps=8)), Player(phase(BOTH, epochs=2))
    assert torch.equal(by_steps.step()[1], by_epochs.step()[1])
    assert Train(batch=6, steps=6).passes(25) == 1.5 and Train(batch=6, epochs=3).passes(25) == 3


def test_a_phase_takes_the_settings_of_the_run() -> None:
    """Epochs and momentum of a method's own win; its momentum is β1 of Adam."""
    player = Player(phase(BOTH))
    train = Train(optimiser="adamw", betas=(0.8, 0.95), eps=1e-3, steps=5, accumulate=2)
    player.method.task = SimpleNamespace(config=SimpleNamespace(train=train))  # type: ignore[assignment]
    chosen = player.method.phase(BOTH, plain=["own"])
    assert (chosen.optimiser, chosen.betas, chosen.eps) == ("adamw", (0.8, 0.95), 1e-3)
    assert (chosen.steps, chosen.accumulate, chosen.plain) == (5, 2, {"own"})
    own = player.method.phase(BOTH, epochs=3, momentum=0.0)
    assert (own.steps, own.epochs, own.momentum, own.betas) == (0, 3, 0.0, (0.0, 0.95))


def test_no_optimiser_imports_torchs_compiler() -> None:
    program = (
        "import sys, torch; from support.one_client import BOTH, Player, phase; "
        "[Player(phase(BOTH, optimiser=name)).step() for name in ('sgd', 'adam', 'adamw')]; "
        "print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=with_support(clean_environment("mpich", {})),
    )
    assert result.stdout == "False\n"
