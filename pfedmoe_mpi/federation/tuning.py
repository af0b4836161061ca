"""Few-shot tuning of clients that never train: what they could have after some epochs on a few samples.

Only values bound to this rank's modules change, which the next client replaces: neither the client's vector
nor the server's, so the federation is the same with and without it. Every draw has the address of the client,
and a client is tuned alike after every round.

Shots are samples per class, the meaning of "K-shot" in few-shot learning (Finn et al., ICML 2017, arXiv
1703.03400, section 5.2). A method with private modules tunes these and keeps what it shares, as a new client
would; any other one fine-tunes a copy of all its modules, the usual baseline of personalised federated
learning (FedAvg(Meta) of Chen et al., arXiv 1802.07876). `Algorithm.tune` may do it
in another way.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pfedmoe_mpi.core import seeds
from pfedmoe_mpi.core.batches import Split
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.parts import Module, Parts
from pfedmoe_mpi.core.sgd import Phase
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.federation.federation import Federation

ROLE = "client"


def tune(federation: Federation, client: Client, parts: Parts) -> bool:
    """Let the method tune a client's bound parts in place for `unseen.tune` epochs at the full learning rate.

    Return False if the loss or a gradient was not finite.

    Raises:
        StoppedError: a stop was asked for.
    """
    method, settings = federation.method, federation.config
    train = shots(client.splits["train"], settings.unseen.shots, settings.seed, client.id)
    sampled = Client(client.id, client.spec, client.vector, {**client.splits, "train": train})
    before_training = 0  # a round whose rate no schedule lowers
    engine = replace(federation.engine, samples=None)  # what is measured of a client leaves with no noise
    turn = Turn(engine, method.loss, sampled, parts, before_training, ROLE)
    try:
        method.tune(turn, phase(federation, client))
    except NotFiniteError:
        return False
    return True


def phase(federation: Federation, client: Client) -> Phase:
    """Return the phase that tunes a client: its private modules, or all modules if it has none.

    The learning rates are those of the method's own phases; modules that these leave out stay as they are.
    """
    method = federation.method
    phases = method.phases(ROLE)
    rates = {name: rate for phase in phases for name, rate in phase.lr.items()}
    plain = frozenset().union(*(phase.plain for phase in phases))
    private = [name for name, part in client.spec.items() if isinstance(part, Module)]
    names = private or [name for name, part in method.state().items() if isinstance(part, Module)]
    lr = {name: rates[name] for name in names if name in rates}
    return method.phase(lr, epochs=federation.config.unseen.tune, plain=plain & lr.keys())


def shots(split: Split, number: int, seed: int, client: int) -> Split:
    """Return `number` samples of every class, fewer where a class has fewer; two samples at least."""
    labels = split.y.cpu().numpy()
    order = seeds.numpy_generator(seed, "shots", 0, client).permutation(len(labels))
    place = np.empty(len(labels), np.int64)  # among the samples of the class, in the drawn order
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        place[of_class] = np.arange(len(of_class))
    chosen = np.flatnonzero(place < number)
    if len(chosen) < 2:  # one sample has no variance for batch normalisation
        chosen = np.sort(order[:2])
    return split.rows(torch.from_numpy(chosen))
