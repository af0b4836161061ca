"""A report's model, class and rank tables, computed again with plain torch modules and numpy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import h5py
import matplotlib.figure
import numpy as np
import pytest
import torch
from sklearn.manifold import trustworthiness

from pfedmoe_mpi import config
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.models import registry
from pfedmoe_mpi.models.gate import build_gate
from pfedmoe_mpi.report import drawing, model_section, probe
from pfedmoe_mpi.report.load import load_run
from pfedmoe_mpi.report.model_views import ModelViews, principal_components
from pfedmoe_mpi.report.names import NO_NAMES
from support.files import flip_bit
from support.launcher import Result, Session, read_metrics, run_to_end
from support.paths import ROOT
from support.report_runs import read_table, same_number


@dataclass
class ReferenceClient:
    """One client in plain torch: its test rows, and its models' outputs on any rows; the mixture is a sum."""

    x: torch.Tensor
    y: np.ndarray
    gate: torch.nn.Module
    shared: torch.nn.Module
    model: registry.Model

    @torch.no_grad()
    def alpha(self, x: torch.Tensor) -> np.ndarray:
        return np.asarray(self.gate(x)[:, 0])

    @torch.no_grad()
    def representations(self, x: torch.Tensor) -> dict[str, np.ndarray]:
        a, g, f = self.gate(x)[:, :1], self.shared(x), self.model.extractor(x)
        return {"r_G": g.numpy(), "r_F": f.numpy(), "r": (2 * (a * g + (1 - a) * f)).numpy()}

    @torch.no_grad()
    def right(self, x: torch.Tensor, y: np.ndarray) -> float:
        logits = self.model.head(torch.from_numpy(self.representations(x)["r"]))
        return float((logits.argmax(1).numpy() == y).mean())


@pytest.fixture(scope="module")
def reference_clients(
    session: Session, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[ReferenceClient]:
    """Every client of `trained`, from its last checkpoint as exported."""
    folder = tmp_path_factory.mktemp("reference_clients")
    path = trained / "checkpoints" / "round-000003.h5"
    settings = config.build(config.read_toml(trained / "config.toml"))
    data = open_dataset(settings.data, settings.seed, clients=settings.clients)
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (data.mean, data.std))
    with h5py.File(path) as file:
        index, ends = file["partition/test"][()], file["partition/test_offsets"][()]
    found = []
    for k, (a, b) in enumerate(pairwise(ends)):
        assert session("export", str(path), "--client", str(k), f"{k}.h5", cwd=folder).code == 0
        with h5py.File(folder / f"{k}.h5") as file:
            names: list[str] = []
            file.visit(names.append)
            held = [name for name in names if isinstance(file[name], h5py.Dataset)]
            tensors = {name: torch.from_numpy(np.asarray(file[name][()])) for name in held}
        dim, stem = settings.model.dim, settings.model.stem
        raw = data.rows(index[a:b])
        scaled = raw / 255 if raw.dtype == np.uint8 else raw
        x = torch.from_numpy(((scaled - mean) / std).astype(np.float32))
        made = {
            "gate": build_gate(data.shape, dim, 2, **settings.gate.model_dump()),
            "shared": registry.build_extractor(settings.model.shared, data.shape, dim, stem),
            "model": registry.build_model(settings.model.pool[k % 2], data.shape, data.classes, dim, stem),
        }
        for name, module in made.items():
            own = {key.partition("/")[2]: v for key, v in tensors.items() if key.startswith(f"{name}/")}
            missing, unknown = module.load_state_dict(own, strict=False)
            assert own and not unknown and all(key.endswith("num_batches_tracked") for key in missing)
            module.eval()
        found.append(ReferenceClient(x, data.labels[index[a:b]], **made))
    return found


