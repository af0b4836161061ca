"""One file per small command."""
