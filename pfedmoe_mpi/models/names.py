"""The architectures by name, the length of their representation, and the defaults for each kind of data.

This module imports neither torch nor torchvision, so that a configuration is checked before either is
imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from pfedmoe_mpi import user_code
from pfedmoe_mpi.errors import ConfigError, nearest

ENTRY_POINTS = "pfedmoe_mpi.models"

# Widths (conv1, conv2, fc1); the fifth is the smallest of its family.
CNN = {
    "cnn1": (16, 32, 2000),
    "cnn2": (16, 16, 2000),
    "cnn3": (16, 32, 1000),
    "cnn4": (16, 32, 800),
    "cnn5": (16, 32, 500),
}
MNIST = {
    "mnist1": (20, 20, 300),
    "mnist2": (20, 20, 200),
    "mnist3": (20, 20, 150),
    "mnist4": (20, 20, 100),
    "mnist5": (20, 20, 50),
}
MLP = {"mlp1": 1000, "mlp2": 800, "mlp3": 600, "mlp4": 400, "mlp5": 200}  # width of fc1
TEXT = ("fasttext", "lstm", "gru", "transformer")
LSTM = ("lstm1", "lstm2", "lstm3")
RECURRENT = {  # kind and width
    "lstm": ("lstm", 64),
    "gru": ("gru", 64),
    "lstm1": ("lstm", 128),
    "lstm2": ("lstm", 96),
    "lstm3": ("lstm", 64),
}
EMBEDDING = 64  # width of every text model's embedding
CNN_SIDE = 16  # least side in pixels: two 5×5 convolutions and two 2×2 poolings leave one pixel
NATIVE_DIM = 500
TEXT_DIM = 64

# fmt: off
TORCHVISION = (
    "alexnet",
    "convnext_base", "convnext_large", "convnext_small", "convnext_tiny",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s",
    "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf",
    "regnet_x_800mf", "regnet_x_8gf",
    "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf",
    "resnet101", "resnet152", "resnet18", "resnet34", "resnet50",
    "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "squeezenet1_0", "squeezenet1_1",
    "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t",
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
    "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
    "wide_resnet101_2", "wide_resnet50_2",
)
# fmt: on
SIZED = ("vit_", "maxvit_")  # families built for one image size; the others accept any size from a least one


def names() -> tuple[str, ...]:
    """Return the names of all architectures."""
    return (*CNN, *MNIST, *MLP, *TEXT, *LSTM, *TORCHVISION)


def reference(name: str) -> str:
    """Return a reference to the user's or an installed package's code; empty for one of this program's."""
    word = name.lower().replace("-", "_")
    if user_code.is_reference(name) or word in names():
        return name if user_code.is_reference(name) else ""
    return user_code.installed(ENTRY_POINTS).get(word, "")


def resolve_name(name: str) -> str:
    """Return the exact name of an architecture.

    Case, `-` for `_`, and additional or missing `_` are accepted if only one name matches.

    A reference to the user's own code, such as `./nets.py:TinyViT`, is checked and not changed; a name that
    an installed package registers in the entry points `pfedmoe_mpi.models` becomes its reference. Of
    `timm:NAME` only the package is checked.

    Raises:
        ConfigError: there is no such architecture; the message has the nearest name.
    """
    other = reference(name)
    if other:
        check_object(other)
        return other
    word = name.lower().replace("-", "_")
    if word.startswith(user_code.TIMM):
        if find_spec("timm") is None:
            raise ConfigError(
                f"model {name} needs the package timm, which is not installed",
                "pip install 'pfedmoe_mpi[timm]'",
            )
        return word
    if word in names():
        return word
    matches = [candidate for candidate in names() if candidate.replace("_", "") == word.replace("_", "")]
    if len(matches) == 1:
        return matches[0]
    raise ConfigError(
        f"there is no model '{name}'{nearest(word, (*names(), *user_code.installed(ENTRY_POINTS)))}",
        f"use cnn1 to cnn5, mnist1 to mnist5 or mlp1 to mlp5; for texts {', '.join((*TEXT, *LSTM))}; "
        f"one of torchvision's {', '.join(TORCHVISION)}; timm:NAME; or a class of your own as "
        "PATH/FILE.py:NAME",
    )


