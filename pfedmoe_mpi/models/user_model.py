"""Modules of the user's own code: built, and tried on a batch of two before anything is trained.

The contract is a callable `(shape, dim) -> nn.Module`, such as a class with this constructor, whose result
maps (B, *shape) to (B, dim). If it has a parameter `vocabulary`, it takes texts: the samples are tokens, and
`vocabulary` is the number of different ones. A gate's callable is `(shape, experts)`, and its output are the
logits (B, experts).

A parameter that does not require a gradient when the module is built is frozen; see `core/flat.py`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pfedmoe_mpi import user_code
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.user_code import CodeError

COUNTER = "num_batches_tracked"  # of BatchNorm, which momentum makes useless


def build(reference: str, shape: tuple[int, ...], width: int, vocabulary: int = 0) -> nn.Module:
    """Return a new module of a reference, initialised from torch's global generator.

    Args:
        reference: such as `/path/nets.py:TinyViT`.
        shape: of one sample.
        width: numbers per sample in the output: d, or the number of experts of a gate.
        vocabulary: number of different tokens if the samples are texts, else 0.

    Raises:
        CodeError: the code raised an exception.
        ConfigError: the result is not a module.
    """
    make = user_code.load(reference)
    if not callable(make):
        raise _refusal(reference, "is not a class or a function", "define `class NAME(nn.Module)`")
    options: dict[str, Any] = {"vocabulary": vocabulary} if vocabulary and _takes_vocabulary(make) else {}
    try:
        module = make(shape, width, **options)
    except (Exception, SystemExit) as error:
        raise CodeError.of(user_code.path(reference), error) from error
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise _refusal(reference, f"returns {kind}, not a torch module", "return an nn.Module")
    return module


def check(reference: str, shape: tuple[int, ...], width: int, vocabulary: int = 0) -> None:
    """Check that a reference's module keeps the contract, by training passes over two batches of two samples.

    Raises:
        ConfigError: it does not; the message says what to change.
    """
    with torch.random.fork_rng(devices=[]):
        module, other = (build(reference, shape, width, vocabulary) for _ in range(2))
        if vocabulary and not _takes_vocabulary(user_code.load(reference)):
            problem = "takes numbers, but the samples are texts"
            raise _refusal(reference, problem, "add a parameter: (shape, dim, vocabulary)")
        _check_tensors(reference, module, other)
        _check_output(reference, module, shape, width, vocabulary)


def _takes_vocabulary(make: Any) -> bool:
    return "vocabulary" in inspect.signature(make).parameters


def _refusal(reference: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{user_code.label(reference)} in {user_code.path(reference)} {problem}", remedy)


def _check_tensors(reference: str, module: nn.Module, other: nn.Module) -> None:
    """Check the parameters and buffers of two modules that were built one after the other."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            problem = f"creates {name} only in its first forward pass"
            raise _refusal(reference, problem, "use nn.Linear(in, out) and the like in place of lazy modules")
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise _refusal(
                reference, f"has {name} of type {kind}", "use float32; train.precision = bf16 computes faster"
            )
    places = {t.untyped_storage().data_ptr() for _, t in tensors if t.numel()}
    for name, tensor in (*other.named_parameters(), *other.named_buffers()):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in places:
            problem = f"shares {name} between the modules of two calls"
            raise _refusal(reference, problem, "create every layer inside of the constructor")


def _check_output(
    reference: str, module: nn.Module, shape: tuple[int, ...], width: int, vocabulary: int
) -> None:
    """Check two forward passes and a backward pass in training mode."""
    names = list(module.state_dict())
    kept = {name for name, t in module.named_buffers() if t.is_floating_point() and name in names}
    before = {name: t.clone() for name, t in module.named_buffers() if name not in kept}
    module.train()
    try:
        for _ in range(2):
            x = (
                torch.randint(vocabulary, (2, *shape), dtype=torch.int32)
                if vocabulary
                else torch.randn(2, *shape)
            )
            output = module(x)
        if isinstance(output, Tensor) and output.requires_grad:
            output.float().sum().backward()
    except Exception as error:
        raise CodeError.of(user_code.path(reference), error) from error
    made = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if not isinstance(output, Tensor) or output.shape != (2, width):
        problem = f"maps samples {(2, *shape)} to {made}, expected {(2, width)}"
        raise _refusal(reference, problem, "return one vector of length dim per sample, (B, dim)")
    if list(module.state_dict()) != names:
        raise _refusal(reference, "creates tensors in its forward pass", "create them in the constructor")
    for name, tensor in module.named_buffers():
        if name in before and name.rpartition(".")[2] != COUNTER and not torch.equal(tensor, before[name]):
            kind = "integers" if not tensor.is_floating_point() else "not persistent"
            raise _refusal(
                reference,
                f"changes its buffer {name} in training, which is {kind} and would be lost between rounds",
                "register it as a persistent float32 buffer",
            )
