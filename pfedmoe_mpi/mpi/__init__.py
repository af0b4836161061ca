"""The only package that imports mpi4py.

`comm` exchanges data and handles signals: SIGUSR1, SIGTERM and Ctrl-C request a stop. `federation.loop` then
writes a checkpoint, and `run.job` returns exit code 75. `launch` starts MPI, `session` a command under it and
returns its exit code. `device` chooses the GPU and the threads.
"""