def check_object(reference: str) -> None:
    """Check that a reference names a class or function in a file or module, without running it.

    Raises:
        ConfigError: it does not.
    """
    if not user_code.is_reference(reference) or not user_code.split(reference)[1]:
        remedy = f"write {reference}:NAME" if reference.endswith(".py") else "write PATH/FILE.py:NAME"
        raise ConfigError(f"'{reference}' does not name a class or function in a file", remedy)
    user_code.check(reference)


def kind_of(name: str) -> str:
    """Return a text that differs between architectures: the name, or a reference as `FILE.NAME`."""
    source, item = user_code.split(name)
    return f"{user_code.label(source)}.{item}" if user_code.is_reference(name) else name


def labels(architectures: Sequence[str]) -> tuple[str, ...]:
    """Return short names for tables and figures: a reference's object, with its file if needed."""
    short = {name: user_code.label(name) for name in dict.fromkeys(architectures)}
    taken = [*short.values(), *names()]
    return tuple(
        kind_of(name) if not is_own(name) and taken.count(short[name]) > 1 else short[name]
        for name in architectures
    )


def is_own(name: str) -> bool:
    """Return whether this program has the architecture: it is neither the user's own code nor timm's."""
    return not user_code.is_reference(name) and not name.startswith(user_code.TIMM)


def native_dim(name: str) -> int | None:
    """Return the architecture's length d (500; MNIST family 50, text 64); None if it accepts any length."""
    name = resolve_name(name)
    if name in TORCHVISION or not is_own(name):
        return None
    if name in TEXT or name in LSTM:
        return TEXT_DIM
    return 50 if name in MNIST else NATIVE_DIM


def resolve_dim(names: Sequence[str], dim: int) -> int:
    """Return the length d of all representations.

    This is `dim` if it is not 0, else the common length of the named architectures, else 500. `dim` is the
    width of the last layer in every family (CNN and MNIST: it replaces the width of fc2).

    Raises:
        ConfigError: `dim` is 0 and two architectures define different lengths, or a name is unknown.
    """
    natives = {native: name for name in names if (native := native_dim(name)) is not None}
    if dim > 0:
        return dim
    if len(natives) > 1:
        lengths = " and ".join(f"{name} has {native}" for native, name in natives.items())
        raise ConfigError(
            f"model.dim = 0 needs models whose representations have one length, but {lengths}",
            f"set one length for all with `--model.dim {max(natives)}`, or choose models of one length",
        )
    return next(iter(natives), NATIVE_DIM)


def auto_shared(shape: tuple[int, ...], pool: Sequence[str] = (), tokens: bool = False) -> str:
    """Return the smallest architecture of the pool's family, or of the family that fits the data.

    The family of the data is used if the pool has no single family of this package: cnn5 for images with
    sides of at least 16 pixels, fasttext for tokens, mlp5 for everything else. `shape` is (channels, height,
    width) or (features,). For tokens, a pool of LSTMs gets the smallest LSTM.
    """
    if tokens:
        return LSTM[-1] if pool and set(pool) <= set(LSTM) else TEXT[0]
    for family in (CNN, MNIST, MLP):
        if pool and set(pool) <= set(family):
            return list(family)[-1]
    return "cnn5" if len(shape) == 3 and min(shape[1:]) >= CNN_SIDE else "mlp5"


def auto_pool(shape: tuple[int, ...], tokens: bool = False, shared: str = "") -> tuple[str, ...]:
    """Return all architectures of the family that fits samples of `shape`.

    For tokens this is the family of the shared extractor: the LSTMs, or fastText, LSTM, GRU and Transformer.
    """
    if tokens:
        return LSTM if shared in LSTM else TEXT
    return tuple(CNN) if auto_shared(shape) in CNN else tuple(MLP)
