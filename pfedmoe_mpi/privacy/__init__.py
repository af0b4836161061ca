"""Privacy of what leaves a client: masked sums and differential privacy with an accountant.

Nothing here knows of MPI, checkpoints or the command line. `cryptography` and `dp-accounting` (extra
`privacy`) are imported where they are used.
"""
