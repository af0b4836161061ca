"""Many command lines in one process or job, for `launcher.Session`: `python -m support.command_server`."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pfedmoe_mpi.cli import main
from pfedmoe_mpi.environment import launched_size
from pfedmoe_mpi.log import LOGGER

Answer = tuple[int, str, str]


class Captured(io.StringIO):
    """Output of a command line; also written to the process's stderr, where it outlives the process."""

    def write(self, text: str) -> int:
        sys.__stderr__.write(text)  # type: ignore[union-attr]  # a process of the tests has one
        return super().write(text)


def serve(answers: TextIO) -> None:
    """Read a JSON list [folder, arguments ...] per line and answer with [code, out, err]."""
    for line in sys.stdin:
        _send(run(line), answers)


def serve_job(answers: TextIO) -> None:
    """Do the same on every rank of a job; rank 0 reads the lines, and answers with the output of all."""
    from pfedmoe_mpi.mpi import launch

    world = launch.start()
    world.timeout = math.inf  # `Session` limits the time of each line
    try:
        for line in _lines_of_rank_0():
            codes, outs, errors = zip(*world.gather(run(line), "the answer"), strict=True)
            if world.rank == 0:
                _send((max(codes), "".join(outs), "".join(errors)), answers)
    except BaseException as error:
        world.fault(error)  # the other ranks wait for this one


def _lines_of_rank_0() -> Iterator[str]:
    """Yield on every rank the lines that rank 0 reads.

    The others look for one 20 times a second, so that a waiting job takes next to nothing from the tests.
    """
    from mpi4py import MPI

    channel = MPI.COMM_WORLD.Dup()
    while True:
        if channel.rank == 0:
            line = sys.stdin.readline()
            for other in range(1, channel.size):
                channel.send(line, other)
        else:
            while not channel.Iprobe():
                time.sleep(0.05)
            line = channel.recv()
        if not line:
            return
        yield line


def run(line: str) -> Answer:
    """Run a command line in its folder."""
    cwd, *arguments = json.loads(line)
    out, err = Captured(), Captured()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    for handler in [found for found in LOGGER.handlers if isinstance(found, logging.FileHandler)]:
        LOGGER.removeHandler(handler)  # of a run folder that the next command line does not know
        handler.close()
    return code, out.getvalue(), err.getvalue()


def _send(answer: Answer, answers: TextIO) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)  # a folder that stays
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else a library prints is not an answer
    (serve_job if launched_size(os.environ) > 1 else serve)(stdout)
