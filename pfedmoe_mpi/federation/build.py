"""From a configuration to a federation that is ready for round 1: data, partition, models, clients, device.

Every user error that needs the data is raised here, on all ranks and before anything is written.
"""

from __future__ import annotations

from pfedmoe_mpi import algorithms
from pfedmoe_mpi.checkpoint import Checkpoint, weights
from pfedmoe_mpi.config import Config
from pfedmoe_mpi.core.batches import Normalise
from pfedmoe_mpi.core.client import Client
from pfedmoe_mpi.core.kept import Kept
from pfedmoe_mpi.core.parts import Workbench
from pfedmoe_mpi.core.turn import Engine
from pfedmoe_mpi.data import Dataset, Partition
from pfedmoe_mpi.data.noise import with_noise
from pfedmoe_mpi.federation import frozen, own_code, placement, pretrained
from pfedmoe_mpi.federation.distribute import data_digest, distribute, gate_rows, open_everywhere, reserved
from pfedmoe_mpi.federation.effective import effective_config
from pfedmoe_mpi.federation.federation import Federation, pin
from pfedmoe_mpi.federation.memory import Host
from pfedmoe_mpi.federation.plan import Plan, make_plan, make_task
from pfedmoe_mpi.federation.pretraining import check_initial
from pfedmoe_mpi.federation.server_optimiser import check_method
from pfedmoe_mpi.federation.stream import Stream
from pfedmoe_mpi.mpi import device
from pfedmoe_mpi.mpi.comm import Comm


def build(comm: Comm, settings: Config, *, warn: bool = True, loaded: Checkpoint | None = None) -> Federation:
    """Assemble a federation; collective. With `warn` rank 0 prints the data's warnings.

    With a checkpoint, whose vectors replace the initial ones, no file of weights is read, and frozen tensors
    are those of its run folder.

    Raises:
        UserError: on all ranks: a setting or the data cannot be used.
    """
    code = own_code.load(comm, settings)
    dataset = open_everywhere(comm, settings, warn=warn)
    threads = device.threads(comm, settings.train.threads)
    settings = effective_config(settings, dataset, threads)
    own_device = device.choose(comm, settings.train)
    host = Host(comm.local()[1], comm.size, own_device.device.type == "cpu")
    plan = comm.from_root(lambda: make_plan(settings, dataset, host), "plan", Plan.without_rows)
    partition, costs = plan.partition, plan.costs
    dataset = with_noise(plan.fitted or dataset, partition, settings.partition.noise, settings.seed)
    task = make_task(settings, dataset, partition)
    method = algorithms.load(settings.algorithm)(task)
    method.poll = comm.poll
    method.read_weights = weights.read
    specs = [method.client_state(k) for k in range(task.clients)]  # a ConfigError is raised on all ranks
    begun_with = pretrained.load(comm, settings, (method.state(), *specs), loaded)
    workbench = Workbench(settings.seed, own_device.device, begun_with.weights, settings.model.start)
    frozen_tensors = frozen.load(comm, workbench, (method.state(), specs), loaded)
    state_layout = workbench.layout(method.state())
    client_layouts = [workbench.layout(spec) for spec in specs]
    check_initial(method, state_layout, client_layouts)
    check_method(settings, method, state_layout)
    home = placement.homes(costs, comm.size)
    normalise = Normalise(dataset.mean, dataset.std, len(dataset.shape), own_device.device)
    tails = comm.from_root(lambda: frozen.find_tails(task, (method.state(), *specs)), "frozen layers")
    workbench.kept = Kept(tails, normalise, settings.eval.batch, comm.poll)
    engine = Engine(
        own_device.device,
        normalise,
        settings.train,
        settings.eval.batch,
        settings.seed,
        settings.rounds,
        comm.poll,
        workbench.kept,
    )
    shards = distribute(comm, dataset, partition, home, own_device.device)
    clients = {
        k: Client(k, specs[k], pin(workbench.initial(specs[k], k), own_device.device), shards[k])
        for k in shards
    }
    return Federation(
        config=settings,
        code=code,
        dataset=dataset,
        partition=partition,
        data_digest=data_digest(comm, shards),
        task=task,
        method=method,
        pretrained=begun_with,
        frozen=frozen_tensors,
        workbench=workbench,
        engine=engine,
        device=own_device,
        home=home,
        costs=costs,
        state_layout=state_layout,
        client_layouts=client_layouts,
        clients=clients,
        stream=make_stream(settings, dataset, partition),
        reserved=reserved(comm, dataset, partition, own_device.device) if method.pretrains else None,
        gate_rows=gate_rows(comm, dataset, partition, settings.seed, own_device.device)
        if method.experts
        else None,
    )


def make_stream(settings: Config, dataset: Dataset, partition: Partition) -> Stream | None:
    """Return the stream of `stream.kind`, None if data do not drift."""
    if settings.stream.kind == "none":
        return None
    labels = [dataset.labels[rows] for rows in partition.train]
    return Stream(settings.stream, settings.seed, labels, dataset.classes)
