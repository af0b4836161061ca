"""Rounds of FedProx, FedRep, LG-FedAvg and the methods that share something per class, from their equations.

Only torch is used: a test passes in starting weights, cohorts, batches and the server's shuffles. Every
function changes the modules it is given and returns one `Round` per round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.methods import Course, Predict, Round, entropy

Shuffles = Sequence[Sequence[Tensor]]  # of the server: by round and epoch, rows in the order they are taken


def chain(*modules: nn.Module) -> Predict:
    """Return the composition of modules, applied in this order."""
    return nn.Sequential(*modules)


Answer = Callable[[int], tuple[Predict, list[nn.Module]]]


def measure_all(record: Round, course: Course, answer: Answer) -> None:
    """Measure every client after aggregation."""
    for k in range(len(course.samples)):
        predict, modules = answer(k)
        record.after[k], record.test_loss[k] = course.test(k, predict, *modules)


def fedprox(model: nn.Module, course: Course, mu: float) -> list[Round]:
    """Li et al. 2020: F_k(w) + μ/2·‖w − w^t‖²; the sum of FedAvg."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            w = uploads[k] = deepcopy(model)

            def loss(x: Tensor, y: Tensor, w: nn.Module = w) -> Tensor:
                apart = [p - q.detach() for p, q in zip(w.parameters(), model.parameters(), strict=True)]
                return F.cross_entropy(w(x), y) + 0.5 * mu * sum((a * a).sum() for a in apart)

            record.train_loss[k] = course.descend(t, k, {w: course.lr_shared}, loss)
            record.before[k], _ = course.test(k, w, w)
        model.load_state_dict(course.average(uploads), strict=False)
        measure_all(record, course, lambda k: (model, [model]))
        history.append(record)
    return history


def epochs(course: Course, chosen: slice) -> Course:
    """The course with some of every round's epochs."""
    kept = [replace(s, epochs=[round[chosen] for round in s.epochs]) for s in course.samples]
    return replace(course, samples=kept)


def fedrep(body: nn.Module, heads: Sequence[nn.Module], course: Course, head_epochs: int) -> list[Round]:
    """Collins et al. 2021, Algorithm 1; the first epochs of a round are the head's, the others the body's."""
    history = []
    of_head, of_body = epochs(course, slice(head_epochs)), epochs(course, slice(head_epochs, None))
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            phi = uploads[k] = deepcopy(body)
            predict = chain(phi, heads[k])
            phi.eval()
            if head_epochs:
                of_head.descend(t, k, {heads[k]: course.lr}, entropy(predict))
            record.train_loss[k] = of_body.descend(t, k, {phi: course.lr_shared}, entropy(predict))
            record.before[k], _ = course.test(k, predict, phi, heads[k])
        body.load_state_dict(course.average(uploads), strict=False)
        measure_all(record, course, lambda k: (chain(body, heads[k]), [body, heads[k]]))
        history.append(record)
    return history


