"""The job scripts do what their comments say: here as Slurm's batch shell would run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launcher

SCRIPT = Path(__file__).parents[1] / "jobs" / "train.slurm"
QUICK = ("--model.pool", "mlp5", "--model.shared", "mlp5", "--clients", "4", "--run.dir", "run")


def batch_shell(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    bin_folder = Path(sys.executable).parent
    path = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "SLURM_NTASKS": "2"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *QUICK, *arguments],
        cwd=tmp_path,
        env=launcher.environment("mpich", path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_train_script_ends_with_the_runs_code(tmp_path: Path) -> None:
    good = launcher.ended(batch_shell(tmp_path, "--rounds", "1"), 120)
    assert good.code == 0 and "exit code 0" in good.out.splitlines()[-1], good.out + good.err
    bad = launcher.ended(batch_shell(tmp_path, "--rounds", "0"), 120)
    assert bad.code == 2 and "rounds" in bad.err, bad.out + bad.err


def test_train_script_passes_the_warning_on_and_waits_for_the_checkpoint(tmp_path: Path) -> None:
    shell = batch_shell(tmp_path, "--rounds", "5000", "--run.checkpoint_every", "5000", "--train.epochs", "5")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and shell.poll() is None, "no start"
            time.sleep(0.05)
        shell.send_signal(signal.SIGUSR1)
        result = launcher.ended(shell, 60)
    finally:
        launcher.end(shell.pid)
    assert result.code == 75 and "exit code 75" in result.out.splitlines()[-1], result.out + result.err
    assert list((tmp_path / "run" / "checkpoints").glob("round-*.h5"))
