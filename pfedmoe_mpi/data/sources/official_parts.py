"""The names of official parts, and what is not read of them: the same for folders, files and columns."""

from __future__ import annotations

import re

_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


def role(word: str) -> str:
    """Return train, test or validation for a word that stands for this part, or nothing."""
    return _WORDS.get(word.strip().lower(), "")


def role_of_file(stem: str) -> str:
    """Return the part that a file's name names, as `train-00000-of-00002` or `mnist_test`, or nothing."""
    roles = {found for word in re.split(r"[^A-Za-z]+", stem) if (found := role(word))}
    return roles.pop() if len(roles) == 1 else ""


def unread_validation(what: str, *, tested: bool) -> str:
    """Return why a validation part is left out, and how to use it."""
    use = (
        "validation rows come from training rows (partition.validation)"
        if tested
        else "to use it as the official test part, name it test"
    )
    return f"{what}: {use}"
