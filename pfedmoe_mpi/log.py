"""The program's logger. Output for the user is printed instead; a run folder adds a log file."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("pfedmoe_mpi")
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False
