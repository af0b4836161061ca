"""A client's model as a torch module with raw samples as input; needs neither MPI nor the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi import algorithms, checkpoint, config, user_code
from pfedmoe_mpi.algorithms.base import Algorithm, Task
from pfedmoe_mpi.checkpoint import Checkpoint, client_file, frozen
from pfedmoe_mpi.checkpoint.client_file import ClientFile
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.batches import Normalise
from pfedmoe_mpi.core.flat import Layout
from pfedmoe_mpi.core.parts import Module, Workbench
from pfedmoe_mpi.data.resize import resize
from pfedmoe_mpi.errors import CheckpointError, CodeError, ConfigError, DataError
from pfedmoe_mpi.models import generators
from pfedmoe_mpi.mpi.memory import shortage
from pfedmoe_mpi.storage import untrusted_json

MOST_SHOWN = 300  # characters of an error about a configuration
MOST = 1 << 30  # classes, tokens of a vocabulary, or numbers in a sample


class ClientModel(nn.Module):
    """A client's whole model under a method: its private parts and the server's, as submodules by name.

    A part that is not a module, such as prototypes, is a buffer. `shape` is that of a sample, `classes` are
    the names of the classes, in the order of the logits. The model can be moved, saved and fine-tuned like
    any module; the checkpoint does not change with it.
    """

    def __init__(self, method: Algorithm, client: int, facts: dict[str, Any], unseen: bool) -> None:
        super().__init__()
        self.client = client
        self.shape: tuple[int, ...] = method.task.shape
        numbers = range(method.task.classes)
        self.classes: tuple[str, ...] = tuple(facts["class_names"] or map(str, numbers))
        self._method, self._facts, self._unseen = method, facts, unseen

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of raw samples (B, *shape), in the current mode, with gradients."""
        return self._logits([x])

    def predict(self, x: np.ndarray | Tensor) -> Tensor:
        """Return logits (n, classes), float32, of n raw samples; `argmax(1)` is the class.

        The samples are as in the data, not normalised: for patients the columns standardised as the client's
        were, for texts the tokens of the run's vocabulary, as `Dataset.fitted` returns them. The prediction
        is in evaluation mode, without gradients, in the batches of the run's evaluations.

        FedJETs chooses a client's experts from all samples of the call, so pass all samples of the client
        together.

        Raises:
            DataError: the samples have another shape or dtype.
        """
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                samples = self._raw(x)
                return self._logits(list(samples.split(self._method.task.config.eval.batch)) or [samples])
        finally:
            self.train(training)

    def vector(self, name: str) -> Tensor:
        """Return the values of a part in one vector, as methods see it."""
        part = getattr(self, name)
        if not isinstance(part, nn.Module):
            return part
        return nn.utils.parameters_to_vector(p for p in part.parameters() if p.requires_grad)

    def _logits(self, batches: Sequence[Tensor]) -> Tensor:
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        facts, settings = self._facts, self._method.task.config
        normalise = Normalise(facts["mean"], facts["std"], len(self.shape), device)

        def inputs() -> Iterator[Tensor]:
            return (normalise(batch.to(device)) for batch in batches)

        with torch.autocast(device.type, torch.bfloat16, enabled=settings.train.precision == "bf16"):
            answer: Any = self._method.predictor(self, inputs, self._unseen)  # type: ignore[arg-type]
            return torch.cat([answer(x).float() for x in inputs()])

    def _raw(self, x: np.ndarray | Tensor) -> Tensor:
        """Return the samples as a tensor (n, *shape), with images resized if the run resized them.

        Raises:
            DataError: the samples have another shape or dtype than the model's training samples.
        """
        samples = np.asarray(x.cpu() if isinstance(x, Tensor) else x)
        dtype = self._facts["dtype"]
        remedy = f"pass raw samples (n, {', '.join(map(str, self.shape))}) of dtype {dtype}, as in the data"
        if samples.dtype.name != dtype:
            raise DataError(f"the samples are {samples.dtype}, but the model was trained on {dtype}", remedy)
        images = samples.ndim == 4 and len(self.shape) == 3 and samples.shape[1] == self.shape[0]
        if images and self._method.task.config.data.size and samples.shape[1:] != self.shape:
            samples = resize(samples, self.shape[-1])
        if samples.shape[1:] != self.shape:
            problem = f"the samples have shape {samples.shape[1:]}, but the model needs {self.shape}"
            raise DataError(problem, remedy)
        return torch.from_numpy(np.ascontiguousarray(samples))


