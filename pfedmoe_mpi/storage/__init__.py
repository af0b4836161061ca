"""Durable writes, locks, and checks for untrusted HDF5 and JSON files."""
