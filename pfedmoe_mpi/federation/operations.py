"""Floating-point operations of a client step, counted while the method trains a few rows of zeros.

Counted are products of matrices, alone and in batches (layers, attention, recurrence, LoRA), and
convolutions, forward and backward, two operations for each multiply-add: what `torch.utils.flop_counter`
counts. Not counted are element-wise work, normalisation, optimisers, evaluations, servers, what runs before
round 1, and the factors of FedKD, whose number depends on the data.

A product is counted by its shapes and not computed: its result is zeros. So values do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.core.batches import Normalise, Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.kept import Kept
from pfedmoe_mpi.core.parts import Spec, Workbench
from pfedmoe_mpi.core.parts import Tensor as TensorPart
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.models import generators

CPU = torch.device("cpu")
# Rows of the smallest step: as many as have so many numbers, but at least two, for batch normalisation. What
# does not grow evenly is rounded: of FedAPEN's few held-out rows it may miss 2 % of an epoch.
NUMBERS, LEAST, MOST = 1 << 13, 2, 20
ROUND = 2  # that is counted: FedAPEN's weight learns from then on
ROUNDS = 200  # whose cohorts are looked through for the clients' roles


@dataclass(frozen=True)
class Operations:
    """The operations of a client step, in the five terms of which they are the sum.

    `fixed` is once a step; `row` for every training row; `epoch` for every row in every epoch; `batch` for
    every batch of an epoch, whatever its size, as LoRA's products are; `once` for every row in the client's
    first step: the frozen layers whose outputs are kept.
    """

    fixed: int
    row: int
    epoch: int
    batch: int
    once: int


def record(federation: Federation) -> dict[str, Any] | None:
    """Return `kinds`, the operations of each kind of client, and `clients`, the kind of each by number.

    Clients of one architecture and role are of one kind. None if roles may depend on what clients prepare,
    such as FedJETs' anchors by clusters: that is not known before round 1.
    """
    if federation.method.prepared_size:
        return None
    steps = Steps(federation)
    task = federation.task
    numbers: dict[tuple[str, str], int] = {}
    kinds: list[Operations] = []
    of_clients: list[int] = []
    for client, role in enumerate(_roles(federation.method)):
        key = task.architecture(client), role
        if key not in numbers:
            numbers[key] = len(kinds)
            kinds.append(steps.operations(client, role))
        of_clients.append(numbers[key])
    return {"kinds": [asdict(kind) for kind in kinds], "clients": of_clients}


def _roles(method: Algorithm) -> list[str]:
    """Return the first role of every client; of one that is not seen, that of another one."""
    task = method.task
    roles: dict[int, str] = {}
    for round in range(1, min(ROUNDS, task.config.rounds) + 1):
        roles = {**dict(method.cohort(round)), **roles}
        if len(roles) == len(task.training):
            break
    usual = next(iter(roles.values()), "client")
    return [roles.get(client, usual) for client in range(task.clients)]


class Steps:
    """Client steps of a federation's method, on the CPU and on modules of their own."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        kept = federation.workbench.kept
        tails = kept.tails if kept else {}
        self._rows = min(MOST, max(LEAST, NUMBERS // prod(federation.dataset.shape)))
        self._normalise = Normalise((), (), len(federation.dataset.shape), CPU)
        self._bench = Workbench(federation.config.seed, CPU)
        self._bench.kept = Kept(tails, self._normalise, 2 * self._rows, lambda: None) if tails else None
        self._state = self._vector(federation.method.state())

    def _vector(self, spec: Spec) -> Tensor:
        """Return values for the parts of `spec`: of modules some that are quickly made and not zero."""
        layout = self._bench.layout(spec)
        vector = torch.full((layout.size,), 0.01)
        for name, place in layout.parts.items():
            if isinstance(part := spec[name], TensorPart):
                vector[place] = part.initial()
        return vector

    def operations(self, client: int, role: str) -> Operations:
        """Return the operations of a client's step, solved for its terms from those of small steps."""
        rows = self._rows
        with generators.kept():
            private = self._vector(self._federation.method.client_state(client))
            first, least = self._count(client, role, private, rows)
            first_double, double = self._count(client, role, private, 2 * rows)
            _, twice = self._count(client, role, private, rows, epochs=2)
            batch = 0
            if double != 2 * least:  # else all of them grow with the rows
                batch = self._count(client, role, private, 2 * rows, batch=rows)[1] - double
        epoch = (twice - least - batch) // rows
        row = (double - least) // rows - epoch
        once = (first_double - double - first + least) // rows
        return Operations(least - batch - rows * (epoch + row), row, epoch, batch, once)

    def _count(
        self, client: int, role: str, private: Tensor, rows: int, epochs: int = 1, batch: int = 0
    ) -> tuple[int, int]:
        """Return the operations of a client's first step on so many rows of zeros, and of a later one.

        Args:
            batch: size of a batch; 0: one batch is an epoch.
        """
        federation = self._federation
        changes: dict[str, Any] = {"epochs": epochs, "steps": 0, "batch": batch or rows, "accumulate": 1}
        changes |= {"precision": "fp32", "clip": 0.0}
        train = federation.config.train.model_copy(update=changes)
        settings = federation.config.model_copy(update={"train": train})
        method = type(federation.method)(replace(federation.task, config=settings))
        method.prepared = federation.method.prepared
        engine = replace(
            federation.engine,
            device=CPU,
            normalise=self._normalise,
            train=train,
            evaluation_batch=rows,
            poll=lambda: None,
            kept=self._bench.kept,
            graphs=None,
        )
        x = torch.from_numpy(np.zeros((rows, *federation.dataset.shape), federation.dataset.dtype))
        split = Split(x, torch.arange(rows) % federation.task.classes)
        state, spec = method.state(), method.client_state(client)
        trained = Client(client, spec, torch.empty(0), dict.fromkeys(("train", "validation", "test"), split))

        def step() -> int:
            parts = self._bench.parts((state, self._state), (spec, private))
            with counting() as counter:
                method.client_step(Turn(engine, method.loss, trained, parts, ROUND, role))
            return counter.total

        first = step()
        return first, step() if engine.kept else first


@contextmanager
def counting() -> Iterator[Counter]:
    """Count operations; attention and recurrence take the form of products of matrices, not fused kernels."""
    one_dnn, fused = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch._C._set_mkldnn_enabled(False)  # it has recurrent layers; `torch.backends.mkldnn.flags` warns
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
            yield counter
    finally:
        torch._C._set_mkldnn_enabled(one_dnn)
        torch.backends.mha.set_fastpath_enabled(fused)


class Counter(TorchDispatchMode):
    """Mode in which products are counted in `total` and not computed, and optimisers do nothing.

    It counts as torch's `FlopCounterMode` does, whose import and first operator take seconds. They differ in
    the gradient of the weights of a convolution in g groups, which torch's takes for g times as much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in UPDATES:
            return None
        product = PRODUCTS.get(func)
        if product is None:
            return func(*args, **(kwargs or {}))
        operations, result = product(*args)
        self.total += operations
        return result


def _matrices(a: Tensor, b: Tensor) -> tuple[int, Tensor]:
    """Count a·b, (…, m, k) by (…, k, n)."""
    return 2 * a.numel() * b.shape[-1], a.new_zeros(*a.shape[:-1], b.shape[-1])


def _convolution(x: Tensor, weight: Tensor, bias: Any, *how: Any) -> tuple[int, Tensor]:
    """Count a convolution of x (B, C, …)."""
    stride, padding, dilation, transposed, output_padding, groups = how
    kernel = [d * (k - 1) for d, k in zip(_each(dilation, x), weight.shape[2:], strict=True)]
    sizes = zip(
        x.shape[2:], kernel, _each(stride, x), _each(padding, x), _each(output_padding, x), strict=True
    )
    if transposed:
        channels = weight.shape[1] * groups
        shape = [(n - 1) * s - 2 * p + k + o + 1 for n, k, s, p, o in sizes]
    else:
        channels = weight.shape[0]
        shape = [(n + 2 * p - k - 1) // s + 1 for n, k, s, p, _ in sizes]
    y = x.new_zeros(len(x), channels, *shape)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous(memory_format=torch.channels_last)
    return _uses(x, y, weight, transposed), y


def _convolution_backward(y: Tensor, x: Tensor, weight: Tensor, sizes: Any, *how: Any) -> tuple[int, Any]:
    """Count the gradients of a convolution by its input, weights and bias, or those that are wanted."""
    transposed: bool = how[3]
    by_input, by_weight, by_bias = how[-1]
    result = (
        torch.zeros_like(x) if by_input else None,
        torch.zeros_like(weight) if by_weight else None,
        y.new_zeros(y.shape[1]) if by_bias else None,
    )
    return (by_input + by_weight) * _uses(x, y, weight, transposed), result


def _uses(x: Tensor, y: Tensor, weight: Tensor, transposed: bool) -> int:
    """Return the operations of a convolution: every weight is used once at each place of y, or of x."""
    return 2 * len(x) * weight.numel() * prod((x if transposed else y).shape[2:])


def _each(sizes: Sequence[int], x: Tensor) -> Sequence[int]:
    """Return one size for every dimension of space."""
    return sizes if len(sizes) == x.ndim - 2 else [*sizes] * (x.ndim - 2)


aten = torch.ops.aten
PRODUCTS: Mapping[Any, Callable[..., tuple[int, Any]]] = {
    aten.mm.default: _matrices,
    aten.bmm.default: _matrices,
    aten.addmm.default: lambda _, a, b: _matrices(a, b),
    aten.baddbmm.default: lambda _, a, b: _matrices(a, b),
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
UPDATES = {aten._fused_sgd_.default, aten._fused_adam_.default, aten._fused_adamw_.default}  # of optimisers
