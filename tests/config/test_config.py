"""The configuration and its flags: what is accepted, and what a file and a flag mean."""

from __future__ import annotations

import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pfedmoe_mpi import algorithms, cli, config, parser
from pfedmoe_mpi.config import flags, methods
from pfedmoe_mpi.errors import ConfigError
from support.paths import ROOT

FIELDS = config.fields()


def parsed(*words: str) -> config.Config:
    """Return the configuration that `run` would use."""
    return cli.configured(parser.parser("run").read(words))


def refused(pattern: str, **settings: Any) -> str:
    """Return the message about these settings (`__` for the dot); it must match and state a remedy."""
    with pytest.raises(ConfigError, match=pattern) as caught:
        config.build({name.replace("__", "."): value for name, value in settings.items()})
    assert "remedy: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_sentence_and_a_valid_default(name: str) -> None:
    text = flags.sentence(FIELDS[name])
    assert len(text) > 10 and text.endswith((".", ")")), text
    settings = config.build({name: FIELDS[name].default})
    assert config.flatten(settings.model_dump())[name] == FIELDS[name].default


def test_every_general_setting_has_a_reason() -> None:
    general = {name for name in FIELDS if name.partition(".")[0] not in methods.names()}
    assert len(general) > 60
    for name in general:
        assert re.fullmatch(r"\S.*[^.\s]", flags.reason(FIELDS[name])), name


@pytest.mark.parametrize("name", flags.settings())
def test_every_default_is_accepted_as_a_flag(name: str) -> None:
    default = FIELDS[name].default
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    assert config.flatten(parsed(f"--{name}={text}").model_dump())[name] == default


def test_preset_lies_below_the_file_and_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("train.batch = 64\ntrain.epochs = 3\n")
    found = parsed("--preset", "paper", str(file), "--train.epochs", "2").train
    assert (found.lr, found.batch, found.epochs) == (0.01, 64, 2)
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        parsed("--preset", "papr")


def test_preset_paper_is_the_papers_table() -> None:
    settings = config.flatten(config.to_tree(parsed("--preset", "paper")))
    preset = config.read_toml(ROOT / "pfedmoe_mpi" / "presets" / "paper.toml")
    text = (ROOT / "jobs" / "tables" / "pfedmoe-heterogeneous.toml").read_text()
    table = config.flatten(tomllib.loads(text)["base"])
    both = preset.keys() & table.keys()
    assert len(both) > 7 and {name: table[name] for name in both} == {name: settings[name] for name in both}
    for section in ("gate", "pfedmoe"):  # all of it, but a gate of one's own
        listed = {name for name in preset if name.startswith(f"{section}.")}
        assert listed == {name for name in settings if name.startswith(f"{section}.")} - {"gate.module"}


@pytest.mark.parametrize("algorithm", methods.names())
def test_toml_round_trip_keeps_the_configuration(algorithm: str, tmp_path: Path) -> None:
    unlike = {
        "algorithm": algorithm,
        "participation": 1 / 3,
        "train.lr": 1e-7,
        "train.threads": "auto",
        "train.augment": "flip,crop",
        "data.path": str(tmp_path / 'a "quoted" Ünder\\path'),
        "data.mean": "0.1,0.2,0.3",
        "data.std": "1,2,3",
        "gate.batch_norm": "false",
        "seed": str(2**61),
    }
    settings = config.build(unlike)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(settings), encoding="utf-8")
    assert config.build(config.read_toml(path)) == settings
    written = set(config.read_toml(path))
    own = {name for name in FIELDS if name.partition(".")[0] not in set(methods.names()) - {algorithm}}
    assert written == own, "the file holds every field but the sections of other algorithms"


def test_flags_override_the_file_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "config.toml"
    path.write_text('rounds = 7\n[data]\nsource = "hdf5"\npath = "d.h5"\n[run]\ndir = "../out"\nkeep = 9\n')
    settings = parsed(str(path), "--rounds", "8")
    assert (settings.rounds, settings.run.keep) == (8, 9)
    assert Path(settings.data.path) == tmp_path / "deep" / "d.h5"
    assert Path(settings.run.dir).resolve() == tmp_path / "out"
    assert Path(parsed(str(path), "--data.path", "other.h5").data.path) == Path.cwd() / "other.h5"


