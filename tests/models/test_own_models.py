"""Models and gates of the user's own: what the contract accepts, and what each refusal says."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from pfedmoe_mpi import user_code
from pfedmoe_mpi.core.parts import Module, Workbench
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names, registry, user_model
from pfedmoe_mpi.models.gate import build_gate

HEAD = "import random\nimport numpy\nimport torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
SHAPE, DIM = (1, 8, 8), 6

# Class bodies after `super().__init__()`, forward, and what the refusal contains; None: accepted.
BODIES = {
    "plain": ("self.f = nn.Linear(64, dim)", "return self.f(x.flatten(1))", None),
    "computes": (
        "self.f = nn.Linear(64, dim)\n        self.rates = torch.linspace(0, 1, 3).tolist()\n"
        "        self.register_buffer('ones', torch.ones(64) * float(torch.ones(2).sum()))",
        "return self.f(x.flatten(1) * self.ones)",
        None,
    ),
    "norm": (
        "self.f = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, dim))",
        "return self.f(x)",
        None,
    ),
    "tied": (
        "self.a = nn.Linear(64, 64)\n        self.b = nn.Linear(64, 64)\n"
        "        self.b.weight = self.a.weight\n        self.f = nn.Linear(64, dim)",
        "return self.f(self.b(self.a(x.flatten(1))))",
        None,
    ),
    "wrong width": (
        "self.f = nn.Linear(64, dim + 1)",
        "return self.f(x.flatten(1))",
        r"\(2, 7\), expected \(2, 6\)",
    ),
    "not a tensor": (
        "self.f = nn.Linear(64, dim)",
        "return (self.f(x.flatten(1)), 0)",
        "to a tuple, expected",
    ),
    "lazy": (
        "self.f = nn.LazyLinear(dim)",
        "return self.f(x.flatten(1))",
        "f.weight only in its first forward",
    ),
    "later": (
        "self.f = None",
        "self.f = self.f or nn.Linear(64, 6)\n        return self.f(x.flatten(1))",
        "creates tensors in its forward pass",
    ),
    "shared": (
        "self.f = COMMON",
        "return self.f(x.flatten(1))",
        "shares f.weight between the modules of two calls",
    ),
    "counter": (
        "self.f = nn.Linear(64, dim)\n        self.register_buffer('steps', torch.zeros(1).long())",
        "self.steps += 1\n        return self.f(x.flatten(1))",
        "changes its buffer steps in training, which is integers",
    ),
    "forgotten": (
        "self.f = nn.Linear(64, dim)\n        self.register_buffer('mean', torch.zeros(1), persistent=False)",
        "self.mean += 1\n        return self.f(x.flatten(1))",
        "changes its buffer mean in training, which is not persistent",
    ),
    "double": (
        "self.f = nn.Linear(64, dim).double()",
        "return self.f(x.flatten(1).double())",
        "f.weight of type float64",
    ),
    "draws": (
        "self.f = nn.Linear(64, dim)\n        nn.init.constant_(self.f.bias, random.random())\n"
        "        self.f.weight.data += torch.from_numpy(numpy.random.randn(dim, 64)).float()",
        "return self.f(x.flatten(1)) * (1 + self.training * random.random())",
        None,
    ),
    "draws from the system": (
        "self.f = nn.Linear(64, dim)\n        self.f.bias.data += random.SystemRandom().random()",
        "return self.f(x.flatten(1))",
        r"begins with other values of f\.bias in every process",
    ),
    "own generator": (
        "self.f = nn.Linear(64, dim)\n        self.rng = numpy.random.default_rng(0)",
        "return self.f(x.flatten(1)) * (float(self.rng.random()) if self.training else 1)",
        "depends on more than its parameters and buffers",
    ),
    "hidden": (
        "self.f = nn.Linear(64, 8)\n        self.list = [nn.Linear(8, dim)]",
        "return self.list[0](self.f(x.flatten(1)))",
        "depends on more than its parameters and buffers",
    ),
    "replaces": (
        "self.f = nn.Linear(64, dim)\n        self.register_buffer('mean', torch.zeros(1))",
        "self.mean = self.mean + 1\n        return self.f(x.flatten(1))",
        r"replaces its tensor mean in training(.|\n)*self\.mean\.copy_",
    ),
    "in place": (
        "self.f = nn.Linear(64, dim)",
        "return self.f(x.sub_(1).flatten(1))",
        "changes the samples in its forward pass",
    ),
    "half": (
        "self.f = nn.Linear(64, dim)",
        "return self.f(x.flatten(1)).half()",
        "returns numbers of type float16",
    ),
    "evaluates": (
        "self.f = nn.Linear(64, dim)",
        "y = self.f(x.flatten(1))\n        return y if self.training else (y, y)",
        "to a tuple in evaluation, expected",
    ),
    "one sample": (
        "self.f = nn.Linear(64, dim)",
        "return self.f(x.flatten(1)).squeeze()",
        r"\(1, 1, 8, 8\) to shape \(6,\) in evaluation, expected \(1, 6\)",
    ),
    "scripted": (
        "self.f = torch.jit.script(nn.Linear(64, dim))",
        "return self.f(x.flatten(1))",
        "is compiled",
    ),
    "threads": (
        "torch.set_num_threads(7)\n        self.f = nn.Linear(64, dim)",
        "return self.f(x.flatten(1))",
        r"calls torch\.set_num_threads\(7\)",
    ),
    "default type": (
        "torch.set_default_dtype(torch.float64)\n        self.f = nn.Linear(64, dim)",
        "return self.f(x.flatten(1))",
        r"calls torch\.set_default_dtype\(torch\.float64\)",
    ),
    "exits": (
        "self.f = nn.Linear(64, dim)",
        "raise SystemExit(3)",
        r"nets\.py:\d+: SystemExit: 3",
    ),
    "raises": (
        "self.f = nn.Linear(64, dim)\n        raise KeyError('a')",
        "return x",
        r"nets.py:13: KeyError: 'a'",
    ),
    "raises later": (
        "self.f = nn.Linear(64, dim)",
        "return self.g(x)",
        r"nets.py:14: AttributeError: .* 'g'",
    ),
}


def write(folder: Path, body: str, forward: str) -> str:
    """Write a file with one class and return the reference to it."""
    path = folder / "nets.py"
    path.write_text(
        f"{HEAD}COMMON = nn.Linear(64, 6)\n\n\nclass Net(nn.Module):\n    def __init__(self, shape, dim):\n"
        f"        super().__init__()\n        {body}\n    def forward(self, x):\n        {forward}\n"
    )
    return f"{path}:Net"


@pytest.mark.parametrize("kind", BODIES)
def test_contract(tmp_path: Path, kind: str) -> None:
    body, forward, refusal = BODIES[kind]
    reference = write(tmp_path, body, forward)
    state, threads = (torch.get_rng_state(), random.getstate()), torch.get_num_threads()
    if refusal is None:
        registry.check_model(reference, SHAPE, 3, DIM, "small")
    else:
        with pytest.raises(ConfigError, match=refusal) as caught:
            registry.check_model(reference, SHAPE, 3, DIM, "small")
        assert caught.value.remedy
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, torch.float32)


@pytest.mark.parametrize("kind", [kind for kind, (_, _, refusal) in BODIES.items() if refusal is None])
def test_vector_of_an_own_model(tmp_path: Path, kind: str) -> None:
    reference = write(tmp_path, *BODIES[kind][:2])
    part = Module("model", lambda: registry.build_model(reference, SHAPE, 3, DIM, "small"), weightless=False)
    bench = Workbench(0, torch.device("cpu"))
    layout, vector = bench.layout({"model": part}), bench.initial({"model": part}, 1)
    for _ in range(3):  # the second time on, a kept module may be drawn again
        assert torch.equal(vector, bench.initial({"model": part}, 1))
    assert torch.equal(vector, Workbench(0, torch.device("cpu")).initial({"model": part}, 1))
    assert vector.shape == (layout.size,) and len({e.name for e in layout.entries}) == len(layout.entries)
    parts = bench.parts(({"model": part}, vector))
    parts.check()
    with torch.no_grad():
        parts.train([])
        before = parts.model(torch.ones(2, *SHAPE))
        bench.parts(({"model": part}, vector * 2))
        assert not torch.equal(parts.model(torch.ones(2, *SHAPE)), before)
    parts.check()


def test_parameters_that_need_no_gradient_are_not_trained(tmp_path: Path) -> None:
    body = "self.a = nn.Linear(64, 64).requires_grad_(False)\n        self.f = nn.Linear(64, dim)"
    reference = write(tmp_path, body, "return self.f(self.a(x.flatten(1)))")
    part = Module("model", lambda: registry.build_extractor(reference, SHAPE, DIM, "small"), weightless=False)
    bench = Workbench(0, torch.device("cpu"))
    parts = bench.parts(({"model": part}, bench.initial({"model": part})))
    parts.train(["model"])
    assert [p.requires_grad for p in parts.model.parameters()] == [False, False, True, True]
    parts.train([])
    assert not any(p.requires_grad for p in parts.model.parameters()) and not parts.model.training


def test_functions_texts_and_things_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(
        f"{HEAD}def build(shape, dim):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, dim))\n"
        "def text(shape, dim, vocabulary):\n    return nn.EmbeddingBag(vocabulary, dim)\n"
        "number = 3\ndef nothing(shape, dim): pass\ndef named(*, shape, dim): pass\n"
    )
    user_model.check(f"{path}:build", SHAPE, DIM)
    user_model.check(f"{path}:text", (5,), DIM, vocabulary=7)
    with pytest.raises(ConfigError, match=r"build in .* takes numbers, but the samples are texts"):
        user_model.check(f"{path}:build", (64,), DIM, vocabulary=7)
    with pytest.raises(ConfigError, match=r"number in .* is not a class or a function"):
        user_model.check(f"{path}:number", SHAPE, DIM)
    with pytest.raises(ConfigError, match=r"cannot be called with \(shape, dim\): too many positional"):
        user_model.check(f"{path}:named", SHAPE, DIM)
    with pytest.raises(ConfigError, match="returns NoneType, not a torch module"):
        user_model.check(f"{path}:nothing", SHAPE, DIM)


def test_own_gate(tmp_path: Path) -> None:
    reference = write(tmp_path, "self.f = nn.Linear(64, dim)", "return self.f(x.flatten(1))")
    x = torch.randn(4, *SHAPE)
    for routing, temperature in (("soft", 1.0), ("soft", 0.5), ("top1", 1.0)):
        gate = build_gate(SHAPE, 5, 3, module=reference, routing=routing, temperature=temperature, hidden=9)
        weights, logits = gate(x), gate.module(x)  # type: ignore[operator]
        expected = torch.softmax(logits / temperature, 1)
        if routing == "top1":
            expected = torch.nn.functional.one_hot(logits.argmax(1), 3).float()
        assert torch.equal(weights, expected)
    assert build_gate((1, 16, 16), 5, 3, module=reference, input="pooled")(
        torch.randn(2, 1, 16, 16)
    ).shape == (2, 3)


def test_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def Net(): pass\ndef resnet18(): pass\ndef Other(): pass\n")
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    pool = [f"{a}:Net", f"{b}:Net", f"{a}:Other", f"{a}:resnet18", "cnn1", f"{a}:Net"]
    assert names.labels(pool) == ("a.Net", "b.Net", "Other", "a.resnet18", "cnn1", "a.Net")
    assert names.resolve_name(f"{a}:Net") == f"{a}:Net" and names.resolve_dim([f"{a}:Net", "mnist1"], 0) == 50
    for text, problem in (
        (f"{a}:Missing", "does not define Missing"),
        (str(a), "does not name a class or function"),
        (f"{tmp_path}/c.py:Net", "there is no file"),
        ("no_such_module:Net", "there is no module no_such_module"),
        (f"{a}:Not a name", "is not a reference"),
    ):
        with pytest.raises(ConfigError, match=problem):
            names.resolve_name(text)


def test_sources_are_the_file_and_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import torch\nfrom layers import A\nfrom parts.deep import B\n")
    (tmp_path / "layers.py").write_text("import nets\nA = 1\n")  # a circle
    (tmp_path / "unused.py").write_text("")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "deep.py").write_text("from . import near\nB = 1\n")
    (tmp_path / "parts" / "near.py").write_text("")
    recorded = user_code.sources([f"{tmp_path}/nets.py:A"])
    assert list(recorded) == ["layers.py", "nets.py", "parts/__init__.py", "parts/deep.py", "parts/near.py"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "nets.py").write_text("")
    with pytest.raises(ConfigError, match=r"two files of your own are called nets\.py"):
        user_code.sources([f"{tmp_path}/nets.py:A", f"{tmp_path}/other/nets.py:A"])
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\na = 'é'\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.py is not text in UTF-8"):
        user_code.sources([f"{tmp_path}/latin.py:a"])
    for name in ("a\x1b.py", "b\udcff.py"):
        (tmp_path / name).write_text("a = 1\n")
        with pytest.raises(ConfigError, match="cannot be printed") as caught:
            user_code.sources([f"{tmp_path}/{name}:a"])
        assert caught.value.problem.isascii() and caught.value.problem.isprintable()
    now = {**recorded, "layers.py": "import nets\nA = 2\n"}
    assert user_code.difference(recorded, recorded) == ""
    assert user_code.difference(recorded, now).splitlines()[-2:] == ["-A = 1", "+A = 2"]
    hostile = user_code.difference({"x.py": "\x1b[2J" + "a" * 10**6}, {})
    assert hostile.isascii() is False and "\x1b" not in hostile and r"-\x1b[2Jaaa" in hostile
    assert max(map(len, hostile.splitlines())) < 300
    assert "more lines" in user_code.difference({}, {"x.py": "a\n" * 100})


def test_a_changed_file_runs_again_only_at_a_start(tmp_path: Path) -> None:
    """A run that builds a model later must not get the text that its user is editing."""
    path = tmp_path / "values.py"
    path.write_text("value = [1]\n")
    first = user_code.load(f"{path}:value")
    path.write_text("value = [2]\n")
    assert user_code.load(f"{path}:value") is first
    user_code.forget_changed([f"{path}:value"])
    assert user_code.load(f"{path}:value") == [2]


def test_modules_beside_a_file_run_as_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else in Python's path has their names, and although the folder changes between two loads."""
    for name in ("elsewhere", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "blocks.py").write_text(f"place = '{name}'\n")
        (tmp_path / name / "nets.py").write_text("from blocks import place\nimport queue, inner.deep\n")
        (tmp_path / name / "queue.py").write_text("raise ValueError\n")
        (tmp_path / name / "inner").mkdir()
        (tmp_path / name / "inner" / "deep.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    for name in ("a", "b", "a"):
        user_code.forget_changed([f"{tmp_path}/{name}/nets.py:place"])
        assert user_code.load(f"{tmp_path}/{name}/nets.py:place") == name
        assert user_code.load(f"{tmp_path}/{name}/nets.py").inner.__path__ == [f"{tmp_path}/{name}/inner"]
    for text in ("one", "two"):  # of one length, within a second
        (tmp_path / "b" / "blocks.py").write_text(f"place = '{text}'\n")
        user_code.forget_changed([f"{tmp_path}/b/nets.py:place"])
        assert user_code.load(f"{tmp_path}/b/nets.py:place") == text
    assert list(user_code.sources([f"{tmp_path}/b/nets.py:place"])) == [
        "blocks.py",
        "inner/deep.py",
        "nets.py",
    ]


def test_a_circular_import_gets_the_same_module(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("from layers import Inner\nclass Outer(Inner): pass\n")
    (tmp_path / "layers.py").write_text("import nets\nclass Inner: pass\ndef outer(): return nets.Outer\n")
    outer = user_code.load(f"{tmp_path}/nets.py:Outer")
    assert outer.__base__.__module__ == "layers"
    assert sys.modules["layers"].outer() is outer


def test_files_of_one_folder_share_the_modules_beside_them(tmp_path: Path) -> None:
    for name in ("nets", "gates"):
        (tmp_path / f"{name}.py").write_text("from common import Base\n")
    (tmp_path / "common.py").write_text("class Base: pass\n")
    assert user_code.load(f"{tmp_path}/nets.py:Base") is user_code.load(f"{tmp_path}/gates.py:Base")
