"""Rounds of methods that keep a model, or layers, of a client's own, from the papers' equations; FedEM and
pFedAFM from their abstracts and the authors' code.

Only torch is used: a test passes in starting weights, cohorts and batches. Every function changes the modules
it is given and returns one `Round` per round.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.classes import chain, epochs, measure_all
from oracles.methods import Course, Predict, Round, entropy


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


def fedper(base: nn.Module, heads: Sequence[nn.Module], course: Course) -> list[Round]:
    """Arivazhagan et al. 2019: W_Bj and W_Pj move together, and the server averages the W_Bj."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            own = uploads[k] = deepcopy(base)
            rates, predict = {own: course.lr_shared, heads[k]: course.lr}, chain(own, heads[k])
            record.train_loss[k] = course.descend(t, k, rates, entropy(predict))
            record.before[k], _ = course.test(k, predict, *rates)
        base.load_state_dict(course.average(uploads), strict=False)
        measure_all(record, course, lambda k: (chain(base, heads[k]), [base, heads[k]]))
        history.append(record)
    return history


def pfedafm(
    theta: nn.Module,
    models: Sequence[nn.Module],
    alphas: Sequence[nn.Parameter],
    course: Course,
    length: int,
) -> list[Round]:
    """Yi et al. 2024: the first `length` epochs of a round are of ω_k and α_k, the others of θ_k."""

    def mixed(g: nn.Module, k: int) -> nn.Module:
        class Mixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                general, own = g(x), models[k].extractor(x)
                return models[k].head(general - alphas[k] * general + alphas[k] * own)

        return Mixed()

    history = []
    own_epochs, shared_epochs = epochs(course, slice(length)), epochs(course, slice(length, None))
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            g, model, alpha = deepcopy(theta), models[k], alphas[k]
            rates = [(list(model.parameters()), course.lr), ([alpha], course.lr_gate)]
            optimiser = torch.optim.SGD(
                [{"params": group, "lr": lr * course.rates[t]} for group, lr in rates],
                momentum=course.momentum,
                weight_decay=course.weight_decay,
            )
            g.eval()
            model.train()
            predict = mixed(g, k)
            for batches in own_epochs.samples[k].epochs[t]:
                for x, y in batches:
                    optimiser.zero_grad()
                    F.cross_entropy(predict(x), y).backward()
                    if course.clip:
                        nn.utils.clip_grad_norm_([*model.parameters(), alpha], course.clip)
                    optimiser.step()
                    alpha.data = alpha.data.clip(0, 1)
            model.eval()
            record.train_loss[k] = shared_epochs.descend(
                t, k, {g: course.lr_shared}, entropy(chain(g, model.head))
            )
            record.before[k], _ = course.test(k, mixed(g, k), g, model)
            uploads[k] = g
        theta.load_state_dict(course.average(uploads), strict=False)
        measure_all(record, course, lambda k: (mixed(theta, k), [theta, models[k]]))
        history.append(record)
    return history


def posterior(components: Sequence[nn.Module], weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """q_s(m) of Marfoq et al. 2021 for samples (x, y), in float64."""
    with torch.no_grad():
        p = torch.stack([m.eval()(x).double().softmax(1) for m in components])
    joint = weights.double().view(-1, 1) * p[:, torch.arange(len(y)), y]
    return (joint / joint.sum(0)).T


def fedem(components: Sequence[nn.Module], weights: list[Tensor], course: Course) -> list[Round]:
    """Marfoq et al. 2021; `weights` holds the clients' π_t, and is changed here."""

    def answer(own: Sequence[nn.Module], k: int) -> Predict:
        return lambda x: sum(w * m(x).softmax(1) for w, m in zip(weights[k], own, strict=True)).log()

    history = []
    for t, cohort in enumerate(course.cohorts):
        record = Round()
        uploads: list[dict[int, nn.Module]] = [{} for _ in components]
        for k in cohort:
            own, samples = [deepcopy(m) for m in components], course.samples[k]
            q = posterior(own, weights[k], *samples.train).float()
            weights[k] = q.mean(0)
            of_sample = {tuple(x.flatten().tolist()): row for x, row in zip(samples.train[0], q, strict=True)}
            assert len(of_sample) == samples.n, "equal samples"

            def loss(x: Tensor, y: Tensor, own: list = own, of_sample: dict = of_sample) -> Tensor:
                rows = torch.stack([of_sample[tuple(one.flatten().tolist())] for one in x])
                losses = [F.cross_entropy(m(x), y, reduction="none") for m in own]
                return sum((rows[:, m] * each).mean() for m, each in enumerate(losses))

            record.train_loss[k] = course.descend(t, k, dict.fromkeys(own, course.lr_shared), loss)
            record.before[k], _ = course.test(k, answer(own, k), *own)
            for m, module in enumerate(own):
                uploads[m][k] = module
        for module, sent in zip(components, uploads, strict=True):
            module.load_state_dict(course.average(sent), strict=False)
        measure_all(record, course, lambda k: (answer(components, k), list(components)))
        history.append(record)
    return history
