"""Rounds of methods whose shared model trains beside a private one, written from the papers' equations.

Nothing of the program is used here. Every function changes the modules it is given and returns one `Round`
per round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.methods import Course, Round

Losses = Callable[[Tensor, Tensor, nn.Module], Sequence[tuple[Tensor, Sequence[nn.Module]]]]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ_c p_c log(p_c / q_c) of probabilities (B, classes), averaged over the batch."""
    return (p * (p.log() - q.log())).sum(1).mean()


def own_gradients(losses: Sequence[tuple[Tensor, Sequence[nn.Module]]]) -> Tensor:
    """The sum of the losses, in which every module has the gradient of those it is named with alone."""
    total = sum({id(loss): loss.detach() for loss, _ in losses}.values())
    for loss, modules in losses:
        parameters = [p for module in modules for p in module.parameters()]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for p, g in zip(parameters, found, strict=True):
            if g is not None:
                total = total + (g * (p - p.detach())).sum()
    return total


def play(
    shared: nn.Module,
    course: Course,
    rates: Callable[[int, nn.Module], Mapping[nn.Module, float]],
    losses: Callable[[int], Losses],
    predict: Callable[[int, nn.Module], Callable[[Tensor], Tensor]],
    before: Callable[[int, int, nn.Module], None] | None = None,
    combine: Callable[[int, Mapping[int, nn.Module]], None] | None = None,
) -> list[Round]:
    """Rounds in which client k trains a copy g of `shared` with what `rates(k, g)` names.

    `losses(k)(x, y, g)` are losses and the modules that descend each; the copies' mean, weighted by samples,
    is the next `shared`, unless `combine` sets it.
    """
    history = []
    for t, cohort in enumerate(course.cohorts):
        record, copies = Round(), {}
        for k in cohort:
            g = copies[k] = deepcopy(shared)
            if before:
                before(t, k, g)
            trained = rates(k, g)

            def loss(x: Tensor, y: Tensor, k: int = k, g: nn.Module = g) -> Tensor:
                return own_gradients(losses(k)(x, y, g))

            record.train_loss[k] = course.descend(t, k, trained, loss)
            record.before[k], _ = course.test(k, predict(k, g), *trained)
        if combine:
            combine(t, copies)
        else:
            shared.load_state_dict(course.average(copies), strict=False)
        for k in range(len(course.samples)):
            measured = course.test(k, predict(k, shared), *rates(k, shared))
            record.after[k], record.test_loss[k] = measured
        history.append(record)
    return history


def fml(
    shared: nn.Module, models: Sequence[nn.Module], course: Course, alpha: float, beta: float
) -> list[Round]:
    """Shen et al. 2020."""

    def losses(k: int) -> Losses:
        def of(x: Tensor, y: Tensor, meme: nn.Module) -> list[tuple[Tensor, list[nn.Module]]]:
            z_l, z_m = models[k](x), meme(x)
            p_l, p_m = torch.softmax(z_l, 1), torch.softmax(z_m, 1)
            local = alpha * F.cross_entropy(z_l, y) + (1 - alpha) * kl(p_m, p_l)
            general = beta * F.cross_entropy(z_m, y) + (1 - beta) * kl(p_l, p_m)
            return [(local, [models[k]]), (general, [meme])]

        return of

    return play(
        shared,
        course,
        lambda k, g: {g: course.lr_shared, models[k]: course.lr},
        losses,
        lambda k, g: models[k],
    )


