"""Modules of the user's own code: built, and tried on a batch of two before anything is trained.

The contract is a callable `(shape, dim) -> nn.Module`, such as a class with this constructor, whose result
maps (B, *shape) to (B, dim). If it has a parameter `vocabulary`, it takes texts: the samples are tokens, and
`vocabulary` is the number of different ones. A gate's callable is `(shape, experts)`, and its output are the
logits (B, experts).

A parameter that does not require a gradient when the module is built is frozen; see `core/flat.py`.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pfedmoe_mpi import user_code
from pfedmoe_mpi.errors import CodeError, ConfigError
from pfedmoe_mpi.models import generators

COMPILED = "OptimizedModule"  # the class that torch.compile returns; importing it takes a second
COUNTER = "num_batches_tracked"  # of BatchNorm, which momentum makes useless


def build(reference: str, shape: tuple[int, ...], width: int, vocabulary: int = 0) -> nn.Module:
    """Return a new module of a reference, initialised from the global generators.

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
        with suppress(ValueError):  # a function written in C has no signature
            inspect.signature(make).bind(shape, width, **options)
    except TypeError as error:
        problem = f"cannot be called with (shape, dim): {error}"
        raise _refusal(reference, problem, "write a function `def NAME(shape, dim)` that calls it") from error
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
    threads = torch.get_num_threads()
    subject = f"{user_code.label(reference)} in {user_code.path(reference)}"
    with generators.kept():
        user_code.load(reference)
        modules = []
        for seed in (1, 1, 2):
            generators.seed(seed)
            modules.append(build(reference, shape, width, vocabulary))
            check_settings(subject, threads)
        if vocabulary and not _takes_vocabulary(user_code.load(reference)):
            problem = "takes numbers, but the samples are texts"
            raise _refusal(reference, problem, "add a parameter: (shape, dim, vocabulary)")
        _check_tensors(reference, *modules[:2])
        _Trial(reference, shape, width, vocabulary).check(modules[0], modules[2])
        check_settings(subject, threads)


def check_settings(subject: str, threads: int) -> None:
    """Check that the user's code left torch's settings as they were, and restore them.

    Raises:
        ConfigError: it did not; the message names the setting.
    """
    found = {
        "set_default_dtype": (torch.get_default_dtype(), torch.float32),
        "set_default_device": (torch.get_default_device(), torch.device("cpu")),
        "set_num_threads": (torch.get_num_threads(), threads),
    }
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_num_threads(threads)
    for name, (value, expected) in found.items():
        if value != expected:
            remedy = "remove this call; --train.device and --train.threads choose device and threads"
            raise ConfigError(f"{subject} calls torch.{name}({value}), which changes all models", remedy)


def _takes_vocabulary(make: Any) -> bool:
    with suppress(ValueError):  # a function written in C has no signature
        return "vocabulary" in inspect.signature(make).parameters
    return False


