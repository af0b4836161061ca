"""A federation, its round loop, its sums, its measurements and its checkpoints in time."""
