"""Rounds of FedJETs, FedMix and the ensemble, written from the papers' equations in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.methods import Course, Round
from oracles.nets import loaded


class Dense2(nn.Module):
    """Linear → ReLU → Linear → softmax."""

    def __init__(self, d: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, experts))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers(x), 1)


def gate(tensors: Mapping[str, Tensor]) -> nn.Module:
    hidden, d = tensors["layers.0.weight"].shape
    return loaded(Dense2(d, hidden, len(tensors["layers.2.weight"])), tensors)


def descend(
    course: Course,
    t: int,
    k: int,
    experts: Sequence[nn.Module],
    plain: Sequence[nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """SGD as configured over experts, plain SGD over the others; mean loss of the last epoch."""
    groups = [
        {
            "params": list(m.parameters()),
            "lr": course.lr_shared * course.rates[t],
            "momentum": course.momentum,
        }
        | {"weight_decay": course.weight_decay}
        for m in experts
    ]
    groups += [{"params": list(m.parameters()), "lr": course.lr_gate * course.rates[t]} for m in plain]
    optimiser = torch.optim.SGD(groups, lr=0.0)
    for module in (*experts, *plain):
        module.train()
    for batches in course.samples[k].epochs[t]:
        total = 0.0
        for x, y in batches:
            optimiser.zero_grad()
            value = loss(x, y)
            value.backward()
            if course.clip:
                nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], course.clip)
            optimiser.step()
            total += float(value.detach()) * len(y)
    for module in (*experts, *plain):
        module.eval()
    return total / course.samples[k].n


def fedjets(
    experts: Sequence[nn.Module],
    g: nn.Module,
    common: nn.Module,
    course: Course,
    *,
    roles: Sequence[Mapping[int, int | None]],
    top: int,
    anchor_loss: float,
    renormalise: bool,
    frozen: bool,
    unseen: Sequence[int],
) -> list[Round]:
    """Train FedJETs' rounds; `roles[t]` maps every active client to the expert it is anchor of, or None."""

    def seen(x: Tensor) -> Tensor:
        with torch.no_grad():
            return common.extractor(x)

    def choice(gate: nn.Module, x: Tensor) -> list[int]:
        with torch.no_grad():
            return torch.topk(gate(seen(x)).sum(0), min(top, len(experts))).indices.tolist()

    def mixed(gate: nn.Module, of: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        scores = {m: gate(seen(x))[:, m] for m in of}
        total = sum(scores.values()) if renormalise else 1.0
        return sum((scores[m] / total).unsqueeze(1) * of[m](x) for m in of)

    def routed(gate: nn.Module, of: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        scores = gate(seen(x))
        best = [max(of, key=lambda m, i=i: float(scores[i, m])) for i in range(len(x))]
        return torch.stack([of[m](x[i : i + 1])[0] for i, m in enumerate(best)])

    def measured(gate: nn.Module, of: Sequence[nn.Module], k: int) -> tuple[float, float]:
        x, y = course.samples[k].test
        with torch.no_grad():
            chosen = {m: of[m] for m in choice(gate, x)}
            logits = (routed if k in unseen else mixed)(gate, chosen, x)
        return float((logits.argmax(1) == y).double().mean()), float(F.cross_entropy(logits, y))

    history = []
    for module in (*experts, g, common):
        module.eval()
    for t, cohort in enumerate(course.cohorts):
        record = Round()
        trained: dict[int, dict[int, nn.Module]] = {m: {} for m in range(len(experts))}
        gates = {}
        for k in cohort:
            own = gates[k] = deepcopy(g)
            q = roles[t][k]
            mine = {
                m: deepcopy(experts[m]) for m in (choice(g, course.samples[k].train[0]) if q is None else [q])
            }

            def loss(x: Tensor, y: Tensor, own: nn.Module = own, mine=mine, q=q) -> Tensor:
                if q is None:
                    return F.cross_entropy(mixed(own, mine, x), y)
                value = F.cross_entropy(mine[q](x), y)
                return value if frozen else value - anchor_loss * own(seen(x))[:, q].log().mean()

            record.train_loss[k] = descend(course, t, k, [*mine.values()], [] if frozen else [own], loss)
            record.before[k], _ = measured(own, [mine.get(m, e) for m, e in enumerate(experts)], k)
            for m, expert in mine.items():
                trained[m][k] = expert
        for m, by_client in trained.items():
            if by_client:
                experts[m].load_state_dict(course.average(by_client), strict=False)
        if not frozen:
            g.load_state_dict(course.average(gates), strict=False)
        for k in range(len(course.samples)):
            record.after[k], record.test_loss[k] = measured(g, experts, k)
        history.append(record)
    return history


def fedmix(experts: Sequence[nn.Module], g: nn.Module, course: Course) -> list[Round]:
    """Train FedMix's rounds: every client trains everything; p(y | x) = Σ_m g_m softmax(W_m)_y."""

    def probability(own: Sequence[nn.Module], gate: nn.Module, x: Tensor) -> Tensor:
        weights = gate(x)
        return sum(weights[:, m].unsqueeze(1) * torch.softmax(e(x), 1) for m, e in enumerate(own))

    history = []
    for t, cohort in enumerate(course.cohorts):
        record, uploads, gates = Round(), [{} for _ in experts], {}
        for k in cohort:
            own, gate = [deepcopy(e) for e in experts], deepcopy(g)
            rates = {**dict.fromkeys(own, course.lr_shared), gate: course.lr_gate}

            def loss(x: Tensor, y: Tensor, own=own, gate=gate) -> Tensor:
                return -probability(own, gate, x)[torch.arange(len(y)), y].log().mean()

            record.train_loss[k] = course.descend(t, k, rates, loss)
            record.before[k], _ = course.test(k, lambda x: probability(own, gate, x).log(), *own, gate)  # noqa: B023
            gates[k] = gate
            for m, e in enumerate(own):
                uploads[m][k] = e
        for m, e in enumerate(experts):
            e.load_state_dict(course.average(uploads[m]), strict=False)
        g.load_state_dict(course.average(gates), strict=False)
        for k in range(len(course.samples)):
            found = course.test(k, lambda x: probability(experts, g, x).log(), *experts, g)
            record.after[k], record.test_loss[k] = found
        history.append(record)
    return history


def ensemble(models: Sequence[nn.Module], course: Course, dealt: Sequence[Mapping[int, int]]) -> list[Round]:
    """Train the ensemble's rounds; `dealt[t]` maps each active client to the model it trains."""

    def answer(own: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
        return lambda x: (sum(torch.softmax(m(x), 1) for m in own) / len(own)).log()

    history = []
    for t, cohort in enumerate(course.cohorts):
        record = Round()
        trained: dict[int, dict[int, nn.Module]] = {q: {} for q in range(len(models))}
        for k in cohort:
            q = dealt[t][k]
            own = trained[q][k] = deepcopy(models[q])
            record.train_loss[k] = course.descend(
                t,
                k,
                {own: course.lr_shared},
                lambda x, y: F.cross_entropy(own(x), y),  # noqa: B023
            )
            mine = [own if m == q else model for m, model in enumerate(models)]
            record.before[k], _ = course.test(k, answer(mine), *mine)
        for q, by_client in trained.items():
            if by_client:
                models[q].load_state_dict(course.average(by_client), strict=False)
        for k in range(len(course.samples)):
            record.after[k], record.test_loss[k] = course.test(k, answer(models), *models)
        history.append(record)
    return history


def pretrained(
    model: nn.Module, epochs: Sequence[Sequence[tuple[Tensor, Tensor]]], lr: float, enough: Callable[[], bool]
) -> int:
    """Run SGD with momentum 0.9 until `enough`, checked after every step; return the number of steps."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    steps = 0
    for batches in epochs:
        for x, y in batches:
            model.train()
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            steps += 1
            if enough():
                return steps
    return steps
