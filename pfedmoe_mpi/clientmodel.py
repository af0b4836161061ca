"""A client of a checkpoint as a torch module that answers raw samples; needs no MPI and no data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi import algorithms, checkpoint, config
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.checkpoint import Checkpoint
from pfedmoe_mpi.data.resize import resize
from pfedmoe_mpi.data.shard import Normalise
from pfedmoe_mpi.errors import CheckpointError, DataError
from pfedmoe_mpi.parts import Module, Workbench

if TYPE_CHECKING:
    from pfedmoe_mpi.setup import Federation

MOST_ABSENT = 5_000  # clients that never train or join late, in an attribute of a checkpoint


def described(federation: Federation) -> str:
    """What a model must know of the samples it was trained on, as JSON for the checkpoint: shape (C, H, W),
    (features,) or (tokens,), classes, dtype, how many tokens there are, mean and std; who never trains or
    joins late, null if these are too many.
    """
    data, task = federation.dataset, federation.task
    absent = [sorted(task.unseen), sorted(task.late)]
    few = sum(map(len, absent)) <= MOST_ABSENT
    facts = {"shape": data.shape, "classes": data.classes, "dtype": data.dtype.name}
    facts["vocabulary"] = data.vocabulary
    return json.dumps({**facts, "mean": data.mean, "std": data.std, "absent": absent if few else None})


class ClientModel(nn.Module):
    """A client's whole model under a method: its private parts and the server's, as submodules by name.

    What of a part is no module (prototypes, for instance) is a buffer. It can be moved, saved and fine-tuned
    as any module; changing it changes no checkpoint.
    """

    def __init__(self, method: Algorithm, client: int, facts: dict[str, Any], unseen: bool) -> None:
        super().__init__()
        self.client = client
        self.shape: tuple[int, ...] = method.task.shape
        self.classes = method.task.classes
        self._method, self._facts, self._unseen = method, facts, unseen

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of raw samples (B, *shape), in the mode the module is in, with gradients."""
        return self._logits([x])

    def predict(self, x: np.ndarray | Tensor) -> Tensor:
        """Logits (n, classes), float32, of n raw samples as they are in the data, not normalised; `argmax(1)`
        is the class. In evaluation mode, without gradients, in the batches of the run's evaluations.

        Of patients these are the columns standardised as the client's were, of texts the tokens of the run's
        vocabulary: what `Dataset.fitted` gives.

        FedJETs chooses a client's experts by all samples of the call: give it the client's samples together.

        Raises:
            DataError: samples of another shape or dtype.
        """
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                whole = self._raw(x)
                return self._logits(list(whole.split(self._method.task.config.eval.batch)) or [whole])
        finally:
            self.train(training)

    def vector(self, name: str) -> Tensor:
        """The numbers of a part in one vector, as methods see it."""
        part = getattr(self, name)
        return nn.utils.parameters_to_vector(part.parameters()) if isinstance(part, nn.Module) else part

    def _logits(self, batches: Sequence[Tensor]) -> Tensor:
        where = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        facts, settings = self._facts, self._method.task.config
        normalise = Normalise(facts["mean"], facts["std"], len(self.shape), where)

        def inputs() -> Iterator[Tensor]:
            return (normalise(batch.to(where)) for batch in batches)

        with torch.autocast(where.type, torch.bfloat16, enabled=settings.train.precision == "bf16"):
            answer: Any = self._method.answer(self, inputs, self._unseen)  # type: ignore[arg-type]
            return torch.cat([answer(x).float() for x in inputs()])

    def _raw(self, x: np.ndarray | Tensor) -> Tensor:
        """Samples of the shape and dtype that the model knows; images resized if the run did so."""
        given = np.asarray(x.cpu() if isinstance(x, Tensor) else x)
        wanted = f"raw samples (n, {', '.join(map(str, self.shape))}) of dtype {self._facts['dtype']}"
        if given.dtype.name != self._facts["dtype"]:
            problem = f"these samples are {given.dtype}, the model was trained on {self._facts['dtype']}"
            raise DataError(problem, f"give {wanted}, as they are in the data")
        images = given.ndim == 4 and len(self.shape) == 3 and given.shape[1] == self.shape[0]
        if images and self._method.task.config.data.size and given.shape[1:] != self.shape:
            given = resize(given, self.shape[-1])
        if given.shape[1:] != self.shape:
            raise DataError(f"these samples have shape {given.shape[1:]}, not {self.shape}", f"give {wanted}")
        return torch.from_numpy(np.ascontiguousarray(given))


def load(path: Path, client: int) -> ClientModel:
    """A client's model from a checkpoint, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: a damaged or older checkpoint, no such client, or one without an answer.
    """
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        if not 0 <= client < loaded.clients:
            raise CheckpointError(f"there is no client {client}", f"clients are 0 to {loaded.clients - 1}")
        facts = _facts(loaded)
        with torch.random.fork_rng(devices=[]):  # building modules draws
            return _built(loaded, client, facts)


def _facts(loaded: Checkpoint) -> dict[str, Any]:
    """What `described` wrote."""
    try:
        facts: dict[str, Any] = json.loads(loaded.identity["samples"])
        numbers = {name: int(facts[name]) for name in ("classes", "vocabulary")}
        return {**facts, **numbers, "shape": tuple(map(int, facts["shape"]))}
    except (KeyError, ValueError, TypeError) as error:
        problem = f"{loaded.path} does not say what its samples are"
        remedy = "`restart` of its run with a higher --rounds writes one that does"
        raise CheckpointError(problem, remedy) from error


def _built(loaded: Checkpoint, client: int, facts: dict[str, Any]) -> ClientModel:
    settings = config.build(config.flatten(loaded.config))
    if facts["absent"] is None:
        problem = f"{loaded.path} does not say which clients never train: there are too many"
        raise CheckpointError(problem, "`evaluate` measures them all")
    never, late = map(frozenset, facts["absent"])
    model = settings.model
    counts = np.zeros((loaded.clients, facts["classes"]), np.int64)  # no method answers by them
    known = (settings, facts["shape"], facts["classes"], counts, model.pool, model.shared, model.dim)
    task = Task(*known, never, late, facts["vocabulary"])
    method = algorithms.load(settings.algorithm)(task)
    unseen = client in task.absent(loaded.round)
    bench = Workbench(settings.seed, torch.device("cpu"))
    state, own = method.state(), method.client_state(client)
    if [bench.layout(state).digest, bench.layout(own).digest] != [
        loaded.state_layout.digest,
        loaded.layout(client).digest,
    ]:
        raise CheckpointError(
            f"the models of {loaded.path} are not those of its configuration", "take another checkpoint"
        )
    parts = bench.parts(
        (state, torch.from_numpy(loaded.state)), (own, torch.from_numpy(loaded.vector(client)))
    )
    made = ClientModel(method, client, facts, unseen)
    for name, part in {**state, **own}.items():
        assert not hasattr(made, name), f"'{name}' is a name of modules"
        bound = getattr(parts, name)
        if isinstance(part, Module):
            plain = part.build().float()
            plain.load_state_dict(bound.state_dict())  # not the bound one, whose tensors share a vector
            made.add_module(name, plain)
        else:
            made.register_buffer(name, bound.clone())
    if unseen and method.unseen_null:
        raise CheckpointError(f"client {client} has no answer: {method.unseen_null}", "take one that trains")
    return made.eval()
