"""Architectures: an extractor to a representation of length d, a linear head, and the gate between experts.

`names` knows every architecture by name without importing torch; `registry` builds and tries them.
"""
