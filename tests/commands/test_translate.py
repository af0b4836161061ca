"""Command lines of HtFLlib and PFLlib, translated to this program's settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.commands import translate
from pfedmoe_mpi.config import methods, neighbours
from pfedmoe_mpi.data import make_partition
from support import launcher

HTFLLIB = (
    "nohup python -u main.py -t 3 -ab 1 -lr 0.02 -jr 0.5 -lbs 32 -ls 5 -nc 30 -ncl 100 -data Cifar100 "
    "-m HtFE-img-8 -fd 512 -did 4 -gr 300 -eg 10 -algo {} > out.txt 2>&1 &"
)


def settings(line: str) -> tuple[config.Config, str]:
    """Return the configuration of the printed command, and its notes."""
    text = translate.translate(shlex.split(line)).text()
    notes = "\n".join(part for part in text.splitlines() if part.startswith("#"))
    words = shlex.split(text.replace(notes, "").replace("\\\n", " "))
    assert words[:6] == ["mpirun", "-n", "2", "python", "-m", "pfedmoe_mpi"]
    flags = words[6:]
    return config.build(
        {n.removeprefix("--"): v for n, v in zip(flags[::2], flags[1::2], strict=True)}
    ), notes


def test_htfllib_command_is_translated() -> None:
    made, notes = settings(HTFLLIB.format("FedTGP -lam 10 -se 50 -mart 90"))
    assert (made.algorithm, made.clients, made.participation, made.rounds) == ("fedtgp", 30, 0.5, 300)
    train = made.train
    assert (train.lr, train.lr_shared, train.batch, train.epochs) == (0.02, 0.02, 32, 5)
    assert (train.momentum, train.weight_decay, train.clip) == (0, 0, 0), "plain SGD"
    assert (made.data.source, made.data.name, made.data.mean) == ("torchvision", "CIFAR100", (0.5, 0.5, 0.5))
    assert made.model.pool[0] == "cnn1" and made.model.pool[-1] == "resnet152" and len(made.model.pool) == 8
    assert (made.model.dim, made.model.stem, made.eval.every) == (512, "imagenet", 10)
    own = made.options
    assert (own.weight, own.epochs, own.margin, own.answer) == (10, 50, 90, "prototype")  # type: ignore[attr-defined]
    for flag in ("-t 3", "-ab 1", "-ncl 100", "-did 4", "CNN of two convolutions"):
        assert flag in notes, "what has no counterpart is named"
    assert "-fd" not in notes


def test_flag_meaning_depends_on_the_method() -> None:
    assert settings(HTFLLIB.format("FedProto -lam 10"))[0].options.weight == 10  # type: ignore[attr-defined]
    made, notes = settings(HTFLLIB.format("FedKD -mlr 0.03 -Ts 0.9 -Te 0.99 -lam 2"))
    assert (made.train.lr, made.train.lr_shared, made.train.clip) == (0.02, 0.03, 10)
    assert "-lam 2: no counterpart in fedkd" in notes
    assert settings("main.py -algo FedGH -slr 0.1 -se 2")[0].options.lr == 0.1  # type: ignore[attr-defined]
    assert settings(HTFLLIB.format("Local"))[0].algorithm == "standalone"
    assert settings(HTFLLIB.format("LG-FedAvg"))[0].algorithm == "lg_fedavg"


def test_htfllib_defaults_are_kept() -> None:
    made, _ = settings("python main.py -algo FD -m HtFE-img-2 -data Cifar10")
    assert (made.rounds, made.clients, made.train.batch, made.train.lr) == (2000, 20, 10, 0.01)
    made, notes = settings("python main.py -algo FedRep")
    assert made.data.name == "MNIST" and made.partition.test_fraction == 0.25
    assert (made.train.lr, made.model.pool) == (0.005, ("cnn1",)) and "their CNN" in notes
    assert made.options.head_epochs == 1  # type: ignore[attr-defined]
    assert settings("python main.py -algo FedPer")[0].algorithm == "fedper"
    assert settings("main.py -algo FedProx")[0].options.mu == 0  # type: ignore[attr-defined]
    ours, theirs = (settings(f"main.py -algo FedGH {m}")[0].options for m in ("-m HtFE-img-2", "-m CNN"))
    assert (ours.epochs, ours.lr, theirs.epochs, theirs.lr) == (100, 0.01, 1, 1.0)  # type: ignore[attr-defined]


def test_derived_htfllib_settings_are_translated() -> None:
    made = settings(HTFLLIB.format("FedKD"))[0]
    assert made.options.ramp == 300 and made.model.shared == "cnn1"  # type: ignore[attr-defined]
    assert settings(HTFLLIB.format("FedGH"))[0].options.batch == 32  # type: ignore[attr-defined]
    assert settings(HTFLLIB.format("FedMRL").replace("img-8", "img-5"))[0].model.shared == "googlenet"
    made = settings("main.py -algo FedAvg -nc 20 -nnc 5 -dev cuda")[0]
    assert (made.clients, made.unseen_clients, made.train.device) == (25, 5, "auto")
    assert settings("main.py -dev cpu")[0].train.device == "cpu"


def test_pfllib_command_is_translated() -> None:
    made, notes = settings(
        "python main.py --dataset=FashionMNIST --model ResNet18 --algorithm FedProx -mu 0.01 -dlg 1"
    )
    assert (made.algorithm, made.data.name, made.model.pool) == ("fedprox", "FashionMNIST", ("resnet18",))
    assert made.options.mu == 0.01 and "-dlg 1: no counterpart" in notes  # type: ignore[attr-defined]
    made, notes = settings("main.py -data TinyImagenet -m MLR -algo SCAFFOLD -tau 0.5 -K 5 --itk 9 -ften 2")
    assert made.data.path.endswith("TinyImagenet.h5") and "-m MLR: no counterpart" in notes
    for said in ("-tau 0.5: no counterpart in scaffold", "-K 5", "-itk 9", "-ften 2: --unseen.tune, on"):
        assert said in notes
    made, notes = settings("main.py -data AGNews -m LSTM -algo FedAvg -vs 32000 -ml 200")
    assert (made.data.source, made.data.vocabulary, made.data.length) == ("text", 32000, 200)
    assert made.model.pool == ("lstm",)


def test_learning_rate_decay_is_the_exponential_schedule() -> None:
    made, notes = settings("main.py -algo FedAvg -m CNN -ld True")
    assert (made.train.schedule, made.train.gamma) == ("exponential", 0.99), "their default"
    assert "here after every round" in " ".join(notes.replace("#", "").split()) and "HtFLlib's" not in notes
    made, notes = settings("main.py -algo FedProto -m HtFE-img-2 -ld 1 -ldg 0.9")
    assert (made.train.schedule, made.train.gamma) == ("exponential", 0.9)
    assert "HtFLlib's clients do not use it" in notes
    assert settings("main.py -algo FedAvg -m CNN -ldg 0.9")[0].train.schedule == "constant"


def test_split_is_theirs() -> None:
    """Sizes vary as in a hundred draws of PFLlib's own code: std / mean 0.77, smallest client 47."""
    made, notes = settings("main.py -data MNIST -algo FedAvg -nc 100")
    note = " ".join(notes.replace("#", "").split())
    assert "as by their data scripts with `noniid - dir`" in note and "--data.source npz" in note
    labels = np.arange(60_000) % 10
    variation, smallest = [], []
    for seed in range(4):
        split = make_partition(made.partition, labels, 10, 100, seed)
        sizes = [len(train) + len(test) for train, test in zip(split.train, split.test, strict=True)]
        variation.append(np.std(sizes) / np.mean(sizes))
        smallest.append(min(sizes))
    assert np.mean(variation) == pytest.approx(0.766, abs=0.08) and min(smallest) >= 40


