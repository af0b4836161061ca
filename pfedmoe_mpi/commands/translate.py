"""`translate`: a command line of HtFLlib or PFLlib as the corresponding one of this program.

What is known of both are the names, defaults and meanings of their flags, as their `system/main.py` tells
them. A line is HtFLlib's if its models or its method are, else PFLlib's: their defaults differ. What has no
counterpart here is named, and nothing is run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pfedmoe_mpi import config
from pfedmoe_mpi.errors import ConfigError, nearest


@dataclass(frozen=True)
class Flag:
    """A flag of theirs: `ours` are the settings that take its value, else `why` tells what becomes of it."""

    short: str
    long: str
    ours: tuple[str, ...] = ()
    why: str = ""


FLAGS = (
    Flag("algo", "algorithm", ("algorithm",)),
    Flag("data", "dataset", ("data.name",)),
    Flag("m", "model_family", ("model.pool",)),
    Flag("nc", "num_clients", ("clients",)),
    Flag("jr", "join_ratio", ("participation",)),
    Flag("gr", "global_rounds", ("rounds",)),
    Flag("ls", "local_epochs", ("train.epochs",)),
    Flag("lbs", "batch_size", ("train.batch",)),
    Flag("lr", "local_learning_rate", ("train.lr", "train.lr_shared")),
    Flag("eg", "eval_gap", ("eval.every",)),
    Flag("dev", "device", ("train.device",)),
    Flag("fd", "feature_dim", ("model.dim",)),
    Flag("cdr", "client_drop_rate", ("faults.dropout",)),
    Flag("nnc", "num_new_clients", ("unseen.clients",)),
    Flag("go", "goal", ("run.dir",)),
    Flag("t", "times", (), "run it once for each --seed 0, 1, 2, …: `report` takes seeds as replicates"),
    Flag("ncl", "num_classes", (), "the data tell"),
    Flag("did", "device_id", (), "ranks share the visible GPUs out; CUDA_VISIBLE_DEVICES hides some"),
    Flag("pv", "prev", (), "`restart` goes on with a run"),
    Flag("sfn", "save_folder_name", (), "models are in the run's checkpoints"),
    Flag("ab", "auto_break", (), "no counterpart: all rounds are played; `report` tells the best one"),
    Flag("tc", "top_cnt", (), "no counterpart, as auto_break"),
    Flag("ld", "learning_rate_decay", (), "no counterpart; --train.schedule knows cosine and linear"),
    Flag("ldg", "learning_rate_decay_gamma", (), "no counterpart, as learning_rate_decay"),
    Flag("rjr", "random_join_ratio", (), "no counterpart: the cohort's size is fixed"),
    Flag("fs", "few_shot", (), "no counterpart"),
    Flag("vs", "vocab_size", ("data.vocabulary",)),
    Flag("ml", "max_len", ("data.length",)),
    Flag("mfn", "models_folder_name", (), "no counterpart: clients start from drawn weights"),
    Flag(
        "tsr", "train_slow_rate", (), "no counterpart that sleeps; --faults.straggler simulates slow clients"
    ),
    Flag("ssr", "send_slow_rate", (), "no counterpart"),
    Flag("ts", "time_select", (), "no counterpart"),
    Flag(
        "tth", "time_threthold", (), "no counterpart in seconds; --faults.deadline counts mean client steps"
    ),
    Flag("lam", "lamda"),
    Flag("se", "server_epochs"),
    Flag("al", "alpha"),
    Flag("bt", "beta"),
    Flag("mlr", "mentee_learning_rate"),
    Flag("Ts", "T_start"),
    Flag("Te", "T_end"),
    Flag("slr", "server_learning_rate"),
    Flag("mart", "margin_threthold"),
    Flag("sfd", "sub_feature_dim"),
    Flag("mu", "mu"),
    Flag("pls", "plocal_epochs"),
    Flag("nd", "noise_dim"),
    Flag("glr", "generator_learning_rate"),
    Flag("hd", "hidden_dim"),
    Flag("GPath", "generator_path"),
    Flag("prompt", "stable_diffusion_prompt"),
    Flag("sbs", "server_batch_size"),
    Flag("gbs", "gen_batch_size"),
    Flag("mdb", "meta_study_batches"),
    Flag("mqb", "meta_quiz_batches"),
    Flag("wu", "warm_up_rounds"),
    Flag("dlg", "dlg_eval", (), "no counterpart: nobody attacks the sums"),
    Flag("dlgg", "dlg_gap", (), "no counterpart, as dlg_eval"),
    Flag("bnpc", "batch_num_per_client", (), "no counterpart, as dlg_eval"),
    Flag("ften", "fine_tuning_epoch_new", (), "no counterpart: clients that never train are not tuned"),
    Flag("K", "K"),
    Flag("lrp", "p_learning_rate"),
    Flag("M", "M"),
    Flag("itk", "itk"),
    Flag("alk", "alphaK"),
    Flag("sg", "sigma"),
    Flag("tau", "tau"),
    Flag("fte", "fine_tuning_epochs"),
    Flag("dlr", "dr_learning_rate"),
    Flag("L", "L"),
    Flag("lf", "localize_feature_extractor"),
    Flag("et", "eta"),
    Flag("s", "rand_percent"),
    Flag("p", "layer_idx"),
    Flag("mo", "momentum"),
    Flag("klw", "kl_weight"),
    Flag("fsb", "first_stage_bound"),
    Flag("ca", "fedcross_alpha"),
    Flag("cmss", "collaberative_model_select_strategy"),
)
# Flags without `ours` and `why` belong to single methods: (method here, flag) to the setting here.
OF_METHODS = {
    ("fedproto", "lamda"): "fedproto.weight",
    ("fd", "lamda"): "fd.weight",
    ("fedtgp", "lamda"): "fedtgp.weight",
    ("fedtgp", "server_epochs"): "fedtgp.epochs",
    ("fedtgp", "margin_threthold"): "fedtgp.margin",
    ("fedgh", "server_epochs"): "fedgh.epochs",
    ("fedgh", "server_learning_rate"): "fedgh.lr",
    ("scaffold", "server_learning_rate"): "scaffold.lr_server",
    ("fml", "alpha"): "fml.alpha",
    ("fml", "beta"): "fml.beta",
    ("fedkd", "mentee_learning_rate"): "train.lr_shared",
    ("fedkd", "T_start"): "fedkd.energy_start",
    ("fedkd", "T_end"): "fedkd.energy_end",
    ("fedmrl", "sub_feature_dim"): "fedmrl.dim",
    ("fedprox", "mu"): "fedprox.mu",
    ("fedrep", "plocal_epochs"): "fedrep.head_epochs",
}
METHODS = {"local": "standalone"}  # the others by their names, apart from case and hyphens
KNOWN = (  # of theirs, here too
    *("standalone", "fedavg", "fedprox", "scaffold", "fedrep", "lg_fedavg", "fedproto", "fd", "fml"),
    *("fedkd", "fedgh", "fedtgp", "fedmrl"),
)
# What they do unless told otherwise: plain SGD, ten samples a batch, 2000 rounds.
DEFAULTS = {
    "clients": "20",
    "participation": "1.0",
    "rounds": "2000",
    "model.dim": "512",
    "train.epochs": "1",
    "train.batch": "10",
    "train.lr": "0.01",
    "train.lr_shared": "0.01",
    "train.momentum": "0",
    "train.weight_decay": "0",
    "train.clip": "0",
    "partition.kind": "dirichlet",
    "partition.alpha": "0.1",
    "partition.test_fraction": "0.25",
}
OWN_DEFAULTS = {
    "fml": {"fml.alpha": "1.0", "fml.beta": "1.0", "train.clip": "10"},
    "fedkd": {"train.clip": "10"},
    "fedmrl": {"fedmrl.dim": "128"},
    "fedgh": {"fedgh.epochs": "100", "fedgh.lr": "0.01"},
    "fedtgp": {"fedtgp.answer": "prototype"},
    "fedprox": {"fedprox.mu": "0"},
    "fedrep": {"fedrep.head_epochs": "1"},
}
# Where PFLlib differs; its FedGH goes through what came once.
PFLLIB = {"train.lr": "0.005", "train.lr_shared": "0.005"}
PFLLIB_OWN = {"fml": {"fml.beta": "0.0"}, "fedgh": {"fedgh.epochs": "1", "fedgh.lr": "1.0"}}
HTFLLIB_METHODS = ("fedtgp", "fedmrl")
HTFLLIB_MODELS = ("Ht", "Res34-HtC", "MLP")  # how its families begin, and none of PFLlib's models
CNN, DNN = "cnn1", "mlp5"
STAND_INS = {CNN: "CNN of two convolutions", DNN: "DNN of one hidden layer"}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
EIGHT = (CNN, "googlenet", "mobilenet_v2", *RESNETS)
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
    """Settings of a run by dotted name, and what is to be said of them."""

    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The command, ready to be pasted into a shell, below its notes."""
        words = [f"--{name} {shlex.quote(value)}" for name, value in self.settings.items()]
        lines = ["mpirun -n 2 python -m pfedmoe_mpi"]
        for word in words:
            if len(lines[-1]) + len(word) > 105:
                lines.append("   ")
            lines[-1] += f" {word}"
        return "\n".join([*(f"# {note}" for note in self.notes), " \\\n".join(lines)])