def test_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsed("--data.path=~/x.h5").data.path == str(tmp_path / "x.h5")
    (tmp_path / "c.toml").write_text('data.path = "~/x.h5"')
    assert config.read_toml(tmp_path / "c.toml")["data.path"] == str(tmp_path / "x.h5")


def test_hyphens_stand_for_underscores(tmp_path: Path) -> None:
    settings = parsed("--run.checkpoint-every", "5", "--model.pool", "wide-resnet50-2,Shufflenet-v2-x0_5")
    assert settings.run.checkpoint_every == 5
    assert settings.model.pool == ("wide_resnet50_2", "shufflenet_v2_x0_5")
    (tmp_path / "c.toml").write_text("[train]\nlr-gate = 0.5\n")
    assert parsed(str(tmp_path / "c.toml")).train.lr_gate == 0.5


def test_lists_are_comma_separated(tmp_path: Path) -> None:
    assert parsed("--model.pool", "cnn1, cnn3").model.pool == ("cnn1", "cnn3")
    assert parsed("--data.mean", "0.5,-1", "--data.std=1,2").data.mean == (0.5, -1.0)
    (tmp_path / "c.toml").write_text('[model]\npool = ["cnn2", "cnn4"]\n')
    assert parsed(str(tmp_path / "c.toml")).model.pool == ("cnn2", "cnn4")


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("false", False), ("False", False)]
)
def test_boolean_flags_are_parsed(text: str, value: bool) -> None:
    assert parsed("--run.force", text).run.force is value


@pytest.mark.parametrize("value", ["yes", "1", "on", "", 1, 0, None])
def test_other_words_are_not_booleans(value: Any) -> None:
    refused("run.force = .*: expected true or false", run__force=value)


@pytest.mark.parametrize("name", ["rounds", "train.lr", "data.path", "model.pool"])
def test_boolean_is_refused_for_other_types(name: str) -> None:
    refused(f"{name} = true", **{name.replace(".", "__"): True})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("rouns", "rounds"), ("trian.lr", "train.lr"), ("partition.aplha", "partition.alpha")],
)
def test_unknown_field_suggests_the_nearest(name: str, meant: str) -> None:
    refused(f"'{name}'.*did you mean '{meant}'", **{name.replace(".", "__"): 1})
    with pytest.raises(ConfigError, match=rf"no flag --{name}\n  remedy: use --{meant}$"):
        parsed(f"--{name}", "1")


def test_all_wrong_settings_are_reported_at_once() -> None:
    message = refused("rounds = 'x'", rounds="x", train__lr=-1, data__source="digit")
    assert "train.lr = -1" in message and "data.source = 'digit'" in message and "'digits'" in message


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *[
            (name, 0)
            for name in ("rounds", "clients", "train.epochs", "eval.every", "eval.batch", "run.keep")
        ],
        *[(name, 0) for name in ("run.checkpoint_every", "gate.hidden", "gate.layers", "partition.classes")],
        *[("participation", value) for value in (0, 1.01, -1, "nan", "inf", "half")],
        *[
            (name, value)
            for name in ("train.lr", "train.lr_shared", "train.lr_gate")
            for value in (-1, "nan")
        ],
        *[(name, value) for name in ("train.clip", "train.weight_decay") for value in (-1, "inf")],
        *[("train.momentum", value) for value in (1, -0.1, "nan")],
        *[("train.threads", value) for value in (0, -1, "all", 10**12)],
        *[("train.betas", value) for value in ("0.9", "0.9,1", "-0.1,0.9", "0.9,0.99,0.999", "nan,0.9")],
        *[("train.gamma", value) for value in (0, 1.1, "nan")],
        *[(f"train.{name}", value) for name in ("eps", "step_size", "accumulate") for value in (0, -1)],
        *[(f"train.{name}", -1) for name in ("warmup", "steps")],
        *[("train.optimiser", value) for value in ("rmsprop", "")],
        *[(f"server.{name}", value) for name in ("lr", "tau", "momentum") for value in (-1, "inf")],
        *[("partition.alpha", value) for value in (0, "inf", "nan")],
        *[("partition.test_fraction", value) for value in (0, 1, "nan")],
        *[("partition.validation", value) for value in (1, -0.1)],
        *[("seed", value) for value in (-1, 2**62, 1.5)],
        ("rounds", 10**9 + 1),
        *[("data.mean", value) for value in ("nan", "a,b", "inf")],
        *[("model.pool", value) for value in ("", ",", "cnn9")],
        *[("model.shared", value) for value in ("", "cnn", "auto,cnn1")],
        *[("train.augment", value) for value in ("flop",)],
        *[("clients", value) for value in (2.5, "two", 10**7, [1], {"a": 1})],
        ("train.batch", 1),
        ("partition.min_samples", 1),
        ("data.size", -1),
        ("algorithm", 3),
    ],
)
def test_wrong_range_or_type_is_refused(name: str, bad: Any) -> None:
    refused(name.partition(".")[0], **{name.replace(".", "__"): bad})


