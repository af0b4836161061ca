"""The command `attack`: what it reaches without protection, that protection stops it, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedmoe_mpi.attack import images, likelihood, membership, rates, shadows
from pfedmoe_mpi.attack.likelihood import Losses
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.cli import main
from pfedmoe_mpi.report import attack_section, drawing
from pfedmoe_mpi.report.load import load_runs
from pfedmoe_mpi.run.evaluate import evaluation_loop
from support import launcher
from support.launcher import SMALL_RUN, error_message
from support.small_federation import shared_comm

NAME = "checkpoints/round-000001.h5"
NOISE = ("--privacy.clip", "0.1", "--privacy.noise", "1")
FEW = ("--trials", "1", "--steps", "100")
MASKS = ("--privacy.masked", "true")
EMPTY = ("--kind", "reconstruction", "--privacy.sampling", "poisson", "--participation", "0.001")


@pytest.fixture(scope="module")
def folder(session: launcher.Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of FedAvg, and of models that learnt their few rows by heart."""
    folder = tmp_path_factory.mktemp("attack")
    one = ("--model.pool", "mlp5")
    heart = ("--train.epochs", "25", "--train.lr", "0.05", "--partition.kind", "iid")
    for name, flags in (("fedavg", one), ("standalone", (*one, *heart)), ("pfedmoe", ())):
        line = (*SMALL_RUN, "--algorithm", name, *flags, "--run.dir", name)
        assert session("run", *line, cwd=folder).code == 0
    return folder


def attacked(session: launcher.Session, folder: Path, run: str, kind: str, *flags: str) -> dict[str, Any]:
    result = session("attack", f"{run}/{NAME}", "--kind", kind, "--json", "true", *flags, cwd=folder)
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


# Reconstruction


def test_a_contribution_shows_its_sample_unless_it_is_protected(
    session: launcher.Session, folder: Path
) -> None:
    plain = attacked(session, folder, "fedavg", "reconstruction", *FEW)
    name = "reconstruction-round-000001-client-0-samples-1-trials-1-steps-100-none.json"
    kept = folder / "fedavg" / "attacks" / name
    assert json.loads(kept.read_text()) == plain
    assert plain == attacked(session, folder, "fedavg", "reconstruction", *FEW)
    assert [each.name for each in kept.parent.iterdir()] == [name]
    assert plain["attack"]["psnr"] > 60 and plain["attack"]["ssim"] > 0.9
    assert plain["attack"]["mse"] < plain["mean"]["mse"] / 4 < plain["guess"]["mse"]
    shown = [np.array(pair[name]) for pair in plain["images"] for name in ("true", "found")]
    assert len(shown) == 2 and np.abs(shown[0] - shown[1]).mean() < 20
    decayed = attacked(session, folder, "fedavg", "reconstruction", *FEW, "--train.weight_decay", "1")
    assert decayed["attack"]["psnr"] > 60
    pair = attacked(session, folder, "fedavg", "reconstruction", *FEW[:2], "--steps", "200", "--samples", "2")
    assert pair["attack"]["ssim"] > 0.7 and pair["attack"]["mse"] < pair["mean"]["mse"] / 2  # by descent
    for protection, flags in (("masked", MASKS), ("clip = 0.1 per client with noise 1 × clip", NOISE)):
        found = attacked(session, folder, "fedavg", "reconstruction", *FEW, *flags)
        assert found["protection"] == protection
        assert found["attack"]["mse"] > found["mean"]["mse"] and found["attack"]["ssim"] < 0.2
        assert found["distance"] > 0.5
    clipped = attacked(session, folder, "fedavg", "reconstruction", *FEW, *NOISE[:2])
    assert clipped["attack"]["ssim"] > 0.9  # a shorter update has the same direction
    assert json.loads(kept.read_text()) == plain and len(list(kept.parent.iterdir())) == 6


