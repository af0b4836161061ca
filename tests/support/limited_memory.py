"""What readers say of untrusted files with little memory: `python -m support.limited_memory SOURCE PATH ...`.

SOURCE is `checkpoint`, `hdf5` or `npz`. The answer is one line of JSON, {path: message}; a file that is read
has the message "". Anything but a UserError ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.commands.inspect import digest
from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.sources.open import open_dataset
from pfedmoe_mpi.errors import UserError
from support.paths import with_support

SPARE_BYTES = 300 << 20  # bytes of address space beyond what the imports took
SECONDS = 5.0  # for one file


def read_messages(source: str, paths: list[Path], timeout: float = 120) -> dict[Path, str]:
    """Return {path: message} about files, read by a process with limited memory."""
    command = [sys.executable, "-m", "support.limited_memory", source, *map(str, paths)]
    job = subprocess.run(
        command, env=with_support(os.environ), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert job.returncode == 0, job.stdout + job.stderr
    return {Path(path): message for path, message in json.loads(job.stdout.splitlines()[-1]).items()}


def read_message(source: str, path: str) -> str:
    try:
        if source == "checkpoint":
            checkpoint.verify(Path(path))
            with Checkpoint(Path(path)) as loaded:
                digest(loaded)
                [loaded.partition(split) for split in ("train", "validation", "test")]
        else:
            with open_dataset(Data(source=source, path=path), 0, clients=2) as data:
                data.rows([0, len(data) - 1])
    except UserError as error:
        return str(error)
    return ""


def main(source: str, *paths: str) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    messages = {}
    for path in paths:
        started = time.monotonic()
        try:
            messages[path] = read_message(source, path)
        except BaseException:
            print(f"at {path}", file=sys.stderr)
            raise
        assert time.monotonic() < started + SECONDS, f"{path} took {time.monotonic() - started:.1f} s"
    print(json.dumps(messages))


if __name__ == "__main__":
    main(*sys.argv[1:])
