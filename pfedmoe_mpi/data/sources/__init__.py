"""The data sources, one file per format; `open` lists them and says how to add one."""