@pytest.mark.parametrize("name", [n for n, f in config.fields().items() if f.annotation is float])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_numbers_are_finite(name: str, bad: str) -> None:
    """A checkpoint, whose configuration is JSON, could not be read again."""
    method = name.partition(".")[0]
    algorithm = {"algorithm": method} if method in methods.names() else {}
    refused(f"{name} = '{bad}'", **algorithm, **{name.replace(".", "__"): bad})


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("no algorithm 'fedpoto'; did you mean 'fedproto'", {"algorithm": "fedpoto"}),
        (
            "classes_min = 3 is above partition.classes = 2",
            {"partition.kind": "classes", "partition.classes_min": 3},
        ),
        ("data.source = hdf5 .* data.path is empty", {"data.source": "hdf5"}),
        ("data.mean has 1 and data.std 0 numbers", {"data.mean": "0.5"}),
        ("data.mean = 'nan'.*finite number", {"data.mean": "nan", "data.std": "1"}),
        ("data.std = 0: every number must be above 0", {"data.mean": "0.5", "data.std": "0"}),
        ("train.augment = .flop.: .*.flip., .erase. or .crop.", {"train.augment": "flip,flop"}),
        ("unseen.clients = 30 leaves no client", {"unseen.clients": 30}),
        ("cnn1 has 500 and mnist5 has 50", {"model.pool": "cnn1", "model.shared": "mnist5"}),
        ("cnn1 has 500 and mnist2 has 50", {"model.pool": "cnn1,mnist2"}),
    ],
)
def test_contradicting_settings_are_refused(pattern: str, settings: dict[str, Any]) -> None:
    refused(pattern, **{name.replace(".", "__"): value for name, value in settings.items()})


def test_one_length_reconciles_model_families() -> None:
    assert (
        config.build({"model.pool": "cnn1,mnist2", "model.shared": "mlp5", "model.dim": 64}).model.dim == 64
    )


@pytest.mark.parametrize("clients", [1, 2, 3, 7, 10, 1000])
@pytest.mark.parametrize("participation", [0.001, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])
def test_cohort_size_is_the_rounded_share(participation: float, clients: int) -> None:
    settings = config.build({"participation": participation, "clients": clients})
    assert settings.cohort_size == max(1, math.floor(participation * clients + 0.5))
    assert 1 <= settings.cohort_size <= clients


def test_halves_are_rounded_up() -> None:
    assert [config.build({"participation": 0.5, "clients": n}).cohort_size for n in (1, 3, 5, 7)] == [
        1,
        2,
        3,
        4,
    ]


def test_algorithm_has_its_own_section() -> None:
    settings = parsed("--algorithm", "fedproto", "--fedproto.weight", "2")
    assert settings.options.weight == 2.0  # type: ignore[attr-defined]
    refused("fedproto.weight = -1", fedproto__weight=-1)
    refused("pfedmoe.share = 'yes'", pfedmoe__share="yes")


@pytest.mark.parametrize("algorithm", methods.names())
def test_options_read_from_source_equal_the_class_options(algorithm: str) -> None:
    """`--help` compiles only the options; the method's file defines them."""
    section = getattr(config.build({"algorithm": algorithm}), algorithm)
    module = sys.modules[algorithms.load(algorithm).__module__]
    own = getattr(module, "Options", None)
    defined = {name: field.default for name, field in own.model_fields.items()} if own else {}
    assert section.model_dump() == defined
