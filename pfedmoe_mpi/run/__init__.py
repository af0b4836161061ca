"""A training run.

`job` trains it and returns the exit code, `restart` chooses the checkpoint and decides which settings may
change, `folder` holds its files, and `reporter`, `console` and `curves` report its progress. `privacy_lines`
are those of the console on differential privacy.
"""