def test_the_report_shows_attacks(session: launcher.Session, folder: Path) -> None:
    attacked(session, folder, "fedavg", "membership")
    found = attacked(session, folder, "fedavg", "reconstruction", *FEW, *MASKS)
    words = ("report", "fedavg", "--text", "true")
    text = session(*words, cwd=folder).out
    assert "Which rows were trained on" in text and "shared: model" in text
    (run,), _ = load_runs([folder / "fedavg"])
    (section,) = attack_section.sections(run)
    rows = [row for row in section.tables[1].rows if row[6].text == "masked"]
    assert [row[7].text for row in rows] == ["reconstruction", "mean of test rows", "drawn test rows"]
    assert [cell.text for cell in rows[0][3:6]] == ["1", "1", "100"]
    assert rows[0][8].values == (found["attack"]["mse"],)
    figure = next(each for each in section.figures if "protection: masked" in each.title)
    assert drawing.svg(figure).count("<image") == 2
    for spoilt, message in (("{", "cannot be read"), ("[]", "not the result"), ("{}", "not the result")):
        (folder / "fedavg" / "attacks" / "spoilt.json").write_text(spoilt)
        error_message(session(*words, cwd=folder), message)
    (folder / "fedavg" / "attacks" / "spoilt.json").unlink()


def test_images_are_compared_in_their_best_order() -> None:
    true = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(images.matched(true[[2, 0, 1]], true), true)
    same = images.likeness(true, true)
    assert (same.mse, same.psnr) == (0, 100) and same.ssim == pytest.approx(1)
    off = images.likeness(true + 0.1, true)
    assert off.mse == pytest.approx(0.01) and off.psnr == pytest.approx(20, abs=1e-3) and off.ssim < 1
    assert np.isnan(images.likeness(true.flatten(1), true.flatten(1)).ssim)


# Membership


def test_models_that_learnt_by_heart_give_their_members_away(session: launcher.Session, folder: Path) -> None:
    found = attacked(session, folder, "standalone", "membership")
    pooled = found["clients"]["pooled"]
    assert pooled["auc"] > 0.6 and pooled["auc_interval"][0] > 0.5
    assert (pooled["members"], pooled["others"]) == (160, 40)
    assert pooled["tpr"] == {"0.001": None, "0.01": None}  # 40 others cannot show either rate
    assert "no module" in found["shared"]["reason"]
    result = session("attack", f"standalone/{NAME}", "--kind", "membership", cwd=folder)
    assert "found at 1 % false positives: needs 100 others, 40 are there" in result.out


def test_shadow_runs_tell_members(session: launcher.Session, folder: Path) -> None:
    plain = attacked(session, folder, "standalone", "membership")["clients"]
    found = attacked(session, folder, "standalone", "membership", "--shadows", "5")["clients"]
    ratio = found.pop("likelihood_ratio")
    assert found == plain
    assert (ratio["shadows"], ratio["members"], ratio["others"]) == (5, 160, 40)
    assert ratio["auc_interval"][0] > 0.6
    (run,), _ = load_runs([folder / "standalone"])
    (section,) = attack_section.sections(run)
    models = [row[1].text for row in section.tables[0].rows]
    assert models == ["of the clients", "of the clients, likelihood ratio of 5 shadow runs"]
    assert len(list((folder / "standalone" / "attacks").iterdir())) == 2
    with Checkpoint(folder / "standalone" / NAME) as loaded:
        loop = evaluation_loop(shared_comm(), loaded, {})
    own = loop.federation.partition
    parts = [shadows._divided(loop.federation, number) for number in range(5)]
    for client in range(4):
        tested = np.sort(np.concatenate([part.test[client] for part in parts]))
        assert np.array_equal(tested, np.sort(np.concatenate([own.train[client], own.test[client]])))
        assert all(not set(part.test[client]) & set(part.train[client]) for part in parts)


