"""A stand-in for a GPU: the meta device, and a mode that records when the program would wait for a GPU.

The meta device has shapes but no numbers, and like a GPU it refuses tensors of the CPU beside its own. Where
the program reads numbers from the device, the mode records that, and gives zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
aten = torch.ops.aten

# Operations of which a GPU tells the size of the result only when it is done.
SIZES = {
    aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.unique_consecutive, aten.unique_dim,
    aten.repeat_interleave,
}  # fmt: skip


def tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for each in arguments:
            yield from tensors(each)


class Waits(TorchDispatchMode):
    """Counts copies between devices and waits for the device, by name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name is aten._local_scalar_dense:
            assert first is not None
            self.found["item"] += 1
            return first.new_zeros((), device="cpu").item() if first.is_meta else func(*args)
        if name in (aten._to_copy, aten.copy_):
            return self._copied(func, args, kwargs)
        if name in (aten._fused_sgd_, aten._fused_adam_, aten._fused_adamw_) and args[0][0].is_meta:
            assert all(tensor.is_meta for tensor in tensors(args))
            return None
        if first is not None and first.is_meta:
            if name in SIZES:
                self.found[func.name()] += 1
                return self._sized(name, first)
            if name in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
                return self._indexed(func, args, kwargs)
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        to_new = func.overloadpacket is aten._to_copy
        source = args[0] if to_new else args[1]
        goal = torch.device(kwargs.get("device") or source.device) if to_new else args[0].device
        if goal != source.device:
            self.found[f"copy to {goal}"] += 1
            if source.is_meta:
                result = (
                    torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                    if to_new
                    else args[0]
                )
                return result.zero_()
        return func(*args, **kwargs)

    def _sized(self, name: Any, first: Tensor) -> Any:
        if name is aten.nonzero:
            return first.new_empty((first.numel(), first.ndim), dtype=torch.int64)
        assert name is aten._unique2, f"{name} is not known to this stand-in"
        return first.reshape(-1), first.new_empty(0), first.new_empty(0)

    def _indexed(self, func: Any, args: Any, kwargs: Any) -> Any:
        indices = [index for index in args[1] if index is not None]
        if any(index.device.type == "cpu" and index.ndim for index in indices):
            self.found["index from the CPU"] += 1
        if indices and indices[0].dtype == torch.bool:
            self.found["index by a mask"] += 1
            assert func.overloadpacket is aten.index
            return args[0].flatten(0, indices[0].ndim - 1)
        return func(*args, **kwargs)
