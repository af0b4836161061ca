"""`translate`: a command line of HtFLlib or PFLlib as the corresponding one of this program.

The flags of both are in `config/neighbours.py`; names, defaults and meanings are those of their
`system/main.py`. A line is HtFLlib's if its models or its method are, else PFLlib's: their defaults differ.
Flags without a counterpart are named in notes, and nothing is run.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from pfedmoe_mpi import config
from pfedmoe_mpi.config.neighbours import FLAGS, OF_METHODS, Flag
from pfedmoe_mpi.errors import ConfigError, nearest

METHODS = {"local": "standalone"}  # the others by their names, apart from case and hyphens
SHARED = (  # their methods that are here, too
    *("standalone", "fedavg", "fedprox", "scaffold", "fedrep", "lg_fedavg", "fedproto", "fd", "fml"),
    *("fedkd", "fedgh", "fedtgp", "fedmrl", "ditto", "apfl", "fedbn", "fedper"),
)
# Their defaults: plain SGD, ten samples a batch, 2000 rounds.
DEFAULTS = {
    "clients": "20",
    "participation": "1.0",
    "rounds": "2000",
    "model.dim": "512",
    "model.start": "architecture",
    "train.epochs": "1",
    "train.batch": "10",
    "train.lr": "0.01",
    "train.lr_shared": "0.01",
    "train.momentum": "0",
    "train.weight_decay": "0",
    "train.clip": "0",
    "partition.kind": "dirichlet_class",
    "partition.alpha": "0.1",
    "partition.test_fraction": "0.25",
    "partition.min_samples": "40",
    "partition.tries": "10000",  # theirs never gives up; at 100 clients one draw in 140 fits
}
DEFAULTS_OF_METHODS = {
    "fml": {"fml.alpha": "1.0", "fml.beta": "1.0", "train.clip": "10"},
    "fedkd": {"train.clip": "10"},
    "fedmrl": {"fedmrl.dim": "128"},
    "fedgh": {"fedgh.epochs": "100", "fedgh.lr": "0.01"},
    "fedproto": {"fedproto.answer": "prototype"},
    "fedtgp": {"fedtgp.answer": "prototype"},
    "fedprox": {"fedprox.mu": "0"},
    "ditto": {"ditto.weight": "0"},
    "apfl": {"apfl.alpha": "1.0"},
    "fedrep": {"fedrep.head_epochs": "1"},
}
DECAY = "their learning rate falls after the rounds in which a client trains, here after every round"
UNUSED_DECAY = "HtFLlib's clients do not use it; to repeat its runs, leave out --train.schedule"
SUMMED_KL = (
    "their KL is averaged over batch and classes; here it is summed over the classes, so it weighs as many "
    "times more"
)
NOT_DETACHED = "their KL's gradient reaches the teacher, too; here a teacher's output is a constant"
UNWEIGHTED = "their server's mean is over clients, unweighted; here it is by samples"
OWN_CLIP = "they clip the gradient of each model by its own norm; here by the joint norm"
RUNNING = (
    "their server averages parameters, not BatchNorm's running statistics; here these are averaged with them"
)
NO_ANSWER = "before any prototype exists theirs counts no test sample; here the head answers until then"
DIFFERENCES = {  # in the methods themselves, without a setting
    "fml": (SUMMED_KL, NOT_DETACHED, UNWEIGHTED, OWN_CLIP),
    "fedkd": (
        SUMMED_KL,
        NOT_DETACHED,
        UNWEIGHTED,
        OWN_CLIP,
        "their clients send factors of the shared model's weights; here those of its update",
    ),
    "fd": (
        "their clients share mean logits and feed these as they are to the cross-entropy as its target; here "
        "mean probabilities",
        "their teacher of a client contains its own outputs; here those of the others alone",
    ),
    "fedproto": (
        "their class means are collected while a client trains, over all its epochs; here after training, "
        "in evaluation mode",
        f"{UNWEIGHTED} of the class",
        NO_ANSWER,
    ),
    "fedtgp": (
        "their class means are those of the round's start, since the trained model is saved after them; here "
        "those of the trained model",
        NO_ANSWER,
    ),
    "fedmrl": (
        "their projection never trains: what a client learns of it is not saved; here it is the client's own",
        UNWEIGHTED,
    ),
    "apfl": (
        "their mixing weight moves in every step, by both models' gradients and a decay of 0.02; here in the "
        "first step of a round, by the gradient of the mixture",
        "their own model takes the gradient of its own loss, and is replaced by the mixture after a round; "
        "here it takes that of the mixture's loss, and stays as it is",
        "their server's mean is by samples; here, as in the paper, over clients, unweighted",
    ),
    "fedbn": (
        "their clients keep what has `bn` in its name, not the BatchNorm of a ResNet's shortcuts or of "
        "MobileNet; here all BatchNorm",
    ),
}
NETWORKS = (  # methods that share one
    *("fedavg", "fedprox", "scaffold", "fedrep", "fedper", "ditto", "apfl", "fml", "fedkd", "fedmrl"),
)
# PFLlib's defaults where they differ; its FedGH trains one epoch on what it received.
PFLLIB = {"train.lr": "0.005", "train.lr_shared": "0.005"}
PFLLIB_OF_METHODS = {"fml": {"fml.beta": "0.0"}, "fedgh": {"fedgh.epochs": "1", "fedgh.lr": "1.0"}}
HTFLLIB_METHODS = ("fedtgp", "fedmrl")
HTFLLIB_MODELS = ("Ht", "Res34-HtC", "MLP")  # its families begin like this, and no model of PFLlib does
CNN, DNN = "cnn1", "mlp5"
STAND_INS = {CNN: "CNN of two convolutions", DNN: "DNN of one hidden layer"}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WITH_BATCH_NORM = ("googlenet", "mobilenet_v2", *RESNETS)
EIGHT = (CNN, *WITH_BATCH_NORM)
MODELS = {
    "HtFE-img-2": (CNN, "resnet18"),
    "HtFE-img-3": ("resnet18", "resnet34"),
    "HtFE-img-4": (CNN, "googlenet", "mobilenet_v2", "resnet18"),
    "HtFE-img-5": ("googlenet", "mobilenet_v2", "resnet18", "resnet34", "resnet50"),
    "HtFE-img-8": EIGHT,
    "HtFE-img-9": RESNETS,
    "HtFE-img-8-HtC-img-4": EIGHT,
    "Res34-HtC-img-4": ("resnet34",),
    "HtM-img-10": (*EIGHT, "vit_b_16", "vit_b_32"),
    "CNN": (CNN,),
    "DNN": (DNN,),
    "ResNet18": ("resnet18",),
    "ResNet34": ("resnet34",),
    "AlexNet": ("alexnet",),
    "GoogleNet": ("googlenet",),
    "MobileNet": ("mobilenet_v2",),
    "fastText": ("fasttext",),
    "LSTM": ("lstm",),
    "Transformer": ("transformer",),
}
WITHOUT = {
    "HtFE-img-3": "resnet10",
    "HtFE-img-9": "resnet4, resnet6, resnet8 and resnet10",
    "HtFE-img-8-HtC-img-4": "the heads of several layers",
    "Res34-HtC-img-4": "the heads of several layers",
}
DATA = {name.lower(): name for name in ("MNIST", "FashionMNIST", "EMNIST", "SVHN", "CIFAR10", "CIFAR100")}
TEXTS = ("agnews", "sogounews")


@dataclass
class Translation:
    """Settings of a run by dotted name, and notes about them."""

    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the command, ready to be pasted into a shell, below its notes."""
        words = [f"--{name} {shlex.quote(value)}" for name, value in self.settings.items()]
        lines = ["mpirun -n 2 python -m pfedmoe_mpi"]
        for word in words:
            if len(lines[-1]) + len(word) > 105:
                lines.append("   ")
            lines[-1] += f" {word}"
        return "\n".join([*map(_comment, self.notes), " \\\n".join(lines)])


