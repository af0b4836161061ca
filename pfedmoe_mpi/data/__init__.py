"""Data: one `Dataset` from any source, and its partition over clients.

`sources.open_dataset` opens, `partition.make_partition` assigns rows to clients, `Dataset.fitted`
learns from training rows alone (missing values, scale, vocabulary).
Nothing here knows of MPI or torch; what needs PIL or torchvision imports it where it is used.
"""

from pfedmoe_mpi.data.dataset import Dataset
from pfedmoe_mpi.data.partition import Partition, make_partition
from pfedmoe_mpi.data.sources.open import open_dataset

__all__ = ["Dataset", "Partition", "make_partition", "open_dataset"]