def lg_fedavg(head: nn.Module, extractors: Sequence[nn.Module], course: Course) -> list[Round]:
    """Liang et al. 2020: private representations, an averaged head, both trained together."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record, uploads = Round(), {}
        for k in cohort:
            g = uploads[k] = deepcopy(head)
            predict = chain(extractors[k], g)
            rates = {g: course.lr_shared, extractors[k]: course.lr}
            record.train_loss[k] = course.descend(t, k, rates, entropy(predict))
            record.before[k], _ = course.test(k, predict, *rates)
        head.load_state_dict(course.average(uploads))
        measure_all(record, course, lambda k: (chain(extractors[k], head), [extractors[k], head]))
        history.append(record)
    return history


def fd(
    last: dict[int, dict[int, Tensor]],
    models: Sequence[nn.Module],
    course: Course,
    weight: float,
    lost: Callable[[int, int], bool] = lambda t, k: False,
    seen: dict[int, dict[int, Tensor]] | None = None,
) -> list[Round]:
    """Jeong et al. 2018; `last[c][k]` is F_k,c of those in the newest sum of class c, and is filled here.

    Args:
        lost: whether what client k sends in round t never arrives; the client does not know.
        seen: F_k,c by client of its last turn, filled here.
    """
    history = []
    own: dict[int, dict[int, Tensor]] = {} if seen is None else seen
    for t, cohort in enumerate(course.cohorts):
        record, arrived = Round(), {}
        for k in cohort:
            model, outputs = models[k], {}

            def teacher(c: int, k: int = k) -> Tensor | None:
                there = last.get(c, {})
                if k in there and not torch.equal(there[k], own[k].get(c, torch.zeros(()))):
                    return None  # it cannot take out what it no longer has
                others = [f for i, f in there.items() if i != k]
                return sum(others) / len(others) if others else None

            def loss(x: Tensor, y: Tensor, model: nn.Module = model, outputs: dict = outputs) -> Tensor:
                logits = model(x)
                value = F.cross_entropy(logits, y)
                for i, c in enumerate(y.tolist()):
                    p = torch.softmax(logits[i], 0)
                    outputs.setdefault(c, []).append(p.detach())
                    if (f := teacher(c)) is not None:
                        value = value - weight * (f * torch.log(p)).sum() / len(y)
                return value

            record.train_loss[k] = course.descend(t, k, {model: course.lr}, loss)
            record.before[k], _ = course.test(k, model, model)
            own[k] = {c: torch.stack(found).mean(0) for c, found in outputs.items()}
            if not lost(t, k):
                for c, f in own[k].items():
                    arrived.setdefault(c, {})[k] = f
        last.update(arrived)
        measure_all(record, course, lambda k: (models[k], [models[k]]))
        history.append(record)
    return history


def representations(course: Course, k: int, extractor: nn.Module) -> dict[int, Tensor]:
    """The mean representation of every class of a client, in evaluation mode."""
    x, y = course.samples[k].train
    extractor.eval()
    with torch.no_grad():
        r = extractor(x)
    return {c: r[y == c].mean(0) for c in sorted(set(y.tolist()))}


def plain_sgd(
    parameters: Sequence[Tensor],
    rows: Sequence[tuple[int, Tensor]],
    shuffles: Sequence[Tensor],
    batch: int,
    lr: float,
    clip: float,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """θ ← θ − η·g over rows (class, vector), the gradient's joint norm bounded."""
    for order in shuffles:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch].tolist()
            x, y = torch.stack([rows[i][1] for i in chosen]), torch.tensor([rows[i][0] for i in chosen])
            gradients = torch.autograd.grad(loss(x, y), parameters)
            norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
            shrink = clip / norm if clip and norm > clip else 1.0
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= lr * shrink * g


