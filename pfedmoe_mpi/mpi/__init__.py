"""The only package that imports mpi4py: communicator, session and device."""
