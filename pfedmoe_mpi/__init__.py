"""Personalised federated learning with mixtures of experts under MPI."""

__version__ = "0.1.0"
