"""Texts of TensorFlow Federated's clients: Shakespeare's by character, Stack Overflow's by word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pfedmoe_mpi.config.sections import Data
from pfedmoe_mpi.data.dataset import MemoryRows, SourceData
from pfedmoe_mpi.data.sources.client_parts import Block, join_blocks
from pfedmoe_mpi.data.sources.hdf5_columns import read_texts
from pfedmoe_mpi.data.sources.hdf5_table import check_chunks, find_table
from pfedmoe_mpi.data.sources.next_word import last_fifth, next_tokens
from pfedmoe_mpi.data.sources.tokens import number_words, split, unspaced
from pfedmoe_mpi.errors import DataError

TEXTS = {"snippets": "char", "tokens": "word"}  # how `data.tokens` = auto divides each


@dataclass(frozen=True)
class TextClient:
    """One client of one file: its texts in their order, each on a line of its own."""

    name: str
    test: bool
    kind: str
    text: str


def read_text(file: Any, key: str, path: Path, layout: str, most: int) -> str:
    """Return the texts at `key`, each on a line of its own.

    Raises:
        DataError: not texts, or more than `most` characters.
    """
    table = find_table(file, key, path, layout)
    if h5py.check_string_dtype(table.dtype) is None or len(table.shape) != 1:
        raise DataError(f"{key} of {path} is {table.dtype} of shape {table.shape}, not texts", layout)
    check_chunks(table, f"{key} of {path}")
    return "\n".join(read_texts(table, f"{key} of {path}", path, most))


def load_texts(
    path: Path, name: str, read: Sequence[TextClient], left_out: Sequence[str], settings: Data
) -> SourceData:
    """Return the windows of all clients; without an official test part the last fifth of each is one.

    Raises:
        DataError: no client has texts that are long enough.
    """
    if settings.tokens == "auto":
        settings = settings.model_copy(update={"tokens": TEXTS[read[0].kind]})
    texts, words = number_words(split(client.text, settings.tokens) for client in read)
    lengths = [max(0, len(text) - settings.length) for text in texts]
    blocks = [Block(c.name, c.test, rows) for c, rows in zip(read, lengths, strict=True)]
    remedy = f"lower --data.length below {settings.length}, or give clients longer texts"
    clients = join_blocks(blocks, str(path), remedy)
    windows = [sliding_window_view(texts[place], settings.length + 1) for place in clients.kept]
    rows, official = next_tokens(windows, words, settings), clients.official_test
    if official is None:
        official = np.concatenate([last_fifth(len(of_client)) for of_client in windows])
    return SourceData(
        name=name,
        where=str(path),
        store=MemoryRows(rows.x),
        labels=rows.labels,
        class_names=rows.class_names,
        client=clients.client,
        client_names=clients.names,
        official_test=official,
        proposals={**clients.proposals, "partition.pool": "official", "model.shared": "lstm3"},
        fit=rows.fit,
        ordered=True,
        left_out=(*left_out, *clients.left_out),
        warnings=unspaced(words, str(path), settings),
    )
