"""The program's logger. What people see is printed; log files come with the run folder."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("pfedmoe_mpi")
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False
