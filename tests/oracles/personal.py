"""Rounds of methods that keep a model, or layers, of a client's own, from the papers' equations.

Only torch is used: a test passes in starting weights, cohorts and batches. Every function changes the modules
it is given and returns one `Round` per round.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.classes import epochs, measure_all
from oracles.methods import Course, Round, entropy


def ditto(
    model: nn.Module, personal: Sequence[nn.Module], course: Course, weight: float, length: int
) -> list[Round]:
    """Li et al. 2021, algorithm 1, with h_k(v; w^t) = F_k(v) + λ/2 ‖v − w^t‖².

    The first `length` epochs of a round are v's, the others w's.
    """
    history = []
    of_own, of_shared = epochs(course, slice(length)), epochs(course, slice(length, None))
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        start = [p.detach().clone() for p in model.parameters()]
        for k in cohort:
            v, w = personal[k], deepcopy(model)

            def h(x: Tensor, y: Tensor, v: nn.Module = v, start: list = start) -> Tensor:
                apart = [((p - q) ** 2).sum() for p, q in zip(v.parameters(), start, strict=True)]
                return F.cross_entropy(v(x), y) + weight / 2 * sum(apart)

            of_own.descend(t, k, {v: course.lr}, h)
            uploads[k] = w
            record.train_loss[k] = of_shared.descend(t, k, {w: course.lr_shared}, entropy(w))
            record.before[k], _ = course.test(k, v, v)
        model.load_state_dict(course.average(uploads), strict=False)
        measure_all(record, course, lambda k: (personal[k], [personal[k]]))
        history.append(record)
    return history


def apfl(
    model: nn.Module,
    personal: Sequence[nn.Module],
    alpha: list[float],
    course: Course,
    adaptive: bool,
) -> list[Round]:
    """Deng et al. 2020, algorithm 1 and the rule for α; v̄ is a module of its own, mixed before every step."""

    def mix(k: int, w: nn.Module) -> nn.Module:
        mixed = deepcopy(personal[k])
        with torch.no_grad():
            for p, v, own in zip(mixed.parameters(), personal[k].parameters(), w.parameters(), strict=True):
                p.copy_(alpha[k] * v + (1 - alpha[k]) * own)
        return mixed

    history = []
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            v, w = personal[k], deepcopy(model)
            optimiser = torch.optim.SGD(
                [
                    {"params": list(w.parameters()), "lr": course.lr_shared * course.rates[t]},
                    {"params": list(v.parameters()), "lr": course.lr * course.rates[t]},
                ],
                momentum=course.momentum,
                weight_decay=course.weight_decay,
            )
            first = adaptive
            for batches in course.samples[k].epochs[t]:
                total = 0.0
                for x, y in batches:
                    mixed = mix(k, w).train()
                    w.train()
                    optimiser.zero_grad()
                    value = F.cross_entropy(w(x), y)
                    value.backward()
                    of_mixture = F.cross_entropy(mixed(x), y)
                    gradients = torch.autograd.grad(of_mixture, list(mixed.parameters()))
                    for p, g in zip(v.parameters(), gradients, strict=True):
                        p.grad = alpha[k] * g
                    apart = zip(v.parameters(), w.parameters(), gradients, strict=True)
                    slope = sum(float(((p.detach() - q.detach()) * g).sum()) for p, q, g in apart)
                    for mine, theirs in zip(v.buffers(), mixed.buffers(), strict=True):
                        mine.copy_(theirs)
                    if course.clip:
                        nn.utils.clip_grad_norm_([*w.parameters(), *v.parameters()], course.clip)
                    optimiser.step()
                    if first:
                        alpha[k] = min(1.0, max(0.0, alpha[k] - course.lr * course.rates[t] * slope))
                        first = False
                    total += float((value + of_mixture).detach()) * len(y)
            record.train_loss[k] = total / course.samples[k].n
            uploads[k] = w
            mixed = mix(k, w)
            record.before[k], _ = course.test(k, mixed, mixed)
        names = model.state_dict().keys()
        states = [w.state_dict() for w in uploads.values()]
        means = {n: torch.stack([s[n].double() for s in states]).mean(0).float() for n in names}
        model.load_state_dict(means)
        mixtures = [mix(k, model) for k in range(len(course.samples))]
        measure_all(record, course, lambda k: (mixtures[k], [mixtures[k]]))  # noqa: B023
        history.append(record)
    return history


def fedbn(models: Sequence[nn.Module], course: Course) -> list[Round]:
    """Li et al. 2021, algorithm 1: `models[k]` is client k's, all equal outside of BatchNorm."""
    inside = tuple(f"{name}." for name, m in models[0].named_modules() if isinstance(m, nn.BatchNorm1d))
    history = []
    for t, cohort in enumerate(course.cohorts):
        record = Round()
        for k in cohort:
            rates = {models[k]: course.lr_shared}
            record.train_loss[k] = course.descend(t, k, rates, entropy(models[k]))
            record.before[k], _ = course.test(k, models[k], models[k])
        means = course.average({k: models[k] for k in cohort})
        shared = {name: mean for name, mean in means.items() if not inside or not name.startswith(inside)}
        for model in models:
            model.load_state_dict(shared, strict=False)
        measure_all(record, course, lambda k: (models[k], [models[k]]))
        history.append(record)
    return history
