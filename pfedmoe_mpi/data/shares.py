"""The shares of each class that clients draw, and the rows that follow from them."""

from __future__ import annotations

import numpy as np

from pfedmoe_mpi.config.partition_settings import PartitionSettings


def draw_shares(
    settings: PartitionSettings, sizes: np.ndarray, clients: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw each client's share (classes, N) of each class, not yet normalised.

    A class whose shares are all zero goes to no client.

    Args:
        sizes: the rows of each class, (classes,).
    """
    classes = len(sizes)
    if settings.kind == "dirichlet":
        shares = generator.dirichlet(np.full(classes, settings.alpha), clients).T
        shares[shares.sum(axis=1) == 0] = 1.0  # at small alpha all shares may underflow: then share equally
        return shares
    if settings.kind in {"dirichlet_class", "quantity"}:
        shares = generator.dirichlet(np.full(clients, settings.alpha), classes)
        return _leave_out_full(shares, sizes) if settings.balance else shares
    if settings.kind == "pathological":
        numbers = np.full(clients, settings.classes)
    else:
        numbers = generator.integers(settings.classes_min, settings.classes, clients, endpoint=True)
    has_class = _draw_classes(numbers, classes, generator)
    return has_class * generator.uniform(0.4, 0.6, (classes, clients))


def _leave_out_full(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return `shares` (classes, N) without those of clients that are full when the class's turn comes.

    A client is full once the classes before gave it an equal share of all rows, n / N.
    """
    shares = shares.copy()
    held = np.zeros(shares.shape[1])
    for share, size in zip(shares, sizes, strict=True):
        free = (held < sizes.sum() / len(held)) | (held == held.min())
        share *= free
        if not share.any():  # at small alpha the shares of all others may be 0
            share[:] = free
        share /= share.sum()
        held += share * size
    return shares


def _draw_classes(numbers: np.ndarray, classes: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the classes of every client, (classes, N) bool.

    Client k has numbers[k] classes, and all classes have the same number of clients (or one more). Clients
    choose in random order, each the classes with the most free places, with ties drawn. This order
    guarantees that the last client still has enough classes to choose from (Gale-Ryser).
    """
    clients, total = len(numbers), int(numbers.sum())
    places = np.full(classes, total // classes)
    places[generator.permutation(classes)[: total % classes]] += 1
    has_class = np.zeros((classes, clients), bool)
    for client in generator.permutation(clients):
        chosen = np.lexsort((generator.random(classes), -places))[: numbers[client]]
        has_class[chosen, client] = True
        places[chosen] -= 1
    assert not places.any(), "places left over"
    return has_class


def apportion(sizes: np.ndarray, shares: np.ndarray, whole: bool) -> np.ndarray:
    """Return each client's number of rows (classes, N) of each class, in proportion to `shares`.

    A class's numbers sum to its size. With `whole`, every client with a share gets at least one row if the
    class has enough rows.
    """
    holders = shares > 0
    enough = whole & (sizes >= holders.sum(axis=1))
    first = holders & enough[:, None]
    rest = sizes - first.sum(axis=1)
    edges = np.cumsum(shares, axis=1)
    total = edges[:, -1:]
    edges = np.divide(edges, total, out=np.zeros_like(edges), where=total > 0)
    cuts = np.rint(edges * rest[:, None]).astype(np.int64)
    return first + np.diff(cuts, axis=1, prepend=0)