def _comment(note: str) -> str:
    """Return a note as lines of comment."""
    return textwrap.fill(note, 105, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def translate(words: Sequence[str]) -> Translation:
    """Translate a command line `… main.py -data … -algo … …`, up to the shell's `>`.

    Raises:
        ConfigError: an unknown flag, one without a value, quotes that do not close, or a method that is not
            here.
    """
    given = _given(words)
    theirs = given.get("algorithm", "FedAvg")
    method = METHODS.get(theirs.lower(), theirs.lower().replace("-", "_"))
    if method not in SHARED:
        problem = f"-algo {theirs} is not a method of this program{nearest(method, SHARED)}"
        raise ConfigError(problem, f"use one of {', '.join(SHARED)}")
    family = given.get("model_family", "")
    htfllib = method in HTFLLIB_METHODS or family.startswith(HTFLLIB_MODELS)
    made = Translation({"algorithm": method, **DEFAULTS, **DEFAULTS_OF_METHODS.get(method, {})})
    if not htfllib:
        made.settings |= {**PFLLIB, **PFLLIB_OF_METHODS.get(method, {})}
    for long, value in given.items():
        flag = next(flag for flag in FLAGS if flag.long == long)
        setting = OF_METHODS.get((method, long))
        if long == "dataset":
            _data(made, value)
        elif long == "model_family":
            _models(made, value)
        elif long == "goal":
            made.settings["run.dir"] = f"runs/{value}"
        elif long == "device":  # theirs takes the processor where there is no GPU
            made.settings["train.device"] = "auto" if value == "cuda" else value
        elif flag.ours or setting:
            if long != "algorithm":
                made.settings |= dict.fromkeys((setting,) if setting else flag.ours, value)
        else:
            made.notes.append(f"-{flag.short} {value}: {flag.note or f'no counterpart in {method}'}")
    if "dataset" not in given:
        _data(made, "MNIST")
    if "model_family" not in given and not htfllib:
        _models(made, "CNN")
    _follow(made, given, htfllib)
    made.notes += _differences(made.settings)
    made.notes += [
        "the split is drawn as by their data scripts with `noniid - dir`: alpha 0.1, and at least 40 samples "
        "per client; where 40 are more than half of an equal share, theirs take that half: lower "
        "--partition.min_samples",
        "the draw is this program's; for the very clients of theirs, take their files: --data.source npz "
        "--data.path dataset/NAME --partition.kind natural, without data.mean",
        "their averaged test accuracy is accuracy.weighted here, by samples; accuracy.mean is by clients",
    ]
    config.build(made.settings)
    return made


def _differences(settings: Mapping[str, str]) -> list[str]:
    """Return the notes on the method itself; their shared model is the first of the family."""
    method = settings["algorithm"]
    shared = settings.get("model.pool", "").partition(",")[0]
    notes = list(DIFFERENCES.get(method, ()))
    return [*notes, RUNNING] if method in NETWORKS and shared in WITH_BATCH_NORM else notes


def _follow(made: Translation, given: Mapping[str, str], htfllib: bool) -> None:
    """Set what theirs takes from other flags and ours has as settings.

    Their shared model is the first of the family, and their new clients come on top of `num_clients`.
    """
    settings, method = made.settings, made.settings["algorithm"]
    if method == "fedkd":  # whose shared model never learns at -lr
        settings["train.lr_shared"] = given.get("mentee_learning_rate", "0.01" if htfllib else "0.005")
        settings["fedkd.ramp"] = settings["rounds"]
    if method == "fedgh":
        settings["fedgh.batch"] = settings["train.batch"]
    if method in {"fml", "fedkd", "fedmrl"} and "model.pool" in settings:
        settings["model.shared"] = settings["model.pool"].partition(",")[0]
    if "learning_rate_decay" in given:
        settings["train.schedule"] = "exponential"
        notes = (DECAY, *((UNUSED_DECAY,) if htfllib else ()))
        made.notes += [f"-ld {given['learning_rate_decay']}: {note}" for note in notes]
    if given.get("num_new_clients", "").isdecimal() and settings["clients"].isdecimal():
        settings["clients"] = str(int(settings["clients"]) + int(given["num_new_clients"]))


def _given(words: Sequence[str]) -> dict[str, str]:
    """Return the values by the flags' long names."""
    short = {flag.short: flag.long for flag in FLAGS} | {flag.long: flag.long for flag in FLAGS}
    short["model"] = "model_family"
    try:
        rest = [word for part in words for word in (shlex.split(part) if " " in part else [part])]
    except ValueError as error:
        problem = f"the command line cannot be divided into words: {error}"
        raise ConfigError(problem, "close the quotes, or leave them out") from error
    while rest and not rest[0].startswith("-"):
        rest.pop(0)  # nohup, python; python's -u is dropped with it
    if any(word.endswith("main.py") for word in rest):
        while not rest.pop(0).endswith("main.py"):
            pass
    values: dict[str, str] = {}
    while rest and rest[0] not in {">", ">>", "|", "&", "2>&1"}:
        name, joined, value = rest.pop(0).partition("=")
        flag = name.lstrip("-")
        if not name.startswith("-") or flag not in short:
            problem = f"{name} is not a flag of HtFLlib or PFLlib{nearest(flag, short)}"
            raise ConfigError(problem, "`pfedmoe-mpi translate --flags` lists their flags")
        if not joined:
            if not rest:
                raise ConfigError(f"{name} needs a value", f"{name} VALUE")
            value = rest.pop(0)
        values[short[flag]] = value
    return values


def _data(made: Translation, name: str) -> None:
    ours = DATA.get(name.lower().replace("-", ""))
    if ours:
        made.settings |= {"data.source": "torchvision", "data.name": ours, "data.path": "data"}
        if ours.startswith("CIFAR"):  # theirs; ours would be ImageNet's
            made.settings |= {"data.mean": "0.5,0.5,0.5", "data.std": "0.5,0.5,0.5"}
        if ours == "EMNIST":
            made.notes.append(f"-data {name}: their scripts use its digits, this program all its 47 classes")
        return
    if name.lower().replace("_", "") in TEXTS:
        made.settings |= {"data.source": "text", "data.path": f"{name}.csv"}
        made.notes.append(f"-data {name}: {name}.csv stands for its CSV file, a label and a text per row")
        return
    made.settings |= {"data.source": "hdf5", "data.path": f"{name}.h5"}
    made.notes.append(f"-data {name}: make {name}.h5 by `data prepare`, or --data.source folder of images")


def _models(made: Translation, family: str) -> None:
    pool = MODELS.get(family)
    if pool is None:
        made.notes.append(f"-m {family}: no counterpart; the default models are used (--model.pool chooses)")
        return
    made.settings["model.pool"] = ",".join(pool)
    if any(name.startswith("resnet") for name in pool):
        made.settings["model.stem"] = "imagenet"
    for name, theirs in STAND_INS.items():
        if name in pool:
            made.notes.append(f"-m {family}: their {theirs} has no counterpart; {name} is used instead")
    if family in WITHOUT:
        made.notes.append(f"-m {family}: {WITHOUT[family]} have no counterpart and are left out")


# The table of flags

WIDTH = 100
ABOVE = (
    "The flags of HtFLlib and PFLlib, and the settings here. `translate -- COMMAND` prints the command "
    "here for one of theirs, runs nothing, and names each flag that has no counterpart. Flags that the "
    "line does not set have their defaults: plain SGD, batches of 10, 2000 rounds, and the rest as in "
    "HtFLlib where the models or the method are HtFLlib's, else as in PFLlib."
)
BELOW = (
    "Their data scripts split the data before the run; here --partition does, from the seed: as theirs with "
    "`noniid - dir`, by a Dirichlet draw of each class's clients. A client's "
    "model and its private state are in checkpoints, not in a folder that is cleared at the end; -t 3 is "
    "three runs with --seed 0, 1, 2.",
    "Their averaged test accuracy weighs clients by samples: accuracy.weighted here, beside "
    "accuracy.mean. They train only full batches, and HtFLlib does not shuffle; here every sample is "
    "trained in every epoch, in a random order.",
)


def flags_table() -> str:
    """Return the table of all flags of HtFLlib and PFLlib, and what they are here."""
    lines = [f"{'theirs':36}  here"]
    rows = [([flag], f"-{flag.short}, --{flag.long}") for flag in FLAGS if not flag.elsewhere]
    for methods in dict.fromkeys(flag.elsewhere for flag in FLAGS if flag.elsewhere):
        flags = [flag for flag in FLAGS if flag.elsewhere == methods]
        rows.append((flags, ", ".join(f"-{flag.short}" for flag in flags)))
    for flags, theirs in rows:
        cells = (
            textwrap.wrap(theirs, 36),
            textwrap.wrap(_here(flags[0]), WIDTH - 38, break_on_hyphens=False),
        )
        lines += [f"{left:36}  {right}".rstrip() for left, right in zip_longest(*cells, fillvalue="")]
    above, *below = (textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in (ABOVE, *BELOW))
    return "\n\n".join([above, "\n".join(lines), *below])


def _here(flag: Flag) -> str:
    """Return what a flag of theirs is here."""
    if flag.elsewhere:
        return f"no counterpart: belongs to {flag.elsewhere}"
    settings = ", ".join(f"--{name}" for name in (*flag.ours, *flag.of_methods))
    return f"{settings} ({flag.note})" if settings and flag.note else settings or flag.note
