"""The command `bench`: the speed of this machine, as ratios of two times measured side by side."""