def test_shadow_runs_that_were_trained_before(session: launcher.Session, folder: Path) -> None:
    """With the same rows by client they attack clients' models, with others the shared part alone."""
    rows = np.random.default_rng(1).permutation(200).reshape(4, 5, 10)  # a run tests two of five tens
    alone = (
        "--algorithm",
        "standalone",
        "--train.epochs",
        "20",
        "--train.lr",
        "0.05",
        "--model.pool",
        "mlp5",
    )
    for number in range(5):
        two = [number, (number + 1) % 5]
        split = [{"train": np.delete(own, two, 0).ravel(), "test": own[two].ravel()} for own in rows]
        lists = [{part: found.tolist() for part, found in each.items()} for each in split]
        (folder / f"alone{number}.json").write_text(json.dumps(lists))
        (folder / f"moved{number}.json").write_text(json.dumps(lists[number % 4 :] + lists[: number % 4]))
    runs = {f"alone{n}": alone for n in range(5)} | {f"moved{n}": ("--train.epochs", "1") for n in range(3)}
    for name, line in runs.items():
        words = (*SMALL_RUN, *line, "--partition.file", f"{name}.json", "--run.dir", name)
        assert session("run", *words, cwd=folder).code == 0
    ratio = attacked(
        session, folder, "alone0", "membership", "--shadows", *[f"alone{n}" for n in range(1, 5)]
    )
    ratio = ratio["clients"]["likelihood_ratio"]
    assert (ratio["shadows"], ratio["members"], ratio["others"]) == (4, 120, 80)
    assert ratio["auc_interval"][0] > 0.6
    words = ("attack", f"moved0/{NAME}", "--kind", "membership", "--shadows", "moved1", "moved2")
    text = session(*words, cwd=folder).out
    assert "by likelihood ratio: not attacked, clients have other rows in the shadow runs" in text
    shared = text.partition("shared part shared, head: a probe of the attacker")[2]
    assert "by likelihood ratio with 2 shadow runs\n  AUC" in shared

    (folder / "alone2" / NAME).unlink()
    (folder / "alone2" / "checkpoints" / "best.h5").unlink()
    for run, words, message in (
        ("alone0", ("alone0",), "has the seed and the training rows of the attacked run"),
        ("alone0", ("alone1", "alone1"), "has the seed and the training rows of alone1"),
        ("alone0", ("alone1",), "no row is a training row of one shadow run and a test row of another"),
        ("alone0", ("alone2",), "--shadows alone2 has no checkpoint of round 1"),
        ("fedavg", ("alone1",), "is not a shadow run of this checkpoint: algorithm = standalone, not fedavg"),
        ("fedavg", ("nowhere", "alone1"), "--shadows nowhere is not a run folder"),
    ):
        line = ("attack", f"{run}/{NAME}", "--kind", "membership", "--shadows", *words)
        error_message(session(*line, cwd=folder), message)


def phi(*losses: float) -> np.ndarray:
    chance = np.exp(-np.array(losses))
    return np.log(chance / (1 - chance))


def test_ratios_are_those_of_gaussians_by_hand() -> None:
    """Three rows, one of which every shadow model was trained on, with one variance for all scores."""
    rows = np.array([2, 5, 9])
    own = Losses(rows, np.array([0.1, 2.0, 1.0]), np.array([True, False, True]))
    shadows = [
        Losses(rows, np.array([first, second, 0.3]), np.array([*trained, True]))
        for first, second, *trained in (
            *((0.2, 1.0, True, False), (0.1, 0.3, True, True)),
            *((1.5, 1.8, False, False), (1.0, 0.4, False, True)),
        )
    ]
    inside, outside = (phi(0.2, 0.1), phi(0.3, 0.4)), (phi(1.5, 1.0), phi(1.0, 1.8))
    variance = sum(2 * each.var() for each in (*inside, *outside)) / 4 + likelihood.LEAST
    found = likelihood.ratios(own, shadows)
    for ratio, value, i, o in zip(found, phi(0.1, 2.0), inside, outside, strict=True):
        expected = ((value - o.mean()) ** 2 - (value - i.mean()) ** 2) / (2 * variance)
        assert ratio.tolist() == [pytest.approx(expected)]


def test_rows_that_a_model_never_saw_look_alike(folder: Path) -> None:
    with Checkpoint(folder / "standalone" / NAME) as loaded:
        loop = evaluation_loop(shared_comm(), loaded, {})
    federation = loop.federation
    scores = []
    for client in range(4):
        parts = federation.parts(federation.clients[client], loop.state)
        other = federation.clients[(client + 1) % 4].splits
        with torch.no_grad():
            pair = [-membership._losses(federation, other[s], parts.model.eval()) for s in ("train", "test")]
        scores.append(pair)
    members, others = (np.concatenate([pair[place] for pair in scores]) for place in (0, 1))
    assert rates.rates(members, others, 0.0)["auc"] == pytest.approx(0.5, abs=0.1)


