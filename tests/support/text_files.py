"""Files of patients and texts with separable classes, and a check that restarts keep their bits."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from support.launcher import Result, run_to_end

HEADER = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,target"
HOSPITALS = {"alpha": 48, "beta": 40, "gamma": 36}
TOPICS = {
    "sport": "match team goal coach league score player season",
    "money": "market bank shares profit trade stocks price dollar",
    "space": "rocket orbit moon launch planet star probe comet",
}
FILLER = "the a of in on and for with at by to from said was is it that this as new"


def write_hospitals(folder: Path) -> Path:
    """Write three hospitals; beta has `?` for a tenth of all values, gamma never measures `ca` and `thal`."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(3)
    for name, patients in HOSPITALS.items():
        lines = [HEADER] if name != "beta" else []
        for number in range(patients):
            sick = number % 2
            values = [
                draw.normal(50 + 8 * sick, 6),
                draw.integers(2),
                draw.choice([4, 4, 3] if sick else [1, 2]),
            ]
            values += [draw.normal(130, 10), draw.normal(240, 30), draw.integers(2), draw.integers(3)]
            values += [draw.normal(160 - 20 * sick, 10), draw.integers(2), draw.normal(1 + sick, 0.5)]
            values += [draw.integers(1, 4), draw.integers(4), draw.choice([3, 6, 7])]
            words = [f"{value:.1f}" for value in values]
            if name == "beta":
                words = ["?" if draw.random() < 0.1 else word for word in words]
            if name == "gamma":
                words[-2:] = ["", "?"]
            lines.append(",".join([*words, str(sick * int(draw.integers(1, 5)))]))
        (folder / f"processed.{name}.data").write_text("\n".join(lines) + "\n")
    return folder


def write_news(path: Path, rows: int = 180) -> Path:
    """Write rows of label, title and text, with labels from 1 and a `classes.txt` in the same folder."""
    draw = np.random.default_rng(4)
    path.with_name("classes.txt").write_text("\n".join(TOPICS) + "\n")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        for number in range(rows):
            topic = number % len(TOPICS)
            words = TOPICS[list(TOPICS)[topic]].split()
            text = draw.permutation(
                [*draw.choice(words, 4), *draw.choice(FILLER.split(), draw.integers(3, 9))]
            )
            writer.writerow([topic + 1, text[0].title(), ", ".join(text[1:])])
    return path


def write_stories(folder: Path) -> Path:
    """Write three files of sentences whose last word follows from the one before it."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(5)
    for name in ("one", "three", "two"):
        lines = []
        for _ in range(60):
            animal, says = [("cat", "meows"), ("dog", "barks"), ("cow", "moos")][draw.integers(3)]
            lines.append(f"The {draw.choice(['old', 'big', 'red'])} {animal} {says}.")
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


def assert_restart_keeps_bits(done: Callable[..., Result], flags: Sequence[str], cwd: Path) -> str:
    """Check that two rounds on one rank equal two on two ranks with a restart; return the last checkpoint."""
    newest = "checkpoints/round-000002.h5"
    done(*flags, "--run.dir", "whole")
    for words in ([*flags, "--rounds", "1", "--run.dir", "half"], ["restart", "half", "--rounds", "2"]):
        run_to_end(2, *words, cwd=cwd)
    assert len({done("inspect", f"{run}/{newest}", "--digest").out for run in ("whole", "half")}) == 1
    return f"half/{newest}"
