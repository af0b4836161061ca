"""The methods, one file each: the file's name is the method's name. `base` is their contract."""