def translate(words: Sequence[str]) -> Translation:
    """A command line `… main.py -data … -algo … …`, up to the shell's `>`.

    Raises:
        ConfigError: an unknown flag, one without a value, or a method that is not here.
    """
    given = _given(words)
    theirs = given.get("algorithm", "FedAvg")
    method = METHODS.get(theirs.lower(), theirs.lower().replace("-", "_"))
    if method not in KNOWN:
        known = ", ".join(KNOWN)
        raise ConfigError(f"-algo {theirs} is no method here{nearest(method, KNOWN)}", f"known: {known}")
    family = given.get("model_family", "")
    htfllib = method in HTFLLIB_METHODS or family.startswith(HTFLLIB_MODELS)
    made = Translation({"algorithm": method, **DEFAULTS, **OWN_DEFAULTS.get(method, {})})
    if not htfllib:
        made.settings |= {**PFLLIB, **PFLLIB_OWN.get(method, {})}
    for long, value in given.items():
        flag = next(flag for flag in FLAGS if flag.long == long)
        own = OF_METHODS.get((method, long))
        if long == "dataset":
            _data(made, value)
        elif long == "model_family":
            _models(made, value)
        elif long == "goal":
            made.settings["run.dir"] = f"runs/{value}"
        elif long == "device":  # theirs takes the processor where there is no GPU
            made.settings["train.device"] = "auto" if value == "cuda" else value
        elif flag.ours or own:
            if long != "algorithm":
                made.settings |= dict.fromkeys((own,) if own else flag.ours, value)
        else:
            made.notes.append(f"-{flag.short} {value}: {flag.why or f'no counterpart in {method}'}")
    if "dataset" not in given:
        _data(made, "MNIST")
    if "model_family" not in given and not htfllib:
        _models(made, "CNN")
    _follow(made, given, "0.01" if htfllib else "0.005")
    made.notes += [
        "the split: the usual one of their data scripts (Dirichlet 0.1, 3 : 1), drawn here by --partition",
        "their own split: --data.source npz --data.path dataset/NAME --partition.kind natural, no data.mean",
        "their averaged test accuracy is accuracy.weighted here, by samples; mean is by clients",
    ]
    config.build(made.settings)
    return made


