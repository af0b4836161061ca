"""Keys that two members agree on over a public channel, and messages sealed with them.

X25519 (RFC 7748) gives the two a common number, HKDF with SHA-256 (RFC 5869) makes a key of it for one
purpose, and ChaCha20-Poly1305 (RFC 8439) seals messages.
"""

from __future__ import annotations

from importlib.util import find_spec

from pfedmoe_mpi.errors import ConfigError

KEY = 32  # bytes of every key
TAG = 16  # bytes that sealing adds


def check_installed(user: str = "privacy.masked = true") -> None:
    """Raise ConfigError if the package cryptography is missing, which `user` needs."""
    if not find_spec("cryptography"):
        raise ConfigError(
            f"{user} needs the package cryptography, which is not installed",
            "pip install 'pfedmoe_mpi[privacy]'",
        )


def public(private: bytes) -> bytes:
    """Return the public key, 32 bytes, of a private one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, other: bytes, purpose: str) -> bytes:
    """Return the key, 32 bytes, that the owner of `private` and that of the public key `other` share."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    common = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))
    return HKDF(SHA256(), KEY, salt=None, info=purpose.encode()).derive(common)


def seal(key: bytes, sender: int, text: bytes) -> bytes:
    """Return the text, encrypted and TAG bytes longer; a key seals one message of each sender."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(sender.to_bytes(12, "little"), text, None)


def unseal(key: bytes, sender: int, sealed: bytes) -> bytes:
    """Return the text of a sealed message.

    Raises:
        cryptography.exceptions.InvalidTag: the sender did not seal this message with this key.
    """
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).decrypt(sender.to_bytes(12, "little"), sealed, None)