def test_a_shared_extractor_is_attacked_by_a_probe(session: launcher.Session, folder: Path) -> None:
    shared = attacked(session, folder, "pfedmoe", "membership")["shared"]
    assert (shared["part"], shared["head"]) == ("shared", "a probe of the attacker")
    assert (shared["members"], shared["others"]) == (160, 40) and 0.2 < shared["auc"] < 0.8


def test_rates_are_those_of_counting() -> None:
    others = np.arange(1000.0)
    members = np.array([999.5, 998.5, 990.5, 500.5, -1.0])
    found = rates.rates(members, others, 990.0)
    above = [(others < score).sum() for score in members]
    assert found["auc"] == pytest.approx(np.mean(above) / 1000)
    # One other may score as high at 0.1 %, ten at 1 %.
    assert [found["tpr"][rate]["rate"] for rate in ("0.001", "0.01")] == [2 / 5, 3 / 5]
    assert found["balanced_accuracy"] == pytest.approx((3 / 5 + 990 / 1000) / 2)
    low, high = found["auc_interval"]
    assert low < found["auc"] < high <= 1
    assert rates.rates(members, others[:99], 0.0)["tpr"] == {"0.001": None, "0.01": None}
    # Published values of the interval.
    assert rates.clopper_pearson(0, 10) == pytest.approx([0, 0.3085], abs=1e-4)
    assert rates.clopper_pearson(5, 10) == pytest.approx([0.1871, 0.8129], abs=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("attack needs --kind", [f"fedavg/{NAME}"]),
        ("--kind", [f"fedavg/{NAME}", "--kind", "poison"]),
        ("send no gradient", [f"standalone/{NAME}", "--kind", "reconstruction"]),
        ("clients 0 to 3", [f"fedavg/{NAME}", "--kind", "reconstruction", "--client", "4"]),
        ("at most 8", [f"fedavg/{NAME}", "--kind", "reconstruction", "--samples", "9"]),
        (
            "--train.epochs has no effect",
            [f"fedavg/{NAME}", "--kind", "reconstruction", "--train.epochs", "2"],
        ),
        (
            "train.optimiser = adam",
            [f"fedavg/{NAME}", "--kind", "reconstruction", "--train.optimiser", "adam"],
        ),
        (
            "privacy.unit = sample",
            [f"fedavg/{NAME}", "--kind", "reconstruction", "--privacy.unit", "sample", "--privacy.clip", "1"],
        ),
        ("--privacy.noise 16300", [f"fedavg/{NAME}", *EMPTY[:2], *NOISE[:1], "1", *NOISE[2:3], "30000"]),
        ("no client was drawn into the cohort of round 2", [f"fedavg/{NAME}", *EMPTY]),
        ("no client was drawn", [f"fedavg/{NAME}", *EMPTY, "--client", "3"]),
        ("trained on other data", [f"fedavg/{NAME}", "--kind", "membership", "--data.samples", "300"]),
        ("--shadows has no effect", [f"fedavg/{NAME}", "--kind", "reconstruction", "--shadows", "9"]),
        ("--client has no effect", [f"fedavg/{NAME}", "--kind", "membership", "--client", "1"]),
        ("only 5 shadow runs", [f"standalone/{NAME}", "--kind", "membership", "--shadows", "4"]),
        ("at least two samples", [f"pfedmoe/{NAME}", "--kind", "reconstruction"]),
        ("no.h5", ["no.h5", "--kind", "membership"]),
    ],
)
def test_refusals(session: launcher.Session, folder: Path, message: str, words: list[str]) -> None:
    error_message(session("attack", *words, cwd=folder), message)


def test_one_rank(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "0")
    assert main(["attack", str(folder / "fedavg" / NAME), "--kind", "membership"]) == 2
    assert "attack runs on one rank" in capsys.readouterr().err
