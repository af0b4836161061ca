"""Durable writes, locks, and HDF5 files from untrusted hands."""
