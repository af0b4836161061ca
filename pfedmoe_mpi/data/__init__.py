"""Data: one `Dataset` from any source, and its partition over clients.

`open_dataset` opens a source, `make_partition` assigns its rows to clients, and `Dataset.fitted` learns
from training rows alone (missing values, scale, vocabulary).
This package does not use MPI or torch. Only the functions that need PIL or torchvision import them.
"""

from pfedmoe_mpi.data.dataset import Dataset
from pfedmoe_mpi.data.partition import Partition, make_partition
from pfedmoe_mpi.data.sources.open import open_dataset

__all__ = ["Dataset", "Partition", "make_partition", "open_dataset"]
