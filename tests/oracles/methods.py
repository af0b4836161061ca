"""Rounds of the five methods, written from the papers' equations with torch.optim, copies and plain averages.

Nothing of the program is used here: a test passes in starting weights, cohorts and batches, and compares
the results. Every function changes the modules it is given and returns one `Round` per round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = list[tuple[Tensor, Tensor]]
Predict = Callable[[Tensor], Tensor]


@dataclass
class Samples:
    """One client's: `epochs[t]` are the batches of every epoch of round t, `train` and `test` are (x, y)."""

    epochs: list[list[Batches]]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def n(self) -> int:
        return len(self.train[1])


@dataclass
class Round:
    """Accuracy by client before aggregation and after it, its test loss after, and its training loss."""

    before: dict[int, float] = field(default_factory=dict)
    after: dict[int, float] = field(default_factory=dict)
    test_loss: dict[int, float] = field(default_factory=dict)
    train_loss: dict[int, float] = field(default_factory=dict)


@dataclass
class Course:
    """What happens: the clients' samples, who trains in every round, and the optimiser's settings.

    `rates[t]` is the factor on every learning rate in round t.
    """

    samples: Sequence[Samples]
    cohorts: Sequence[Sequence[int]]
    rates: Sequence[float]
    lr: float
    lr_shared: float
    lr_gate: float
    momentum: float
    weight_decay: float
    clip: float

    def descend(
        self,
        t: int,
        k: int,
        modules: Mapping[nn.Module, float],
        loss: Callable[[Tensor, Tensor], Tensor],
        correct: Callable[[], None] | None = None,
    ) -> float:
        """SGD with a new optimiser over modules and their learning rates; mean loss in the last epoch.

        `correct` changes the gradients before each step; it goes without momentum.
        """
        groups = [{"params": list(m.parameters()), "lr": lr * self.rates[t]} for m, lr in modules.items()]
        momentum = 0.0 if correct else self.momentum
        optimiser = torch.optim.SGD(groups, momentum=momentum, weight_decay=self.weight_decay)
        for module in modules:
            module.train()
        for batches in self.samples[k].epochs[t]:
            total = 0.0
            for x, y in batches:
                optimiser.zero_grad()
                value = loss(x, y)
                value.backward()
                if correct:
                    correct()
                if self.clip:
                    nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self.clip)
                optimiser.step()
                total += float(value.detach()) * len(y)
        return total / self.samples[k].n

    def test(self, k: int, predict: Predict, *modules: nn.Module) -> tuple[float, float]:
        """Share of right answers and mean cross-entropy on a client's test samples."""
        x, y = self.samples[k].test
        for module in modules:
            module.eval()
        with torch.no_grad():
            logits = predict(x)
        return float((logits.argmax(1) == y).double().mean()), float(F.cross_entropy(logits, y))

    def average(self, modules: Mapping[int, nn.Module]) -> dict[str, Tensor]:
        """Σ n_k·v_k / Σ n_k over these clients, for every parameter and float buffer."""
        n = {k: self.samples[k].n for k in modules}
        states = {k: module.state_dict() for k, module in modules.items()}
        first = next(iter(states.values()))
        return {
            name: (sum(n[k] * states[k][name].double() for k in n) / sum(n.values())).float()
            for name in first
            if first[name].is_floating_point()
        }


def entropy(predict: Predict) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(predict(x), y)


def pfedmoe(
    theta: nn.Module | Sequence[nn.Module],
    models: Sequence[nn.Module],
    gates: Sequence[nn.Module],
    course: Course,
    scale: int = 1,
) -> list[Round]:
    """`theta` is the server's extractor; as a list it is one for each client, and never averaged.

    `scale`: factor on r, which the paper does not have.
    """
    shared = isinstance(theta, nn.Module)

    def mixture(g: nn.Module, k: int) -> Predict:
        def predict(x: Tensor) -> Tensor:
            alpha = gates[k](x)
            r = alpha[:, 0].unsqueeze(1) * g(x) + alpha[:, 1].unsqueeze(1) * models[k].extractor(x)
            return models[k].head(scale * r)

        return predict

    history = []
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            g = deepcopy(theta) if shared else theta[k]
            rates = {g: course.lr_shared, models[k]: course.lr, gates[k]: course.lr_gate}
            record.train_loss[k] = course.descend(t, k, rates, entropy(mixture(g, k)))
            record.before[k], _ = course.test(k, mixture(g, k), *rates)
            uploads[k] = g
        if shared:
            theta.load_state_dict(course.average(uploads), strict=False)
        for k in range(len(models)):
            g = theta if shared else theta[k]
            measured = course.test(k, mixture(g, k), g, models[k], gates[k])
            record.after[k], record.test_loss[k] = measured
        history.append(record)
    return history