def _follow(made: Translation, given: Mapping[str, str], mentee: str) -> None:
    """What theirs take from other flags, and ours as settings of their own.

    Their shared model is the first of the family, and their new clients are none of those they number.
    """
    settings, method = made.settings, made.settings["algorithm"]
    if method == "fedkd":  # whose shared model never learns at -lr
        settings["train.lr_shared"] = given.get("mentee_learning_rate", mentee)
        settings["fedkd.ramp"] = settings["rounds"]
    if method == "fedgh":
        settings["fedgh.batch"] = settings["train.batch"]
    if method in {"fml", "fedkd", "fedmrl"} and "model.pool" in settings:
        settings["model.shared"] = settings["model.pool"].partition(",")[0]
    if given.get("num_new_clients", "").isdecimal() and settings["clients"].isdecimal():
        settings["clients"] = str(int(settings["clients"]) + int(given["num_new_clients"]))


def _given(words: Sequence[str]) -> dict[str, str]:
    """Values by their long names."""
    short = {flag.short: flag.long for flag in FLAGS} | {flag.long: flag.long for flag in FLAGS}
    short["model"] = "model_family"
    rest = [word for part in words for word in (shlex.split(part) if " " in part else [part])]
    while rest and not rest[0].startswith("-"):
        rest.pop(0)  # nohup, python; its own -u goes with it
    if "main.py" in " ".join(rest):
        while not rest.pop(0).endswith("main.py"):
            pass
    found: dict[str, str] = {}
    while rest and rest[0] not in {">", ">>", "|", "&", "2>&1"}:
        name, joined, value = rest.pop(0).partition("=")
        known = name.lstrip("-")
        if not name.startswith("-") or known not in short:
            remedy = "give flags of HtFLlib's or PFLlib's main.py"
            raise ConfigError(f"{name} is no flag of theirs{nearest(known, short)}", remedy)
        if not joined:
            if not rest:
                raise ConfigError(f"{name} needs a value", f"{name} VALUE")
            value = rest.pop(0)
        found[short[known]] = value
    return found


def _data(made: Translation, name: str) -> None:
    ours = DATA.get(name.lower().replace("-", ""))
    if ours:
        made.settings |= {"data.source": "torchvision", "data.name": ours, "data.path": "data"}
        if ours.startswith("CIFAR"):  # theirs; ours would be ImageNet's
            made.settings |= {"data.mean": "0.5,0.5,0.5", "data.std": "0.5,0.5,0.5"}
        if ours == "EMNIST":
            made.notes.append(f"-data {name}: their scripts take its digits, here are all its 47 classes")
        return
    if name.lower().replace("_", "") in TEXTS:
        made.settings |= {"data.source": "text", "data.path": f"{name}.csv"}
        made.notes.append(f"-data {name}: {name}.csv stands for its CSV file, a label and a text in a row")
        return
    made.settings |= {"data.source": "hdf5", "data.path": f"{name}.h5"}
    made.notes.append(f"-data {name}: make {name}.h5 by `data prepare`, or --data.source folder of images")


def _models(made: Translation, family: str) -> None:
    pool = MODELS.get(family)
    if pool is None:
        made.notes.append(f"-m {family}: no counterpart; the default models are taken (--model.pool chooses)")
        return
    made.settings["model.pool"] = ",".join(pool)
    if any(name.startswith("resnet") for name in pool):
        made.settings["model.stem"] = "imagenet"
    for name, theirs in STAND_INS.items():
        if name in pool:
            made.notes.append(f"-m {family}: their {theirs} has no counterpart; {name} stands in its place")
    if family in WITHOUT:
        made.notes.append(f"-m {family}: {WITHOUT[family]} have no counterpart and are left out")
