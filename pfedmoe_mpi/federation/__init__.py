"""A federation and its rounds.

`build` makes a `Federation` from a configuration, on the `problem` that the data pose; `plan` is what rank 0
decides before round 1. `loop` runs the rounds: the method draws the cohort (`Algorithm.cohort` in
`algorithms/base.py`), `training` trains it, `round_sum` adds up the clients' vectors, `evaluation` measures
clients, `metrics` makes the row, and `saver` writes checkpoints. `faults` simulates failures, and `stream`
data that drift.
"""