def _refusal(reference: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{user_code.label(reference)} in {user_code.path(reference)} {problem}", remedy)


def _check_tensors(reference: str, module: nn.Module, other: nn.Module) -> None:
    """Check the parameters and buffers of two modules that were built with the same random numbers."""
    try:
        tensors, others = (
            dict([*each.named_parameters(), *each.named_buffers()]) for each in (module, other)
        )
    except TypeError as error:  # a dataclass that compares its fields
        raise _refusal(reference, f"is not a usable module: {error}", "write @dataclass(eq=False)") from error
    if any(
        isinstance(each, torch.jit.ScriptModule) or type(each).__name__ == COMPILED
        for each in module.modules()
    ):
        remedy = "return the module without torch.jit and torch.compile"
        raise _refusal(reference, "is compiled, so that its operations cannot be counted", remedy)
    for name, tensor in tensors.items():
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            problem = f"creates {name} only in its first forward pass"
            raise _refusal(reference, problem, "use nn.Linear(in, out) and the like in place of lazy modules")
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise _refusal(
                reference, f"has {name} of type {kind}", "use float32; train.precision = bf16 computes faster"
            )
        if tensor.device.type != "cpu":
            problem = f"has {name} on the device {tensor.device}"
            raise _refusal(reference, problem, "build on the CPU; --train.device chooses where it trains")
    places = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
    for name, tensor in others.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in places:
            problem = f"shares {name} between the modules of two calls"
            raise _refusal(reference, problem, "create every layer inside of the constructor")
        if name not in tensors or not _same_bits(tensor, tensors[name]):
            problem = f"begins with other values of {name} in every process"
            remedy = (
                "draw from the global generator of torch, numpy or random; they are seeded before each call"
            )
            raise _refusal(reference, problem, remedy)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


class _Trial:
    """Training and evaluation of modules of a reference on batches of random samples."""

    def __init__(self, reference: str, shape: tuple[int, ...], width: int, vocabulary: int) -> None:
        self._reference = reference
        self._shape, self._width, self._vocabulary = shape, width, vocabulary

    def check(self, module: nn.Module, other: nn.Module) -> None:
        """Check that a module trains, and that another one with its tensors continues like it."""
        places = self._places(module)
        outside = self._outside(module)
        before = {name: tensor.clone() for name, tensor in outside.items()}
        self._step(module, 3)
        if list(self._places(module)) != list(places):
            remedy = "create them in the constructor"
            raise _refusal(self._reference, "creates tensors in its forward pass", remedy)
        for name, place in self._places(module).items():
            if place != places[name] and name not in outside:
                remedy = f"change it in place, such as self.{name}.copy_(…)"
                raise _refusal(self._reference, f"replaces its tensor {name} in training", remedy)
        try:
            other.load_state_dict(module.state_dict())
        except Exception as error:
            problem = f"cannot load its own tensors: {' '.join(str(error).split())}"
            raise _refusal(
                self._reference, problem, "keep them of one shape, each in memory of its own"
            ) from error
        expected, found = self._step(module, 4), self._step(other, 4)
        for name, tensor in self._outside(module).items():
            if name.rpartition(".")[2] != COUNTER and not torch.equal(tensor, before[name]):
                kind = "integers" if not tensor.is_floating_point() else "not persistent"
                raise _refusal(
                    self._reference,
                    f"changes its buffer {name} in training, which is {kind} and lost between rounds",
                    "register it as a persistent float32 buffer",
                )
        for each in (module, other):
            each.eval()
        self._compare(expected, found)
        with torch.no_grad():
            self._compare(self._output(module, 5), self._output(other, 5))
            self._output(module, 6, samples=1)

    def _compare(self, expected: Tensor, found: Tensor) -> None:
        if not _same_bits(expected, found):
            raise _refusal(
                self._reference,
                "depends on more than its parameters and buffers: on earlier batches or on hidden layers",
                "keep layers in nn.ModuleList and what changes in persistent float32 buffers, and draw from "
                "the global generators",
            )

    def _step(self, module: nn.Module, seed: int) -> Tensor:
        """Return the output of a forward pass in training mode, after a backward pass."""
        module.train()
        output = self._output(module, seed)
        try:
            if output.requires_grad:
                output.sum().backward()
        except (Exception, SystemExit) as error:
            raise CodeError.of(user_code.path(self._reference), error) from error
        return output.detach()

    def _output(self, module: nn.Module, seed: int, samples: int = 2) -> Tensor:
        """Return the checked output of a batch that depends on the seed."""
        generators.seed(seed)
        shape = (samples, *self._shape)
        if self._vocabulary:
            x = torch.randint(self._vocabulary, shape, dtype=torch.int32)
        else:
            x = torch.randn(shape)
        kept = x.clone()
        try:
            output = module(x)
        except (Exception, SystemExit) as error:
            raise CodeError.of(user_code.path(self._reference), error) from error
        expected = (samples, self._width)
        made = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        if not isinstance(output, Tensor) or output.shape != expected:
            mode = "" if module.training else " in evaluation"
            problem = f"maps samples {shape} to {made}{mode}, expected {expected}"
            remedy = "return one vector of length dim per sample, (B, dim)"
            raise _refusal(self._reference, problem, remedy)
        if output.dtype != torch.float32:
            problem = f"returns numbers of type {str(output.dtype).removeprefix('torch.')}"
            raise _refusal(self._reference, problem, "return float32")
        if not torch.equal(x, kept):
            remedy = "use functions without a final _ on the samples"
            raise _refusal(self._reference, "changes the samples in its forward pass", remedy)
        return output

    def _places(self, module: nn.Module) -> dict[str, int]:
        """Return the address of every tensor of a module's state, by name."""
        return {
            name: t.data_ptr()
            for name, t in module.state_dict(keep_vars=True).items()
            if isinstance(t, Tensor)
        }

    def _outside(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the buffers that a client's vector does not hold: integers, and those not persistent."""
        state = module.state_dict(keep_vars=True)
        return {
            name: tensor
            for name, tensor in module.named_buffers()
            if name not in state or not tensor.is_floating_point()
        }