@pytest.mark.parametrize(
    ("method", "named", "setting"),
    [
        ("FML", "averaged over batch and classes; reaches the teacher; over clients, unweighted", ""),
        ("FedKD", "averaged over batch and classes; reaches the teacher; over clients, unweighted", ""),
        ("FD", "share mean logits and feed these as they are; contains its own outputs", ""),
        ("FedProto", "unweighted; before any prototype exists theirs counts no test sample", "prototype"),
        ("FedTGP", "class means are those of the round's start; before any prototype exists", "prototype"),
        ("FedMRL", "their projection never trains; mean is over clients, unweighted", ""),
        ("APFL", "mixing weight moves in every step; mean is by samples", ""),
        ("FedBN", "not the BatchNorm of a ResNet's shortcuts", ""),
        ("Local", "", ""),
    ],
)
def test_differences_in_a_method_itself_are_named(method: str, named: str, setting: str) -> None:
    """A line for each one, and only those of the method."""
    pfllib = method in {"APFL", "FedBN"}
    made, printed = settings(f"main.py -algo {method}" if pfllib else HTFLLIB.format(method))
    assert made.model.start == "architecture", "their clients copy one model of each architecture"
    assert getattr(made.options, "answer", "") == setting
    lines = [" ".join(line.replace("#", "").split()) for line in re.split(r"^# (?! )", printed, flags=re.M)]
    for note in filter(None, named.split("; ")):
        assert [line for line in lines if note in line], note
    others = {note for name, notes in translate.DIFFERENCES.items() for note in notes}
    own = set(translate.DIFFERENCES.get(made.algorithm, ()))
    assert {note for note in others if note in lines} == own


