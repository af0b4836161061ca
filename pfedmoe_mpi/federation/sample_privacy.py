"""DP-SGD in a federation (`privacy.unit` = sample): its settings, and what is refused before round 1.

What a client sends and keeps may depend on its samples by clipped and noised gradients alone. Methods that
say how else they use samples are refused, and so are models whose normalisation mixes samples. For all
others one client of every architecture and role computes a step on a few samples, whose result is dropped:
the gradient of a batch has to be the mean of its samples' gradients.
"""

from __future__ import annotations

from dataclasses import replace

from torch.nn.modules.batchnorm import _BatchNorm

from pfedmoe_mpi.algorithms.base import Algorithm
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.fixedpoint import NotFiniteError
from pfedmoe_mpi.core.parts import Parts
from pfedmoe_mpi.core.sample_step import NotPerSampleError, SamplePrivacy
from pfedmoe_mpi.core.turn import Turn
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.federation import trial
from pfedmoe_mpi.federation.federation import Federation
from pfedmoe_mpi.models.switchnorm import SwitchNorm
from pfedmoe_mpi.mpi.comm import Comm

FEW = 4  # samples of a trial
OTHER = "use --privacy.unit client, or another --algorithm, such as pfedmoe, fedavg or fedrep"


def of(settings: Config, method: Algorithm) -> SamplePrivacy | None:
    """Return the settings of DP-SGD, None without."""
    privacy = settings.privacy
    if privacy.unit != "sample":
        return None
    poisson = privacy.sampling == "poisson"
    return SamplePrivacy(privacy.clip, privacy.noise, poisson, frozenset(method.apart))


def check(comm: Comm, federation: Federation) -> None:
    """Refuse a method or a model whose clients DP-SGD does not protect; collective.

    Raises:
        ConfigError: on all ranks.
    """
    if not federation.engine.samples:
        return
    method, name = federation.method, federation.config.method
    if method.beyond_gradients:
        raise ConfigError(f"privacy.unit = sample does not protect {name}: {method.beyond_gradients}", OTHER)
    for block in method.payload(federation.state_layout.sizes).values():
        if block.weight.startswith("class"):
            problem = f"privacy.unit = sample does not protect {name}: clients tell which classes they hold"
            raise ConfigError(problem, OTHER)
    if method.prepared_size:
        problem = f"privacy.unit = sample does not protect {name}: clients send values before round 1"
        raise ConfigError(problem, OTHER)

    def try_all() -> None:
        for client, role in trial.members(federation):
            try_member(federation, client, role)

    comm.attempt(try_all, "trial steps")


def try_member(federation: Federation, client: Client, role: str) -> None:
    """Let a client train on a few samples, and compare the batch's gradients with those of its samples.

    Raises:
        ConfigError: they differ, or the client step uses samples otherwise.
    """
    method, engine = federation.method, federation.engine
    assert engine.samples
    privacy = replace(engine.samples, clip=1.0, noise=0.0, poisson=False, compare=True)
    engine = replace(engine, poll=lambda: None, graphs=None, samples=privacy)
    few = {name: split.rows(slice(0, FEW)) for name, split in client.splits.items()}
    parts = federation.parts(client, federation.workbench.initial(method.state()))
    _check_norms(method, parts, role)
    second = 2  # some methods read samples from their second round on
    turn = Turn(engine, method.loss, replace(client, splits=few), parts, second, role)
    name = federation.config.method
    try:
        method.client_step(turn)
    except NotFiniteError:  # few samples and initial values may diverge
        pass
    except NotPerSampleError as error:
        raise ConfigError(f"privacy.unit = sample does not protect {name}: {error}", OTHER) from error
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        kinds = ", ".join(dict.fromkeys(part.kind for part in client.spec.values()))
        raise ConfigError(
            f"privacy.unit = sample, but {name} with {kinds or federation.task.pool[0]} has no gradient for "
            f"each sample alone: {first}",
            "use a --model.pool without dropout, such as cnn1 to cnn5, or --privacy.unit client",
        ) from error
    if turn.trained != list(method.phases(role)):
        raise ConfigError(
            f"privacy.unit = sample counts the phases that `phases` of {name} returns, but its client step "
            "trains others",
            "let `client_step` train what `phases` returns",
        )


def _check_norms(method: Algorithm, parts: Parts, role: str) -> None:
    """Refuse layers in trained parts that normalise over the samples of a batch.

    Raises:
        ConfigError: names the part, and what is without such layers.
    """
    for phase in method.phases(role):
        parts.train(phase.lr.keys())
        for name in phase.lr:
            modules = parts.modules()[name].modules()
            norms = [m for m in modules if m.training and isinstance(m, _BatchNorm | SwitchNorm)]
            if norms:
                raise ConfigError(
                    f"privacy.unit = sample needs the gradient of each sample alone, but "
                    f"{type(norms[0]).__name__} in {name} mixes the samples of a batch",
                    "use --gate.input_norm layer --gate.batch_norm false"
                    if name == "gate"
                    else "use a --model.pool without it, such as cnn1 to cnn5, or --model.train head",
                )