def load(
    path: Path, client: int | None = None, code: Path | None = None, changed_code: bool = False
) -> ClientModel:
    """Return a client's model from a checkpoint or from a file of `export`, on the CPU, in evaluation mode.

    Args:
        code: the folder of the user's own files; None: where they were in the run.
        changed_code: accept files that changed since the run.

    Raises:
        CheckpointError: the file is damaged or of an older version, there is no such client, or the method
            has no prediction for the client.
    """
    if client_file.is_client_file(path):
        with ClientFile(path) as exported:
            settings = _configuration(exported, code, changed_code)
            return _load_exported(exported, client, settings)
    checkpoint.verify(path)
    with Checkpoint(path) as loaded:
        settings = _configuration(loaded, code, changed_code)
        return _load_from_checkpoint(loaded, path, client, settings)


def _configuration(source: ClientFile | Checkpoint, code: Path | None, changed_code: bool) -> Config:
    """Return the configuration, whose own code is that of the run.

    Raises:
        CheckpointError: the code changed or is missing, or the configuration cannot be used.
    """
    settings = _build(source, code)
    references = config.references(settings)
    user_code.forget_changed(references)
    difference = user_code.difference(source.code, user_code.sources(references)) if references else ""
    if difference and not changed_code:
        problem = f"the code of {source.path}'s models changed since the run:\n{difference}"
        remedy = "pass code=FOLDER with the files of the run, such as RUN_DIR/code, or changed_code=True"
        raise CheckpointError(problem, remedy)
    return settings


def _build(source: ClientFile | Checkpoint, code: Path | None) -> Config:
    try:
        flat = config.flatten(source.config)
        return config.build(config.relocated(flat, code.absolute()) if code else flat)
    except CodeError:
        raise
    except (ConfigError, RecursionError) as error:
        problem = f"{source.path} has a configuration that cannot be used: {str(error)[:MOST_SHOWN]}"
        raise CheckpointError(problem, "use the version of this program that wrote it") from error


def _load_exported(exported: ClientFile, client: int | None, settings: Config) -> ClientModel:
    path = exported.path
    if client not in {None, exported.client}:
        problem = f"{path} holds only client {exported.client}, not client {client}"
        raise CheckpointError(problem, "call load_client(path) without a client number")
    facts = settings, exported.round, exported.client, exported.samples

    def frozen_vector(name: str, kind: str, layout: Layout) -> np.ndarray:
        return exported.vector(Layout.join({name: layout}))

    return _Source(path, *facts, exported.vector, exported.vector, frozen_vector).model()


def _load_from_checkpoint(
    loaded: Checkpoint, path: Path, client: int | None, settings: Config
) -> ClientModel:
    last = loaded.clients - 1
    if client is None:
        problem = f"{path} is a checkpoint of clients 0 to {last}, and no client number was passed"
        raise CheckpointError(problem, "call load_client(path, 0) for client 0")
    if not 0 <= client <= last:
        raise CheckpointError(f"{path} has no client {client}", f"use one of 0 to {last}")
    state = partial(_checked, path, loaded.state_layout, loaded.state)
    private = partial(_checked, path, loaded.layout(client), loaded.vector(client))
    samples, digest = loaded.identity.get("samples", ""), loaded.identity.get("frozen", "")
    stored = frozen.read(path, digest) if digest else frozen.NOTHING

    def frozen_vector(name: str, kind: str, layout: Layout) -> np.ndarray:
        return _checked(path, stored.layouts.get(kind, Layout(())), stored.vectors.get(kind), layout)

    return _Source(path, settings, loaded.round, client, samples, state, private, frozen_vector).model()


def _checked(path: Path, stored: Layout, vector: np.ndarray | None, expected: Layout) -> np.ndarray:
    """Return the vector; raise CheckpointError if its stored layout is not the expected one."""
    if vector is None or stored.digest != expected.digest:
        problem = f"the models in {path} do not have the layout of its configuration"
        raise CheckpointError(problem, "use another checkpoint")
    return vector


