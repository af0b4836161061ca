"""Architectures: an extractor to a representation of length d, a linear head, and the gate between experts.

`names` lists the architectures without importing torch; `registry` builds and checks them.
"""