def fedapen(
    shared: nn.Module,
    models: Sequence[nn.Module],
    weights: list[float],
    held: Sequence[Sequence[int]],
    course: Course,
    lr_weight: float,
    passes: int,
    batch: int,
) -> list[Round]:
    """Qin et al. 2023; `held[k]` are the rows of client k's samples that only `weights[k]` learns from."""

    def ensemble(k: int, g: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: weights[k] * models[k](x) + (1 - weights[k]) * g(x)

    def learn(t: int, k: int, g: nn.Module) -> None:
        if t == 0:
            return
        models[k].eval()
        g.eval()
        rows = sorted(held[k])
        x, y = (part[rows] for part in course.samples[k].train)
        with torch.no_grad():
            z_p, z_s = models[k](x).double(), g(x).double()
        hot = F.one_hot(y, z_p.shape[1])
        for _ in range(passes):
            for piece in torch.arange(len(rows)).split(batch):
                p = torch.softmax(weights[k] * z_p + (1 - weights[k]) * z_s, 1)
                slope = float(((p - hot) * (z_p - z_s))[piece].sum(1).mean())
                weights[k] = float(np.clip(weights[k] - lr_weight * course.rates[t] * slope, 0, 1))

    def losses(k: int) -> Losses:
        kept_back = course.samples[k].train[0][list(held[k])]

        def of(x: Tensor, y: Tensor, g: nn.Module) -> list[tuple[Tensor, list[nn.Module]]]:
            mine = torch.tensor([not any(torch.equal(one, other) for other in kept_back) for one in x])
            z_p, z_s = models[k](x)[mine], g(x)[mine]
            if not mine.any():
                return [(z_p.sum(), [models[k]]), (z_s.sum(), [g])]
            p_p, p_s = torch.softmax(z_p, 1), torch.softmax(z_s, 1)
            both = F.cross_entropy(weights[k] * z_p + (1 - weights[k]) * z_s, y[mine])
            private = F.cross_entropy(z_p, y[mine]) + kl(p_s, p_p) + both
            general = F.cross_entropy(z_s, y[mine]) + kl(p_p, p_s) + both
            return [(private, [models[k]]), (general, [g])]

        return of

    return play(
        shared,
        course,
        lambda k, g: {g: course.lr_shared, models[k]: course.lr},
        losses,
        ensemble,
        before=learn,
    )


def fedmrl(
    shared: nn.Module,
    models: Sequence[nn.Module],
    projectors: Sequence[nn.Module],
    course: Course,
    m1: float,
    m2: float,
) -> list[Round]:
    """Yi et al. 2024."""
    d1 = shared.head.in_features

    def fused(k: int, g: nn.Module, x: Tensor) -> Tensor:
        return projectors[k](torch.hstack([g.extractor(x), models[k].extractor(x)]))

    def losses(k: int) -> Losses:
        def of(x: Tensor, y: Tensor, g: nn.Module) -> list[tuple[Tensor, list[nn.Module]]]:
            r = fused(k, g, x)
            loss = m1 * F.cross_entropy(g.head(r[:, :d1]), y) + m2 * F.cross_entropy(models[k].head(r), y)
            return [(loss, [g, models[k], projectors[k]])]

        return of

    return play(
        shared,
        course,
        lambda k, g: {g: course.lr_shared, models[k]: course.lr, projectors[k]: course.lr},
        losses,
        lambda k, g: lambda x: models[k].head(fused(k, g, x)),
    )


def fedkd(
    shared: nn.Module,
    models: Sequence[nn.Module],
    maps: Sequence[nn.Module],
    course: Course,
    energies: Sequence[float],
) -> tuple[list[Round], list[dict[int, int]], list[int]]:
    """Wu et al. 2022, eqs. 1 to 8; `energies[t]` is T in round t.

    Also how many numbers each client sent up in every round, and the server down after it.
    """
    up: list[dict[int, int]] = []
    down: list[int] = []

    def losses(k: int) -> Losses:
        def of(x: Tensor, y: Tensor, g: nn.Module) -> list[tuple[Tensor, list[nn.Module]]]:
            h_t, h_s = models[k].extractor(x), g.extractor(x)
            z_t, z_s = models[k].head(h_t), g.head(h_s)
            y_t, y_s = torch.softmax(z_t, 1), torch.softmax(z_s, 1)
            task_t, task_s = F.cross_entropy(z_t, y), F.cross_entropy(z_s, y)
            hidden = ((h_t - h_s @ maps[k].weight.T) ** 2).mean()
            mentor = task_t + (kl(y_s, y_t) + hidden) / (task_t + task_s)
            mentee = task_s + (kl(y_t, y_s) + hidden) / (task_t + task_s)
            return [(mentor, [models[k]]), (mentee, [g]), (mentor, [maps[k]]), (mentee, [maps[k]])]

        return of

    def combine(t: int, copies: Mapping[int, nn.Module]) -> None:
        state = {name: v for name, v in shared.state_dict().items() if v.is_floating_point()}
        n = {k: course.samples[k].n for k in copies}
        up.append({})
        mean = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in state.items()}
        for k, g in copies.items():
            sent = {name: squeezed(g.state_dict()[name] - v, energies[t]) for name, v in state.items()}
            up[-1][k] = sum(numbers for _, numbers in sent.values())
            for name, (value, _) in sent.items():
                mean[name] += n[k] * value / sum(n.values())
        received = {name: squeezed(v, energies[t]) for name, v in mean.items()}
        down.append(sum(numbers for _, numbers in received.values()))
        new = {name: v + received[name][0].float() for name, v in state.items()}
        shared.load_state_dict(new, strict=False)

    history = play(
        shared,
        course,
        lambda k, g: {g: course.lr_shared, models[k]: course.lr, maps[k]: course.lr},
        losses,
        lambda k, g: models[k],
        combine=combine,
    )
    return history, up, down


def squeezed(tensor: Tensor, energy: float) -> tuple[Tensor, int]:
    """Return a tensor as its receiver rebuilds it and the count of numbers sent; from ΔᵀΔ's eigenvectors."""
    if tensor.ndim < 2:
        return tensor.double(), tensor.numel()
    matrix = tensor.double().reshape(len(tensor), -1).numpy()
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    order = np.argsort(squares)[::-1]
    for rank in range(1, min(matrix.shape) + 1):
        if squares[order[:rank]].sum() > energy * squares.sum():
            break
    numbers = rank * (sum(matrix.shape) + 1)
    if numbers >= matrix.size:
        return tensor.double(), tensor.numel()
    kept = vectors[:, order[:rank]]
    return torch.from_numpy(matrix @ kept @ kept.T).reshape(tensor.shape), numbers
