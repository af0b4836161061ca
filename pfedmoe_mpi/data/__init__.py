"""Data: one `Dataset` from any source, and its partition over clients.

`sources.open_dataset` opens, `partition.make_partition` deals rows to clients, `Dataset.fitted` does what may
learn from training rows alone (missing values, scale, vocabulary), `prepare` writes both as HDF5.
Nothing here knows of MPI or torch; what needs PIL or torchvision imports it where it is used.
"""

from pfedmoe_mpi.data.dataset import Dataset
from pfedmoe_mpi.data.partition import Partition, make_partition
from pfedmoe_mpi.data.sources import open_dataset

__all__ = ["Dataset", "Partition", "make_partition", "open_dataset"]