@pytest.mark.parametrize(
    ("line", "averaged"),
    [
        ("-m ResNet18 -algo FedAvg", True),
        ("-m HtFE-img-5 -algo FML", True),
        ("-m HtFE-img-2 -algo FML", False),  # whose first model, the shared one, has no BatchNorm
        ("-m ResNet18 -algo FedBN", False),  # which leaves BatchNorm with its client in both
        ("-m HtFE-img-3 -algo FedProto", False),
        ("-algo FedAvg", False),
    ],
)
def test_running_statistics_are_named_where_a_shared_network_has_them(line: str, averaged: bool) -> None:
    said = " ".join(settings(f"main.py {line}")[1].replace("#", "").split())
    assert ("not BatchNorm's running statistics" in said) == averaged


def test_translate_prints_a_runnable_command(
    run_command: Callable[..., launcher.Result], assert_refused: Callable[..., str]
) -> None:
    said = run_command(
        "translate", "--", *shlex.split("main.py -data Cifar10 -algo FedProto -m HtFE-img-4")
    ).out
    assert "--algorithm fedproto" in said and said.splitlines()[0].startswith("# ")
    assert_refused("-algo FedGen is not a method", "translate", "--", "python", "main.py", "-algo", "FedGen")
    assert_refused(
        "-algos is not a flag of .*did you mean 'algo'", "translate", "--", "main.py", "-algos", "FedAvg"
    )
    assert_refused("-lr needs a value", "translate", "main.py", "-lr")
    quoted = "python main.py -go 'test -data MNIST"
    assert_refused("cannot be divided into words: No closing quotation", "translate", quoted)
    assert "--run.dir runs/main.pyx" in run_command("translate", "--", "-go", "main.pyx").out


def test_table_of_flags(run_command: Callable[..., launcher.Result]) -> None:
    text = run_command("translate", "--flags").out
    assert max(map(len, text.splitlines())) <= 100
    table = text.split("\n\n")[1]
    rows = dict(re.findall(r"^(-.{1,35}?)  +(.*(?:\n {38}.*)*)", table, re.M))
    assert len(rows) > 45
    here = {names: " ".join(right.split()) for names, right in rows.items()}
    for flag in neighbours.FLAGS:
        if flag.elsewhere:
            assert re.search(rf"(^|[ ,])-{flag.short}(,|$| )", table, re.M) and flag.elsewhere in table, flag
            continue
        right = here[f"-{flag.short}, --{flag.long}"]
        for setting in (*flag.ours, *flag.of_methods):
            assert f"--{setting}" in right
        assert flag.note in right and right, flag


def test_methods_of_flags_exist() -> None:
    assert {method for method, _ in neighbours.OF_METHODS} <= set(methods.names())
