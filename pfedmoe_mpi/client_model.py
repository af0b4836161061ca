"""A client's model as a torch module that answers raw samples; needs no MPI and no data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi import checkpoint, config
from pfedmoe_mpi.algorithms import base
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.checkpoint import Checkpoint, client_file
from pfedmoe_mpi.checkpoint.client_file import ClientFile
from pfedmoe_mpi.core.batches import Normalise
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Module, Workbench
from pfedmoe_mpi.data.resize import resize
from pfedmoe_mpi.errors import CheckpointError, DataError

if TYPE_CHECKING:
    pass


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
            answer: Any = self._method.predictor(self, inputs, self._unseen)  # type: ignore[arg-type]
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


def load(path: Path, client: int | None = None) -> ClientModel:
    """A client's model from a checkpoint or from a file of `export`, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: a damaged or older file, no such client, or one without an answer.
    """
    if client_file.is_client_file(path):
        with ClientFile(path) as own:
            if client not in {None, own.client}:
                raise CheckpointError(f"{path} holds client {own.client} alone", "leave the number out")
            said = own.config, own.round, own.client, own.samples
            return _Source(path, *said, state=own.vector, own=own.vector).model()
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        which = f"clients are 0 to {loaded.clients - 1}"
        if client is None:
            raise CheckpointError(f"{path} is a checkpoint: which client?", f"load_client(path, 0); {which}")
        if not 0 <= client < loaded.clients:
            raise CheckpointError(f"there is no client {client}", which)
        state = partial(_fitting, path, loaded.state_layout, loaded.state)
        vector = partial(_fitting, path, loaded.layout(client), loaded.vector(client))
        samples = loaded.identity.get("samples", "")
        return _Source(path, loaded.config, loaded.round, client, samples, state, vector).model()


def _fitting(path: Path, held: Layout, vector: np.ndarray, wanted: Layout) -> np.ndarray:
    if held.digest != wanted.digest:
        problem = f"the models of {path} are not those of its configuration"
        raise CheckpointError(problem, "take another checkpoint")
    return vector


@dataclass(frozen=True)
class _Source:
    """What a file has for one client's model; `state` and `own` give the vectors of a layout."""

    path: Path
    config: Mapping[str, Any]
    round: int
    client: int
    samples: str  # what `samples_text` wrote
    state: Callable[[Layout], np.ndarray]
    own: Callable[[Layout], np.ndarray]

    def model(self) -> ClientModel:
        facts = self._facts()
        method = self._method(facts)
        unseen = self.client in method.task.absent_clients(self.round)
        if unseen and method.no_answer_reason:
            problem = f"client {self.client} has no answer: {method.no_answer_reason}"
            raise CheckpointError(problem, "take one that trains")
        with torch.random.fork_rng(devices=[]):  # building modules draws
            return self._fill(ClientModel(method, self.client, facts, unseen), method)

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads(self.samples)
            numbers = {name: int(facts[name]) for name in ("classes", "vocabulary")}
            return {**facts, **numbers, "shape": tuple(map(int, facts["shape"]))}
        except (KeyError, ValueError, TypeError) as error:
            problem = f"{self.path} does not say what its samples are"
            remedy = "`restart` of its run with a higher --rounds writes one that does"
            raise CheckpointError(problem, remedy) from error

    def _method(self, facts: Mapping[str, Any]) -> Algorithm:
        settings = config.build(config.flatten(self.config))
        if facts["absent"] is None:
            problem = f"{self.path} does not say which clients never train: there are too many"
            raise CheckpointError(problem, "`evaluate` measures them all")
        never, late = map(frozenset, facts["absent"])
        model = settings.model
        counts = np.zeros((settings.clients, facts["classes"]), np.int64)  # no method answers by them
        known = (settings, facts["shape"], facts["classes"], counts, model.pool, model.shared, model.dim)
        return base.load(settings.algorithm)(Task(*known, never, late, facts["vocabulary"]))

    def _fill(self, made: ClientModel, method: Algorithm) -> ClientModel:
        bench = Workbench(method.task.config.seed, torch.device("cpu"))
        state, own = method.state(), method.client_state(self.client)
        parts = bench.parts(
            (state, torch.from_numpy(self.state(bench.layout(state)))),
            (own, torch.from_numpy(self.own(bench.layout(own)))),
        )
        for name, part in {**state, **own}.items():
            assert not hasattr(made, name), f"'{name}' is a name of modules"
            bound = getattr(parts, name)
            if isinstance(part, Module):
                plain = part.build().float()
                plain.load_state_dict(bound.state_dict())  # not the bound one, whose tensors share a vector
                made.add_module(name, plain)
            else:
                made.register_buffer(name, bound.clone())
        return made.eval()
