"""Data from a function of the user's own: what it may return, the refusals, and a run on several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pfedmoe_mpi import config
from pfedmoe_mpi.data import Dataset, open_dataset
from pfedmoe_mpi.errors import UserError
from support.launcher import Session, checkpoint_digest, error_message, run_to_end

HEAD = (
    "import numpy as np\nimport torch\n"
    "x = np.arange(96, dtype=np.float32).reshape(12, 8)\ny = np.arange(12) % 3\n"
)
CASES = {
    "arrays": "return x, y",
    "tensors": "return torch.from_numpy(x), torch.from_numpy(y)",
    "names": "return x, np.array(['a', 'b', 'c'])[y]",
    "clients": "return x, y, np.repeat([10, 7], 6)",
    "dataset": "return torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))",
    "three tensors": "return torch.utils.data.TensorDataset("
    "torch.from_numpy(x), torch.from_numpy(y), torch.arange(12) // 6)",
    "list": "return [(x[k], int(y[k]), 'north' if k < 6 else 'south') for k in range(12)]",
    "random": "return np.random.rand(12, 8), np.random.permutation(y)",
}
REFUSED = {
    "return x": r"load in .*mydata\.py returned a ndarray that is not data",
    "return x, y[:5]": r"returned columns of \[5, 12\] rows",
    "return x.astype(int), y": r"x of load in .* is int64",
    "return x * np.nan, y": "NaN",
    "return x, np.stack([y, y], 1)": "returned a tuple that is not data",
    "return x[:, :, None, None, None], y": r"has shape \(12, 8, 1, 1, 1\)",
    "raise OSError('no disk')": r"mydata\.py:8: OSError: no disk",
    "return []": "returned a list that is not data",
}


def opened(folder: Path, body: str, argument: str = "", **settings: str) -> Dataset:
    """Write a file with a function `load` and open what it returns."""
    path = folder / "mydata.py"
    path.write_text(f"{HEAD}\n\ndef load({argument}):\n    {body}\n")
    chosen = config.build({"data.source": f"{path}:load", **settings})
    return open_dataset(chosen.data, 0, clients=2)


@pytest.mark.parametrize("case", CASES)
def test_what_a_function_may_return(tmp_path: Path, case: str) -> None:
    data = opened(tmp_path, CASES[case])
    assert (data.shape, data.classes, len(data.labels)) == ((8,), 3, 12)
    if case != "random":
        assert data.labels.tolist() == [0, 1, 2] * 4
    assert data.class_names == (("a", "b", "c") if case == "names" else ("0", "1", "2"))
    if case == "clients":
        assert data.client is not None and data.client.tolist() == [1] * 6 + [0] * 6
        assert data.client_names == ("7", "10") and data.proposals["clients"] == 2
    if case == "three tensors":
        assert data.client is not None and data.client.tolist() == [0] * 6 + [1] * 6
    if case == "list":
        assert data.client_names == ("north", "south")
    again = opened(tmp_path, CASES[case])
    rows = np.arange(12)
    assert np.array_equal(data.rows(rows), again.rows(rows)), "every rank must get the same rows"


def test_function_gets_the_path(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("3")
    data = opened(
        tmp_path,
        "return x[: 3 * int(open(path).read())], y[:9]",
        "path",
        **{"data.path": str(tmp_path / "x.txt")},
    )
    assert len(data.labels) == 9


@pytest.mark.parametrize("body", REFUSED)
def test_refusals(tmp_path: Path, body: str) -> None:
    with pytest.raises(UserError, match=REFUSED[body]) as caught:
        opened(tmp_path, body)
    assert caught.value.remedy


def test_run_on_one_and_three_ranks_and_restart(tmp_path: Path, session: Session) -> None:
    (tmp_path / "mydata.py").write_text(
        "import numpy as np\n\n\ndef load():\n    y = np.arange(120) % 3\n"
        "    return np.random.rand(120, 6) + y[:, None], y, np.repeat(['a', 'b', 'c', 'd'], 30)\n"
    )
    flags = ("--data.source", "./mydata.py:load", "--model.pool", "mlp5", "--rounds", "2")
    for ranks in (1, 3):
        run_to_end(ranks, *flags, "--run.dir", f"run{ranks}", cwd=tmp_path, own_job=True)
    assert checkpoint_digest(tmp_path / "run1", 2) == checkpoint_digest(tmp_path / "run3", 2)
    assert (tmp_path / "run1" / "code" / "mydata.py").is_file()
    assert session("restart", "run1", "--rounds", "3", cwd=tmp_path).code == 0
    text = (tmp_path / "mydata.py").read_text()
    (tmp_path / "mydata.py").write_text(text.replace("120, 6", "120, 5"))
    error_message(
        session("restart", "run1", "--rounds", "4", cwd=tmp_path), "120, 5|changed since the checkpoint"
    )
    error_message(
        session("--data.source", "nonsense", cwd=tmp_path), "a function of your own as FILE.py:NAME"
    )
