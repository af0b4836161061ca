"""What of a model is trained (`model.train`); its other parameters require no gradient: they are frozen.

The heads are always trained. Of the extractor: `all`; `head`, its last layer; `norm`, besides it the layers
that normalise; `lora`, besides it low-rank changes of the linear layers; else the tensors whose names match a
shell pattern, such as `layer4.*`.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import lora
from pfedmoe_mpi.models.pretrained import HEAD, last_layers
from pfedmoe_mpi.models.registry import Model

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
KINDS = ("head", "norm", "lora")
M = TypeVar("M", bound=nn.Module)


def build(make: Callable[[], M], train: str, rank: int, alpha: float) -> M:
    """Return a new model or extractor, whose parameters require a gradient if they are trained.

    `rank` and `alpha` are those of `lora`.
    """
    module = make()
    if train == "lora":
        extractor = module.extractor if isinstance(module, Model) else module
        lora.add(extractor, last_layers(extractor), rank, alpha)
    if train != "all":
        trained = trained_names(module, train)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in trained)
    return module


def trained_names(module: nn.Module, train: str) -> set[str]:
    """Return the names of a model's or an extractor's parameters that `train` selects."""
    extractor = module.extractor if isinstance(module, Model) else module
    prefix = "extractor." if isinstance(module, Model) else ""
    names = [name for name, _ in extractor.named_parameters()]
    if train in KINDS:
        last = last_layers(extractor)
        chosen = {name for name in names if name.startswith(last)}
    else:
        chosen = {name for name in names if fnmatchcase(name, train)}
    if train == "norm":
        norms = {name for name, part in extractor.named_modules() if isinstance(part, NORMS)}
        chosen |= {name for name in names if name.rpartition(".")[0] in norms}
    if train == "lora":
        chosen |= {name for name in names if lora.is_factor(name)}
    heads = {name for name, _ in module.named_parameters() if prefix and name.startswith(HEAD)}
    return heads | {prefix + name for name in chosen}


def check(make: Callable[[], nn.Module], train: str, label: str) -> None:
    """Check that `train` selects something of an extractor that `build` returned.

    Raises:
        ConfigError: it does not.
    """
    if train == "all":
        return
    names = [name for name, _ in make().named_parameters()]
    if train == "lora" and not any(map(lora.is_factor, names)):
        problem = f"model.train = lora needs linear layers besides the last one, and {label} has none"
        raise ConfigError(problem, "use a transformer such as vit_b_16, or --model.train head")
    if not trained_names(make(), train):
        shown = f"{names[0]}, …, {names[-1]}" if names else "none"
        problem = f"model.train = {train} selects no tensor of {label}, which has {shown}"
        raise ConfigError(problem, "--model.train head, or a pattern of its tensors such as '*norm*'")