def fedgh(
    head: nn.Module,
    extractors: Sequence[nn.Module],
    course: Course,
    shuffles: Shuffles,
    batch: int,
    lr: float,
) -> list[Round]:
    """Yi et al. 2023: θ ← θ − η ∇ℓ(H(θ; R̄_k,c), c) at the server."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record = Round()
        rows: list[tuple[int, Tensor]] = []
        for k in cohort:
            own = deepcopy(head)
            predict = chain(extractors[k], own)
            rates = {own: course.lr_shared, extractors[k]: course.lr}
            record.train_loss[k] = course.descend(t, k, rates, entropy(predict))
            record.before[k], _ = course.test(k, predict, *rates)
            rows += representations(course, k, extractors[k]).items()
        theta, eta = list(head.parameters()), lr * course.rates[t]
        plain_sgd(theta, rows, shuffles[t], batch, eta, course.clip, entropy(head))
        measure_all(record, course, lambda k: (chain(extractors[k], head), [extractors[k], head]))
        history.append(record)
    return history


def fedtgp(
    generator: dict[str, Tensor],
    models: Sequence[nn.Module],
    course: Course,
    shuffles: Shuffles,
    batch: int,
    weight: float,
    tau: float,
    nearest: bool,
) -> tuple[list[Round], list[Tensor]]:
    """Zhang et al. 2024; the generator's tensors by name are trained here; also the prototypes."""
    history = []
    theta = {name: tensor.clone().requires_grad_() for name, tensor in generator.items()}
    prototypes: list[Tensor] = []

    def generate() -> list[Tensor]:
        middle, bias = theta["middle.weight"], theta["middle.bias"]
        hidden = [torch.relu(middle @ e + bias) for e in theta["embedding.weight"]]
        return [theta["last.weight"] @ h + theta["last.bias"] for h in hidden]

    def answer(k: int) -> Predict:
        if not (nearest and prototypes):
            return models[k]
        return lambda x: -torch.stack([((models[k].extractor(x) - p) ** 2).mean(1) for p in prototypes], 1)

    for t, cohort in enumerate(course.cohorts):
        record = Round()
        rows: list[tuple[int, Tensor]] = []
        for k in cohort:
            model = models[k]

            def loss(x: Tensor, y: Tensor, model: nn.Module = model, now: list = prototypes) -> Tensor:
                r = model.extractor(x)
                value = F.cross_entropy(model.head(r), y)
                return value + weight * F.mse_loss(r, torch.stack([now[c] for c in y])) if now else value

            record.train_loss[k] = course.descend(t, k, {model: course.lr}, loss)
            record.before[k], _ = course.test(k, answer(k), model)
            rows += representations(course, k, model.extractor).items()
        q = {c: torch.stack([p for its, p in rows if its == c]).mean(0) for c, _ in rows}
        margins = [min(float((q[c] - q[other]).norm()) for other in q if other != c) for c in q if len(q) > 1]
        delta = min([*([max(margins)] if margins else []), tau])

        def contrast(x: Tensor, y: Tensor, delta: float = delta) -> Tensor:
            terms = []
            for p, c in zip(x, y.tolist(), strict=True):
                apart = [(p - g).norm() + (delta if i == c else 0.0) for i, g in enumerate(generate())]
                close = [torch.exp(-distance) for distance in apart]
                terms.append(-torch.log(close[c] / sum(close)))
            return sum(terms) / len(terms)

        eta = course.lr * course.rates[t]
        plain_sgd(list(theta.values()), rows, shuffles[t], batch, eta, course.clip, contrast)
        with torch.no_grad():
            prototypes = generate()
        measure_all(record, course, lambda k: (answer(k), [models[k]]))
        history.append(record)
    generator.update({name: tensor.detach() for name, tensor in theta.items()})
    return history, prototypes


def fedssa(
    rows: list[tuple[Tensor, Tensor]], models: Sequence[nn.Module], course: Course, mu: float, stable: int
) -> list[Round]:
    """Yi et al. 2024; `rows[c]` is φ^c, weights and bias of class c, and is changed here."""
    history = []
    for t, cohort in enumerate(course.cohorts):
        record = Round()
        sent: dict[int, list[tuple[Tensor, Tensor]]] = {}
        now = mu * math.cos(math.pi * t / (2 * stable)) if stable and t <= stable else 0.0
        for k in cohort:
            model, held = models[k], sorted(set(course.samples[k].train[1].tolist()))
            with torch.no_grad():
                for c in held:
                    model.head.weight[c] = now * model.head.weight[c] + rows[c][0]
                    model.head.bias[c] = now * model.head.bias[c] + rows[c][1]
            record.train_loss[k] = course.descend(t, k, {model: course.lr}, entropy(model))
            record.before[k], _ = course.test(k, model, model)
            for c in held:
                own = model.head.weight[c].detach().clone(), model.head.bias[c].detach().clone()
                sent.setdefault(c, []).append(own)
        for c, found in sent.items():
            weights, biases = zip(*found, strict=True)
            rows[c] = sum(weights) / len(found), sum(biases) / len(found)
        measure_all(record, course, lambda k: (models[k], [models[k]]))
        history.append(record)
    return history
