"""A client's model as a torch module with raw samples as input; needs neither MPI nor the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfedmoe_mpi import checkpoint
from pfedmoe_mpi.algorithms.base import Algorithm, Inputs
from pfedmoe_mpi.checkpoint import Checkpoint, client_file, frozen
from pfedmoe_mpi.checkpoint.client_file import ClientFile
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.batches import Normalise
from pfedmoe_mpi.core.flat import Layout, joined
from pfedmoe_mpi.core.parts import Module, Parts, Workbench
from pfedmoe_mpi.data.resize import resize
from pfedmoe_mpi.errors import CheckpointError, DataError
from pfedmoe_mpi.federation.rebuilt import configuration, method_of, sample_facts, vectors
from pfedmoe_mpi.models import generators
from pfedmoe_mpi.mpi.memory import shortage

Answer = Callable[[Inputs], Callable[[Tensor], Tensor]]  # from all samples to a function of a batch


class ClientModel(nn.Module):
    """A client's whole model under a method: its private parts and the server's, as submodules by name.

    A part that is not a module, such as prototypes, is a buffer. A part with the name of an attribute, such
    as `weights`, has an underscore after it. `shape` is that of a sample, `classes` are the names of the
    classes, in the order of the logits. The model can be moved, saved and fine-tuned like any module; the
    checkpoint does not change with it.
    """

    def __init__(self, method: Algorithm, client: int, facts: dict[str, Any], unseen: bool) -> None:
        super().__init__()
        self.client = client
        self.shape: tuple[int, ...] = method.task.shape
        numbers = range(method.task.classes)
        self.classes: tuple[str, ...] = tuple(facts["class_names"] or map(str, numbers))
        self._method, self._facts, self._unseen = method, facts, unseen
        self._attributes: dict[str, str] = {}  # by part
        self._layouts: dict[str, Layout] = {}  # by part

    def add_part(self, name: str, part: nn.Module | Tensor, layout: Layout) -> None:
        """Add a part of the method; `layout` is that of its vector."""
        attribute = f"{name}_" if hasattr(self, name) else name
        self._attributes[name], self._layouts[name] = attribute, layout
        if isinstance(part, nn.Module):
            self.add_module(attribute, part)
        else:
            self.register_buffer(attribute, part)

    def forward(self, x: np.ndarray | Tensor) -> Tensor:
        """Return logits (B, classes) of raw samples (B, *shape), in the current mode, with gradients."""
        return self._answers([torch.as_tensor(x)], self._predictor)

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
        return self._in_batches(x, self._predictor)

    def weights(self, x: np.ndarray | Tensor) -> Tensor:
        """Return the gate's weights (n, experts), float32, of n raw samples, as `predict` takes them.

        They sum to 1. The shared experts come first; pFedMoE has the client's own as the last one, (n, 2).

        Raises:
            DataError: the method has no gate, or this client's gate has never trained; or as for `predict`.
        """
        if self._unseen:
            problem = f"client {self.client} had not trained, so its gate is the initial one"
            raise DataError(problem, "use a client that has trained")

        def weights_of(inputs: Inputs) -> Callable[[Tensor], Tensor]:
            mixture = self._method.mixture(self._parts(), inputs)
            if mixture is None:
                method = self._method.task.config.method
                raise DataError(f"{method} has no gate, and so no weights", "use predict(x) for its logits")
            return lambda x: mixture(x).weights

        return self._in_batches(x, weights_of)

    def _in_batches(self, x: np.ndarray | Tensor, answer: Answer) -> Tensor:
        """Return the answers for raw samples, in evaluation mode, in the batches of the run's evaluations."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                samples = self._raw(x)
                batches = list(samples.split(self._method.task.config.eval.batch)) or [samples]
                return self._answers(batches, answer)
        finally:
            self.train(training)

    def _parts(self) -> Parts:
        """Return the parts as methods see them."""
        names = self._attributes.items()
        found: Any = {n: _Part(getattr(self, attribute), self._layouts[n]) for n, attribute in names}
        return Parts(found)

    def _predictor(self, inputs: Inputs) -> Callable[[Tensor], Tensor]:
        answer: Any = self._method.predictor(self._parts(), inputs, self._unseen)
        return answer

    def _answers(self, batches: Sequence[Tensor], answer: Answer) -> Tensor:
        """Return what a function, which may first look at all samples, returns for each batch."""
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        facts, settings = self._facts, self._method.task.config
        normalise = Normalise(facts["mean"], facts["std"], len(self.shape), device)

        def inputs() -> Iterator[Tensor]:
            return (normalise(batch.to(device)) for batch in batches)

        with torch.autocast(device.type, torch.bfloat16, enabled=settings.train.precision == "bf16"):
            of_batch = answer(inputs)
            return torch.cat([of_batch(x).float() for x in inputs()])

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


@dataclass(frozen=True)
class _Part:
    """A part in place of a `core.flat.Bound`: the tensors are the module's own, and not in one vector."""

    module: nn.Module | Tensor
    layout: Layout

    @property
    def vector(self) -> Tensor:
        """A copy of the part's values (layout.size,)."""
        if isinstance(self.module, Tensor):
            return self.module.reshape(-1).clone()
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return joined([tensors[entry.name].detach().reshape(-1) for entry in self.layout.entries])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the run trained, in the order of the layout."""
        if isinstance(self.module, Tensor):
            return []
        named = dict(self.module.named_parameters())
        return [named[entry.name] for entry in self.layout.entries if entry.trained]


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
            settings = configuration(exported, code, changed_code)
            return _load_exported(exported, client, settings)
    with checkpoint.open_verified(path) as loaded:
        settings = configuration(loaded, code, changed_code)
        return _load_from_checkpoint(loaded, path, client, settings)


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
    private = partial(_checked, path, loaded.layout(client), vectors(loaded)(client))
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
        facts = sample_facts(self.path, self.samples)
        if facts["absent"] is None:
            problem = f"{self.path} does not list the clients that never train: there are too many"
            raise CheckpointError(problem, f"measure all clients with: evaluate {self.path}")
        method = method_of(self.config, facts)
        unseen = self.client in method.task.absent_clients(self.round)
        if unseen and method.no_answer_reason:
            problem = f"no prediction for client {self.client}: {method.no_answer_reason}"
            raise CheckpointError(problem, "use a client that has trained")
        with generators.kept():  # building modules draws random numbers
            return self._fill(ClientModel(method, self.client, facts, unseen), method)

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
        method.assemble(parts)
        for name, part in {**state, **private}.items():
            bound, layout = getattr(parts, name), bench.layout({name: part}).part(name)
            if isinstance(part, Module):
                plain = part.build().float()
                plain.load_state_dict(bound.state_dict())  # a copy, because bound tensors share a vector
                model.add_part(name, plain, layout)
            else:
                model.add_part(name, bound.clone(), layout)
        return model.eval()
