"""One file per small command, and a folder for `verify`."""
