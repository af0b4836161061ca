"""Many command lines in one process, for `launcher.Session`: `python -m support.command_server`."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys

from pfedmoe_mpi.cli import main
from pfedmoe_mpi.log import LOGGER


def serve() -> None:
    """Read a JSON list [folder, arguments ...] per line and answer with [code, out, err]."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        cwd, *arguments = json.loads(line)
        os.chdir(cwd)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        for handler in [found for found in LOGGER.handlers if isinstance(found, logging.FileHandler)]:
            LOGGER.removeHandler(handler)  # of a run folder that the next command line does not know
            handler.close()
        answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
