"""The checks that every method must pass, also one of the user's own: `conformance ./mine.py`."""
