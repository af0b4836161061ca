"""The methods, one file each, named like the method. `base` is their contract."""
