"""Where the trained part of a model with frozen layers begins: found by trial, once for every kind."""

from __future__ import annotations

import os.path
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi.core.batches import channels_last
from pfedmoe_mpi.core.flat import frozen_modules, tensors
from pfedmoe_mpi.models import generators
from pfedmoe_mpi.models.registry import Model

SAMPLES = 4  # of the trial


@dataclass(frozen=True)
class Tail:
    """The last module of an extractor, with all that is trained of it; `path` None: nothing of it is trained.

    Its input, `size` numbers per sample, depends on the sample alone. The extractor's output is that of the
    module, or with `relu` the ReLU of it. Without a path the input is the extractor's output.
    """

    path: str | None
    size: int
    relu: bool = False


def extractor_of(module: nn.Module) -> nn.Module:
    """Return the extractor of a model, or an extractor itself."""
    return module.extractor if isinstance(module, Model) else module


def find(module: nn.Module, shape: Sequence[int], vocabulary: int = 0) -> Tail | None:
    """Return the tail of a model or extractor on the CPU that takes samples of `shape`, None if it has none.

    The smallest module that contains what is trained is tried first, then the ones around it. None is found
    if something before it is trained, draws random numbers in training, such as a dropout outside of the
    frozen modules, or mixes samples, such as a BatchNorm without statistics.
    """
    body = extractor_of(module)
    if not tensors(body, frozen=True):
        return None
    with generators.kept():
        generators.seed(0)
        x = torch.randn(SAMPLES, *shape)
        if vocabulary:
            x = torch.randint(vocabulary, x.shape, dtype=torch.int32)
        tried = (_try(body, path, channels_last(x)) for path in _candidates(list(tensors(body))))
        return next((tail for tail in tried if tail), None)


def _candidates(names: Sequence[str]) -> list[str | None]:
    """Return the path of the smallest module that contains these tensors, and of those around it."""
    if not names:
        return [None]
    common = os.path.commonpath([name.rpartition(".")[0].replace(".", "/") for name in names])
    steps = common.split("/") if common else []
    return [".".join(steps[:length]) for length in range(len(steps), 0, -1)]


def _try(body: nn.Module, path: str | None, x: Tensor) -> Tail | None:
    """Return the tail that begins at `path`, None if its input depends on more than each sample."""
    body.train()
    for module in frozen_modules(body).values():
        module.eval()
    trained = _Pass(body, path)
    trained.run(x)
    body.eval()
    evaluated, first = _Pass(body, path), _Pass(body, path)
    with torch.no_grad():
        evaluated.run(x)
        first.run(x[: SAMPLES // 2])
    if not (trained.plain and evaluated.plain and first.plain) or trained.drew or trained.relu is None:
        return None
    pure = _close(trained.inputs, evaluated.inputs) and _close(evaluated.inputs[: SAMPLES // 2], first.inputs)
    return Tail(path, evaluated.inputs[0].numel(), trained.relu) if pure else None


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


class _Pass:
    """A forward pass of an extractor, watched at the module at `path`."""

    def __init__(self, body: nn.Module, path: str | None) -> None:
        self._body, self._path = body, path
        self.inputs = torch.empty(0)  # of the module
        self.plain = False  # it was called once, with one tensor of a row per sample that needs no gradient
        self.drew = False  # random numbers were drawn before it
        self.relu: bool | None = None  # of its output is the extractor's output; None: something else is
        self._calls = 0

    def run(self, x: Tensor) -> None:
        """Run the pass on samples (B, *shape)."""
        before = _state()
        if self._path is None:
            self._enter(len(x), before, nn.Identity(), (self._body(x),), {})
            self.relu = False
            return
        module = self._body.get_submodule(self._path)
        outputs: list[tuple[Any, Any]] = []
        handles = [
            module.register_forward_pre_hook(partial(self._enter, len(x), before), with_kwargs=True),
            module.register_forward_hook(lambda _, inputs, output: outputs.append((output, output._version))),
        ]
        try:
            y = self._body(x)
        finally:
            for handle in handles:
                handle.remove()
        if self.plain:
            self.relu = _relation(*outputs[0], y)

    def _enter(
        self, samples: int, before: object, module: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]
    ) -> None:
        self._calls += 1
        self.drew = self.drew or before != _state()
        one = inputs[0] if len(inputs) == 1 and not others else None
        usable = isinstance(one, Tensor) and one.ndim > 0 and len(one) == samples and not one.requires_grad
        self.plain = usable and self._calls == 1
        if isinstance(one, Tensor):
            self.inputs = one.detach().clone()


def _relation(output: Tensor, version: int, y: Tensor) -> bool | None:
    """Return whether y is the ReLU of a module's output, or that output; None if it is something else."""
    if output._version != version:
        return None  # changed in place
    if y is output:
        return False
    step = y.grad_fn
    is_relu = step is not None and type(step).__name__ == "ReluBackward0"
    return True if step and is_relu and step.next_functions[0][0] is output.grad_fn else None


def _state() -> object:
    """Return the state of the global generators on the CPU, as something that compares."""
    of_numpy = np.random.get_state()
    return random.getstate(), str(of_numpy), torch.get_rng_state().numpy().tobytes()


@contextmanager
def replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module run another function as its forward pass."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
