"""The data sources, one file per format."""
