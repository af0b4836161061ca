"""The command `reproduce`: the runs of a table, one after the other."""