def standalone(models: Sequence[nn.Module], course: Course) -> list[Round]:
    """Every client of the cohort trains its own model."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record = Round()
        for k in cohort:
            record.train_loss[k] = course.descend(t, k, {models[k]: course.lr}, entropy(models[k]))
            record.before[k], _ = course.test(k, models[k], models[k])
        for k, model in enumerate(models):
            record.after[k], record.test_loss[k] = course.test(k, model, model)
        history.append(record)
    return history


def fedavg(model: nn.Module, course: Course) -> list[Round]:
    """McMahan et al. 2017, Algorithm 1."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            w = uploads[k] = deepcopy(model)
            record.train_loss[k] = course.descend(t, k, {w: course.lr_shared}, entropy(w))
            record.before[k], _ = course.test(k, w, w)
        model.load_state_dict(course.average(uploads), strict=False)
        for k in range(len(course.samples)):
            record.after[k], record.test_loss[k] = course.test(k, model, model)
        history.append(record)
    return history


def fedproto(
    prototypes: dict[int, Tensor],
    models: Sequence[nn.Module],
    course: Course,
    weight: float,
    nearest: bool = False,
) -> list[Round]:
    """Tan et al. 2022; `prototypes` holds C̄ of the classes that have one, and is filled here.

    With `nearest` the answer is eq. 4 as soon as any class has a prototype.
    """
    history = []

    def answer(k: int) -> Predict:
        def predict(x: Tensor) -> Tensor:
            logits = torch.full((len(x), models[k].head.out_features), -torch.inf)
            for c, prototype in prototypes.items():
                logits[:, c] = -((models[k].extractor(x) - prototype) ** 2).mean(1)
            return logits

        return predict if nearest and prototypes else models[k]

    for t, cohort in enumerate(course.cohorts):
        record = Round()
        sent: dict[int, list[tuple[int, Tensor]]] = {}  # by class: samples of it and C_i, client by client
        for k in cohort:
            model = models[k]

            def loss(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
                r = model.extractor(x)
                target = torch.stack([prototypes.get(int(c), r[i].detach()) for i, c in enumerate(y)])
                return F.cross_entropy(model.head(r), y) + weight * F.mse_loss(r, target)

            record.train_loss[k] = course.descend(t, k, {model: course.lr}, loss)
            record.before[k], _ = course.test(k, answer(k), model)
            x, y = course.samples[k].train
            with torch.no_grad():
                r = model.extractor(x)
            for c in y.unique().tolist():
                sent.setdefault(c, []).append((int((y == c).sum()), r[y == c].mean(0)))
        for c, held in sent.items():
            prototypes[c] = sum(n * mean for n, mean in held) / sum(n for n, _ in held)
        for k, model in enumerate(models):
            record.after[k], record.test_loss[k] = course.test(k, answer(k), model)
        history.append(record)
    return history


def scaffold(
    model: nn.Module, c: list[Tensor], own: Sequence[list[Tensor]], course: Course, lr_server: float
) -> list[Round]:
    """Karimireddy et al. 2020, Algorithm 1, option II; `c` and `own[i]` = c_i are lists like parameters()."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record, eta = Round(), course.lr_shared * course.rates[t]
        x = [p.detach().clone() for p in model.parameters()]
        clients = []
        moved: list[list[Tensor]] = []  # y_i − x
        changed: list[list[Tensor]] = []  # c_i⁺ − c_i
        for i in cohort:
            y_i = deepcopy(model)

            def correct(y_i: nn.Module = y_i, i: int = i) -> None:
                for p, server, client in zip(y_i.parameters(), c, own[i], strict=True):
                    p.grad += server - client

            course.descend(t, i, {y_i: course.lr_shared}, entropy(y_i), correct)
            record.before[i], _ = course.test(i, y_i, y_i)
            steps = sum(len(batches) for batches in course.samples[i].epochs[t])
            y = [p.detach() for p in y_i.parameters()]
            plus = [
                mine - server + (before - after) / (steps * eta)
                for mine, server, before, after in zip(own[i], c, x, y, strict=True)
            ]
            moved.append([after - before for after, before in zip(y, x, strict=True)])
            changed.append([new - old for new, old in zip(plus, own[i], strict=True)])
            own[i][:] = plus
            clients.append(dict(y_i.named_buffers()))
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():  # running statistics have no control
                    buffer += lr_server * sum(y_i[name] - buffer for y_i in clients) / len(cohort)
            for p, *deltas in zip(model.parameters(), *moved, strict=True):
                p += lr_server * sum(deltas) / len(cohort)
        for place, deltas in enumerate(zip(*changed, strict=True)):
            c[place] = c[place] + len(cohort) / len(course.samples) * (sum(deltas) / len(cohort))
        for k in range(len(course.samples)):
            record.after[k], record.test_loss[k] = course.test(k, model, model)
        history.append(record)
    return history
