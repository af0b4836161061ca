"""Durable writes, locks, and checks for untrusted HDF5 files."""