@pytest.fixture(scope="module")
def report(session: Session, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on `trained`."""
    folder = tmp_path_factory.mktemp("report")
    result = session("report", str(trained), "--out", "out", cwd=folder)
    assert result.code == 0, result.err
    return folder / "out"


@pytest.fixture(scope="module")
def looked(trained: Path) -> ModelViews:
    return probe.view_models(load_run(trained))


def test_gate_weights_by_class_equal_plain_torch(
    reference_clients: list[ReferenceClient], trained: Path, report: Path
) -> None:
    alpha = np.concatenate([one.alpha(one.x) for one in reference_clients])
    labels = np.concatenate([one.y for one in reference_clients])
    found = read_metrics(trained)
    assert [row["alpha_class"] is None for row in found] == [True, False, False], "measured in 2 and 3"
    for label, value in enumerate(found[-1]["alpha_class"]):
        own = alpha[labels == label]
        assert (value is None) == (not len(own))
        assert value is None or value == pytest.approx(own.mean(), abs=1e-6)
    for row in read_table(report, "alpha_class"):
        for name in ("round 2", "round 3"):
            assert same_number(row[name], found[int(name[-1]) - 1]["alpha_class"][int(row["class"])])


def test_shared_test_set_accuracy_equals_plain_torch(
    reference_clients: list[ReferenceClient], report: Path, trained: Path
) -> None:
    x, y = (
        torch.cat([one.x for one in reference_clients]),
        np.concatenate([one.y for one in reference_clients]),
    )
    shared = [one.right(x, y) for one in reference_clients]
    own = read_metrics(trained)[-1]["clients"]["accuracy"]
    assert len(set(shared)) > 1 and [one.right(one.x, one.y) for one in reference_clients] == pytest.approx(
        own
    )
    for row in read_table(report, "clients"):
        assert same_number(row["shared test"], shared[int(row["client"])])
    summary = {row["accuracy on"]: row for row in read_table(report, "shared_test")}
    for name, values in (("own test rows", own), ("shared test set", shared)):
        assert same_number(summary[name]["mean"], float(np.mean(values)))
        assert same_number(summary[name]["worst"], min(values)) and same_number(
            summary[name]["best"], max(values)
        )
    page = (report / "report.html").read_text()
    assert f"the same {len(y)} rows for every client" in page


def test_extreme_gate_samples_equal_plain_torch(
    reference_clients: list[ReferenceClient], report: Path
) -> None:
    found = [
        (a, y, k)
        for k, one in enumerate(reference_clients)
        for a, y in zip(one.alpha(one.x), one.y, strict=True)
    ]
    found.sort()
    listed = read_table(report, "alpha_samples")
    number = len(listed) // 2
    assert number == 8
    expected = [*found[::-1][:number], *found[:number]]
    assert [row["α"] for row in listed] == ["highest"] * number + ["lowest"] * number
    for row, (alpha, label, client) in zip(listed, expected, strict=True):
        assert float(row["weight"]) == pytest.approx(alpha, abs=1e-6)
        assert (int(row["class"]), int(row["client"])) == (label, client)
    assert "data:image/png" in (report / "report.html").read_text()


def test_representations_equal_plain_torch(
    reference_clients: list[ReferenceClient], looked: ModelViews
) -> None:
    assert looked.method == "PCA" and list(looked.representations) == ["r_G", "r_F", "r"]
    assert looked.labels.tolist() == [y for one in reference_clients for y in one.y]
    assert looked.clients.tolist() == [k for k, one in enumerate(reference_clients) for _ in one.y]
    assert looked.private == {"r_F", "r"} and list(looked.embeddings) == ["r_G"]
    for name, values in looked.representations.items():
        expected = np.concatenate([one.representations(one.x)[name] for one in reference_clients])
        assert np.allclose(values, expected, atol=1e-5)
        if name == "r_G":
            assert np.allclose((looked.embeddings[name] ** 2).sum(axis=0), variances(expected), rtol=1e-3)
    assert len(looked.own_embeddings) == 2 * len(reference_clients)
    for (name, client), points in looked.own_embeddings.items():
        one = reference_clients[client]
        expected = variances(one.representations(one.x)[name])
        assert np.allclose((points**2).sum(axis=0), expected, rtol=1e-3), "one client alone"


def variances(table: np.ndarray) -> np.ndarray:
    """Return the two largest variances along an axis, times the number of rows."""
    flat = table - table.mean(axis=0)
    return np.asarray(np.linalg.eigvalsh(flat.T @ flat)[::-1][:2])


def test_pictures_show_the_samples(
    reference_clients: list[ReferenceClient], looked: ModelViews, trained: Path
) -> None:
    place = int(looked.extremes[0][0])
    x = torch.cat([one.x for one in reference_clients])[place].numpy()
    shown = looked.picture(place)
    shown = shown[None] if shown.ndim == 2 else shown.transpose(2, 0, 1)
    assert shown.min() >= 0 and shown.max() <= 1
    assert np.corrcoef(x[0].ravel(), shown[0].ravel())[0, 1] > 0.999


def test_projection_keeps_neighbours() -> None:
    drawn = np.random.Generator(np.random.PCG64(0))
    labels = np.repeat(np.arange(4), 40)
    far = drawn.normal(size=(4, 60))[labels] * 9 + drawn.normal(size=(160, 60))
    few = {"clients": labels, "labels": labels, "alpha": None, "raw": far, "shared_rows": 1}
    few["private"] = frozenset()
    nothing = {"accuracy_shared": np.empty(0), "accuracy_own": np.empty(0), "round": 1, "samples": 160}
    seen = ModelViews(**few, **nothing, representations={"r": far}, seed=1)
    assert seen.method == "t-SNE" and not seen.images
    flat = seen.embeddings["r"]
    assert flat.shape == (160, 2) and trustworthiness(far, flat) > 0.9
    again = ModelViews(**few, **nothing, representations={"r": far}, seed=1).embeddings["r"]
    assert np.array_equal(flat, again)
    centres = np.array([flat[labels == k].mean(axis=0) for k in range(4)])
    assert (np.argmin(((flat[:, None] - centres) ** 2).sum(axis=2), axis=1) == labels).all()
    assert principal_components(np.ones((5, 1))).shape == (5, 2), "one feature does not span a plane"


def test_seconds_by_rank_equal_the_metrics(trained: Path, report: Path) -> None:
    found = read_metrics(trained)
    assert all(len(values) == 2 for row in found for values in row["seconds_ranks"].values())
    for row in found:
        for name, values in row["seconds_ranks"].items():
            assert max(values) == pytest.approx(row["seconds"][name], abs=1e-6)
    for row in read_table(report, "ranks"):
        for name in ("train", "evaluate", "sum", "wait"):
            each = [line["seconds_ranks"][name][int(row["rank"])] for line in found]
            assert same_number(row[f"{name}, s"], float(np.mean(each)))


# Other methods, and what may be missing


def test_method_without_gate_has_no_gate_tables(
    session: Session, small_run: tuple[str, ...], tmp_path: Path
) -> None:
    which = ("--algorithm", "standalone", "--run.dir", "run", "--partition.kind", "pathological")
    assert session(*small_run, *which, "--unseen.clients", "1", cwd=tmp_path).code == 0
    assert all(row["alpha_class"] is None for row in read_metrics(tmp_path / "run"))
    assert session("report", "run", "--out", "out", cwd=tmp_path).code == 0
    names = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"generalisation", "representations_own"} <= names
    assert not {"representations_class", "representations_client"} & names, "no part is shared"
    assert not {"gates", "gates_class", "alpha_samples", "ranks"} & names
    column = [row["shared test"] for row in read_table(tmp_path / "out", "clients")]
    assert column.count("") == 1, "who never trained has no answer"


def test_features_are_listed_instead_of_drawn(
    session: Session, small_run: tuple[str, ...], tmp_path: Path
) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    labels = np.arange(600) % 3
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["x"] = (generator.normal(size=(600, 12)) + labels[:, None]).astype(np.float32)
        file["y"] = labels
    which = ("--data.source", "hdf5", "--data.path", "features.h5", "--run.dir", "run")
    flags = ("--clients", "4", "--rounds", "1", "--train.device", "cpu")
    result = session(*which, *flags, cwd=tmp_path)
    assert result.code == 0, result.err
    assert session("report", "run", "--out", "out", cwd=tmp_path).code == 0
    names = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert "alpha_samples" not in names and len(read_table(tmp_path / "out", "alpha_samples")) == 16
    page = (tmp_path / "out" / "report.html").read_text()
    assert "r_G (output of the shared extractor), of the test samples by class, in the plane by t-SNE" in page
    assert "Each client has a plane of its own" in page


def test_shared_extractor_has_one_plane(session: Session, small_run: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--algorithm", "fedavg", "--model.pool", "mlp5", "--run.dir", "run")
    assert session(*small_run, *flags, cwd=tmp_path).code == 0
    assert session("report", "run", "--out", "out", cwd=tmp_path).code == 0
    names = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"representations_class", "representations_client"} <= names and "representations_own" not in names


def test_legend_names_the_largest_clients_and_the_others(looked: ModelViews) -> None:
    many = replace(looked, clients=np.arange(len(looked.labels)) % 12)
    for views, expected in ((looked, [f"client {k}" for k in range(4)]), (many, 10)):
        canvas = matplotlib.figure.Figure(figsize=(drawing.WIDTH, 3))
        model_section.plane(views, "client", NO_NAMES).draw(canvas, drawing.PAPER)
        said = [text.get_text() for text in canvas.legends[0].get_texts()]
        assert said == expected or (len(said) == 11 and said[-1] == "others" and expected == 10)
        looks = {(line.get_color(), line.get_marker()) for line in canvas.axes[0].lines}
        assert len(looks) == len(said), "every client has a sign of its own"
        assert len({line.get_marker() for line in canvas.axes[0].lines}) >= min(len(said), 8)


def test_missing_models_are_reported_in_one_sentence(
    run_command: Callable[..., Result], run: Path, tmp_path: Path
) -> None:
    newest = run / "checkpoints" / "round-000003.h5"
    flip_bit(newest, newest.stat().st_size - 9)
    assert probe.view_models(load_run(run)).round == 2, "the one before"
    run_command("report", run, "--out", "none", "--models", "false")
    text = (tmp_path / "none" / "report.html").read_text()
    assert "<h2>Models</h2>" not in text and "shared test" not in text
    shutil.rmtree(run / "checkpoints")
    run_command("report", run, "--out", "gone")
    text = (tmp_path / "gone" / "report.html").read_text()
    assert text.count("The models were not evaluated: the run has no good checkpoint.") == 1
    assert (tmp_path / "gone" / "figures" / "gates_class.png").exists()


def test_report_under_mpirun_is_written_by_rank_0_alone(run: Path, tmp_path: Path) -> None:
    run_to_end(2, "report", "run", "--out", "page", cwd=tmp_path, timeout=60)
    text = (tmp_path / "page" / "report.html").read_text()
    assert text.count("report runs on one rank") == 1


def test_untrained_run_has_no_model_section(
    run_command: Callable[..., Result], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    run_command(*small_run, "--join.share", "0.9", "--join.round", "2", "--run.dir", "run")
    run_command("report", "run", "--out", "page")
    assert "no client with test samples has trained yet" in (tmp_path / "page" / "report.html").read_text()


# Rows and output for other tools


def test_flat_rows_have_the_same_columns(trained: Path, run: Path) -> None:
    changed = read_metrics(run)
    changed[-1]["drift"] = {"forgetting": 0.25, "recovery": None}
    changed[0]["seconds_ranks"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    drifted, calm = load_run(run).rows, load_run(trained).rows
    assert len({tuple(row) for row in drifted}) == len({tuple(row) for row in calm}) == 1
    assert set(drifted[0]) == set(calm[0])
    assert "drift" not in calm[0] and "seconds_ranks" not in drifted[0]
    assert [row["drift.forgetting"] for row in drifted] == [None, None, 0.25]


def blocks(text: str) -> Iterator[str]:
    """Return the indented blocks of a README."""
    yield from re.findall(r"(?:^    .*\n)+", text, re.M)


def test_readme_notebook_code_runs(trained: Path) -> None:
    pandas = pytest.importorskip("pandas")
    readme = (ROOT / "pfedmoe_mpi" / "report" / "README.md").read_text(encoding="utf-8")
    code = next(block for block in blocks(readme) if "load_run(" in block)
    code = re.sub(r'load_run\(".*?"\)', f"load_run({str(trained)!r})", code)
    frames = []
    scope = {"keep": frames.append}
    lines = [line.partition("#")[0].strip() for line in code.splitlines()]
    exec("\n".join(f"keep({line})" if line.startswith("pandas.") else line for line in lines), scope)
    by_round, by_client = frames
    assert list(by_round["accuracy.mean"].dropna()) == [
        row["accuracy"]["mean"] for row in read_metrics(trained) if row["accuracy"]["mean"] is not None
    ]
    assert len(by_client) == 12 and {"seconds.train", "bytes.up"} <= set(by_round.columns)
    last = by_client[by_client["round"] == 3]
    assert last.groupby("architecture")["alpha"].mean().between(0, 1).all()
    assert isinstance(by_round, pandas.DataFrame)
