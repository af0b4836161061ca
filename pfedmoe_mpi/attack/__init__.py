"""Attacks on a run's checkpoints, which measure what a contribution and a model give away."""