@dataclass(frozen=True)
class _Source:
    """The contents of a file for one client's model.

    `state` and `private` map a layout to the server's and the client's vector of that layout, and `frozen` a
    part's name, kind and layout to its frozen vector.
    """

    path: Path
    config: Config
    round: int
    client: int
    samples: str  # JSON written by `samples_text`
    state: Callable[[Layout], np.ndarray]
    private: Callable[[Layout], np.ndarray]
    frozen: Callable[[str, str, Layout], np.ndarray]

    def model(self) -> ClientModel:
        """Build the model and fill in its values."""
        facts = self._facts()
        method = self._method(facts)
        unseen = self.client in method.task.absent_clients(self.round)
        if unseen and method.no_answer_reason:
            problem = f"no prediction for client {self.client}: {method.no_answer_reason}"
            raise CheckpointError(problem, "use a client that has trained")
        with generators.kept():  # building modules draws random numbers
            return self._fill(ClientModel(method, self.client, facts, unseen), method)

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = untrusted_json.parse(self.samples, "samples")
            numbers = {name: int(facts[name]) for name in ("classes", "vocabulary")}
            shape = tuple(map(int, facts["shape"]))
            if max(math.prod(shape), *numbers.values()) > MOST or min(*shape, *numbers.values()) < 0:
                raise ValueError("sizes that no data have")
            if facts["absent"] is not None:
                never, late = map(frozenset, facts["absent"])
                facts["absent"] = never, late
            return {**facts, **numbers, "shape": shape, "class_names": _names(facts, numbers["classes"])}
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            problem = f"{self.path} does not describe its samples; an older version may have written it"
            remedy = "continue its run with more rounds (restart RUN --rounds N) and load that checkpoint"
            raise CheckpointError(problem, remedy) from error

    def _method(self, facts: Mapping[str, Any]) -> Algorithm:
        settings = self.config
        if facts["absent"] is None:
            problem = f"{self.path} does not list the clients that never train: there are too many"
            raise CheckpointError(problem, f"measure all clients with: evaluate {self.path}")
        never, late = facts["absent"]
        model = settings.model
        # No method needs counts for a prediction, so they take no memory.
        counts = np.broadcast_to(np.int64(0), (settings.clients, facts["classes"]))
        task = Task(
            settings,
            facts["shape"],
            facts["classes"],
            counts,
            model.pool,
            model.shared,
            model.dim,
            never,
            late,
            facts["vocabulary"],
        )
        return algorithms.load(settings.algorithm)(task)

    def _fill(self, model: ClientModel, method: Algorithm) -> ClientModel:
        """Add the parts to the model, with the values of the file."""
        state, private = method.state(), method.client_state(self.client)
        bench = Workbench(method.task.config.seed, torch.device("cpu"))
        layouts = bench.layout(state), bench.layout(private)
        modules = {name: part for name, part in {**state, **private}.items() if isinstance(part, Module)}
        kept = {name: bench.frozen_layout(module) for name, module in modules.items()}
        numbers = sum(layout.size for layout in (*layouts, *kept.values()))
        problem = shortage(3 * 4 * numbers)  # vector, bound module, result
        if problem:
            raise CheckpointError(f"the models of {self.path} do not fit: {problem}", "use a host with more")
        for name, module in modules.items():
            if kept[name].size:
                bench.set_frozen(module.kind, torch.from_numpy(self.frozen(name, module.kind, kept[name])))
        parts = bench.parts(
            (state, torch.from_numpy(self.state(layouts[0]))),
            (private, torch.from_numpy(self.private(layouts[1]))),
        )
        for name, part in {**state, **private}.items():
            assert not hasattr(model, name), f"part '{name}' has the name of an attribute of torch modules"
            bound = getattr(parts, name)
            if isinstance(part, Module):
                plain = part.build().float()
                plain.load_state_dict(bound.state_dict())  # a copy, because bound tensors share a vector
                model.add_module(name, plain)
            else:
                model.register_buffer(name, bound.clone())
        return model.eval()


def _names(facts: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Return the classes' names; empty if these are numbers, and in files of an earlier version."""
    names = facts.get("class_names") or ()
    if not all(isinstance(name, str) for name in names) or len(names) not in {0, classes}:
        raise ValueError("class_names is not a name for every class")
    return tuple(names)
