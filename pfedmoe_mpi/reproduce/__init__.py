"""The command `reproduce`: the runs of a table, each in its own folder."""
