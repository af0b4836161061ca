"""A training run: start, restart, run folder, console and curves."""
