"""Masks: the stream of ChaCha20 (RFC 8439) under a seed, as integers modulo 2^64."""

from __future__ import annotations

import numpy as np

BLOCK = 1 << 16  # bytes made at a time, which stay in the processor's cache


def add_mask(vector: np.ndarray, seed: bytes, negative: bool = False) -> None:
    """Add the seed's mask to a uint64 vector modulo 2^64, in place, or subtract it.

    A seed of 32 bytes makes one mask: its stream begins at counter 0 with nonce 0.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    assert vector.dtype == np.uint64 and vector.ndim == 1
    encryptor = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    zeros, made = memoryview(bytes(BLOCK)), memoryview(bytearray(BLOCK))
    change = np.subtract if negative else np.add
    for start in range(0, len(vector), BLOCK // 8):
        piece = vector[start : start + BLOCK // 8]
        encryptor.update_into(zeros[: piece.nbytes], made)
        change(piece, np.frombuffer(made[: piece.nbytes], "<u8"), out=piece)


def numbers(seed: bytes, *shape: int) -> np.ndarray:
    """Return the seed's stream as uint64 of this shape."""
    drawn = np.zeros(int(np.prod(shape)), np.uint64)
    add_mask(drawn, seed)
    return drawn.reshape(shape)
