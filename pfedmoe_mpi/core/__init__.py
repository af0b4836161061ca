"""Flat vectors, integer sums, random addresses, batches, SGD and a client's turn; no MPI and no files."""
