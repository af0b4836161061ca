"""Personalised federated learning with mixtures of experts under MPI."""

from pfedmoe_mpi.report.load import load_run

__version__ = "0.1.0"
__all__ = ["load_run"]
