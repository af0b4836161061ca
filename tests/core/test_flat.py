"""Flat vectors: the place of each tensor, which tensors are views, and what breaks a binding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pfedmoe_mpi.core import parts
from pfedmoe_mpi.core.flat import Bound, BoundTensor, Entry, Layout, flatten, float_buffers
from pfedmoe_mpi.models import registry

CPU = torch.device("cpu")


def norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


class Tied(nn.Module):
    """Encoder and decoder share one matrix, and two norms share their statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.decoder(self.norm(self.encoder(x))))
        return out


class Odd(nn.Module):
    """A module with buffers of every kind, a scalar and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("scratch", torch.full((2,), 7.0), persistent=False)
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.get_buffer("count").add_(1)
            self.get_buffer("scratch").add_(1.0)
        return x * self.scale


MODULES: dict[str, Callable[[], nn.Module]] = {
    "cnn5": lambda: registry.build_model("cnn5", (3, 32, 32), 10, 500, "small"),
    "norms": norms,
    "tied": Tied,
    "odd": Odd,
    "channels_last": lambda: norms().to(memory_format=torch.channels_last),
    "nothing": nn.ReLU,
}


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())
def test_layout_and_vector_round_trip(build: Callable[[], nn.Module]) -> None:
    module = build()
    layout = Layout.of(module)
    assert Layout.from_json(layout.to_json()) == layout
    assert Layout.from_json(layout.to_json()).digest == layout.digest
    with torch.device("meta"):
        assert Layout.of(build()) == layout

    trained = [entry for entry in layout.entries if entry.trained]
    assert list(layout.entries[: len(trained)]) == trained, "parameters first"
    assert [e.name for e in trained] == [name for name, _ in module.named_parameters()]
    assert layout.parameters == sum(p.numel() for p in module.parameters())
    end = 0
    for entry in layout.entries:
        assert entry.offset == end, "no gaps"
        end += entry.size
    assert layout.size == end == len(flatten(module))

    tensors = {**dict(module.named_parameters()), **float_buffers(module)}
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    views = layout.views(flatten(module))
    assert views.keys() == expected.keys()
    assert all(torch.equal(views[name], expected[name]) for name in expected)

    bound = Bound(build(), CPU)
    bound.load(flatten(module))
    now = {**dict(bound.module.named_parameters()), **float_buffers(bound.module)}
    assert all(torch.equal(now[name], expected[name]) for name in expected)


def test_joined_layout_round_trips_with_offsets_and_parts() -> None:
    pieces = {"shared": Layout.of(norms()), "odd": Layout.of(Odd()), "table": Layout.of_tensor((4, 2))}
    joined = Layout.join(pieces)
    assert Layout.from_json(joined.to_json()) == joined
    start = 0
    for name, piece in pieces.items():
        assert joined.parts[name] == slice(start, start + piece.size)
        for entry in piece.entries:
            moved = Entry(f"{name}/{entry.name}", entry.shape, entry.offset + start, entry.trained)
            assert moved in joined.entries
        start += piece.size
    assert joined.size == start
    vector = torch.arange(float(start))
    assert torch.equal(joined.views(vector)["table/"], vector[-8:].view(4, 2))


def test_digest_depends_on_name_shape_order_and_role() -> None:
    base = Layout((Entry("a", (2, 3), 0, True), Entry("b", (4,), 6, False)))
    others = [
        Layout((Entry("x", (2, 3), 0, True), Entry("b", (4,), 6, False))),
        Layout((Entry("a", (3, 2), 0, True), Entry("b", (4,), 6, False))),
        Layout((Entry("a", (2, 3), 4, True), Entry("b", (4,), 0, False))),
        Layout((Entry("a", (2, 3), 0, True), Entry("b", (4,), 6, True))),
        Layout(base.entries[:1]),
    ]
    assert len({layout.digest for layout in [base, *others]}) == 1 + len(others)


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    bound = Bound(Tied(), CPU)
    names = [entry.name for entry in bound.layout.entries]
    assert names == [
        *(
            "encoder.weight",
            "norm.weight",
            "norm.bias",
            "decoder.bias",
            "norm.running_mean",
            "norm.running_var",
        )
    ]
    bound.vector[:36] = torch.arange(36.0)
    assert torch.equal(bound.module.decoder.weight, torch.arange(36.0).view(6, 6))
    bound.module(torch.randn(8, 6)).sum().backward()
    with torch.no_grad():
        for parameter in bound.parameters:
            parameter -= 0.1 * parameter.grad
    bound.check()
    assert bound.module.decoder.weight is bound.module.encoder.weight


def test_other_buffers_are_reset_for_every_client() -> None:
    bound = Bound(Odd(), CPU)
    assert {entry.name for entry in bound.layout.entries} == {"scale", "empty", "kept"}
    bound.module(torch.ones(2))
    assert bound.module.get_buffer("count") == 6 and bound.module.get_buffer("scratch")[0] == 8.0
    bound.load(bound.vector.clone())
    assert bound.module.get_buffer("count") == 5 and bound.module.get_buffer("scratch")[0] == 7.0

    counted = Bound(norms(), CPU)
    counted.module(torch.randn(4, 3, 8, 8))
    assert counted.module[1].num_batches_tracked == 1
    counted.load(counted.vector.clone())
    assert counted.module[1].num_batches_tracked == 0


def test_bound_module_and_vector_share_memory() -> None:
    bound = Bound(norms(), CPU)
    before, x = bound.vector.clone(), torch.randn(8, 3, 8, 8)
    optimiser = torch.optim.SGD(bound.parameters, lr=0.1)
    bound.module(x).square().sum().backward()
    optimiser.step()
    bound.check()
    views, old = bound.layout.views(bound.vector), bound.layout.views(before)
    for name in ("0.weight", "4.weight", "1.running_mean", "1.running_var"):
        assert not torch.equal(views[name], old[name]), name
    bound.module.eval()
    trained = bound.module(x)
    bound.load(before)
    assert not torch.equal(bound.module(x), trained)
    fresh = norms()
    fresh.load_state_dict(
        {**{k: v.clone() for k, v in old.items()}, "1.num_batches_tracked": torch.tensor(0)}
    )
    assert torch.equal(bound.module(x), fresh.eval()(x))


def _replace_parameter(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


def _replace_module(module: nn.Sequential) -> None:
    module[4] = nn.Linear(4 * 36, 5)


def _replace_buffer(module: nn.Sequential) -> None:
    module[1].running_mean = torch.zeros(4)


def _move(module: nn.Sequential) -> None:
    module.double()
    module.float()


def _add(module: nn.Sequential) -> None:
    module.append(nn.Linear(1, 1))


def _drop(module: nn.Sequential) -> None:
    del module[4]


def _memory_format(module: nn.Sequential) -> None:
    module.to(memory_format=torch.channels_last)


def _reshape(module: nn.Sequential) -> None:
    module[4].weight.data = module[4].weight.data.view(4 * 36, 5)


def _transpose(module: nn.Sequential) -> None:
    module[0].weight.data = module[0].weight.data.transpose(2, 3)


def _swap(module: nn.Sequential) -> None:
    one, other = module[1].running_mean, module[1].running_var
    module[1].running_mean, module[1].running_var = other, one


@pytest.mark.parametrize(
    "harm",
    [
        _replace_parameter,
        _replace_module,
        _replace_buffer,
        _move,
        _add,
        _drop,
        _memory_format,
        _reshape,
        _transpose,
        _swap,
    ],
)
def test_check_detects_a_broken_binding(harm: Callable[[nn.Module], None]) -> None:
    bound = Bound(norms(), CPU)
    bound.check()
    harm(bound.module)
    with pytest.raises(AssertionError):
        bound.check()


def test_channels_last_module_binds_and_computes_the_same() -> None:
    module = norms().eval()
    x = torch.randn(2, 3, 8, 8)
    expected = module(x)
    bound = Bound(module.to(memory_format=torch.channels_last), CPU)
    assert all(p.is_contiguous() for p in bound.parameters)
    torch.testing.assert_close(bound.module(x), expected)


def test_vector_holds_float32_only() -> None:
    with pytest.raises(AssertionError, match="float64"):
        Layout.of(nn.Linear(2, 2).double())
    assert Layout.of(Bound(nn.Linear(2, 2).double(), CPU).module).size == 6


def test_single_tensor_is_its_vector() -> None:
    bound = BoundTensor((2, 3), CPU)
    bound.load(torch.arange(6.0))
    assert torch.equal(bound.module, torch.arange(6.0).view(2, 3))
    bound.module[0, 1] = 9.0
    assert bound.vector[1] == 9.0
    assert BoundTensor((), CPU).module.shape == ()


# The workbench, where clients take turns in one bound module


def test_client_turns_leave_no_trace_in_each_other() -> None:
    bench = parts.Workbench(3, CPU)
    spec = {"model": parts.Module("norms", norms), "memory": parts.Tensor((2, 2), float("nan"))}
    vectors = [bench.initial(spec, client) for client in (0, 1)]
    assert bench.initial(spec, 0).equal(vectors[0]) is False, "NaN marks what is not yet defined"
    assert torch.equal(bench.initial(spec, 0).nan_to_num(), vectors[0].nan_to_num())
    assert not torch.equal(vectors[0].nan_to_num(), vectors[1].nan_to_num())
    out = [vector.clone() for vector in vectors]
    for client in (0, 1):
        turn = bench.parts((spec, out[client]))
        turn.model(torch.full((2, 3, 8, 8), float(client)))
        turn.memory.fill_(client)
        turn.check()
        bench.read(spec, turn, out[client])
    again = vectors[0].clone()
    turn = bench.parts((spec, again))
    turn.model(torch.zeros(2, 3, 8, 8))
    turn.memory.fill_(0)
    assert torch.equal(bench.read(spec, turn, torch.empty_like(again)), out[0])
    assert turn.parameter_vector("model").numel() == sum(p.numel() for p in norms().parameters())
    assert turn.modules().keys() == {"model"}


def test_empty_part_is_accepted_and_bad_names_raise() -> None:
    bench = parts.Workbench(3, CPU)
    spec = {"none": parts.Module("relu", nn.ReLU), "one": parts.Module("linear", lambda: nn.Linear(2, 1))}
    vector = bench.initial(spec)
    turn = bench.parts((spec, vector))
    assert torch.equal(turn.none(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
    assert torch.equal(bench.read(spec, turn, torch.empty_like(vector)), vector)
    with pytest.raises(AttributeError, match="no part 'other'"):
        _ = turn.other
    for name in ("vector", "check", "modules"):
        with pytest.raises(AssertionError, match="method of Parts"):
            bench.parts(({name: spec["one"]}, torch.zeros(3)))
    with pytest.raises(AssertionError, match="declared twice"):
        bench.parts((spec, vector), (spec, vector))
    with pytest.raises(AssertionError, match="cannot name a part"):
        bench.layout({"a/b": spec["one"]})


def test_random_buffers_do_not_depend_on_earlier_clients() -> None:
    class Random(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.register_buffer("features", torch.randn(3), persistent=False)

    def features(draws: int) -> Tensor:
        torch.rand(draws)
        turn = parts.Workbench(3, CPU).parts(({"a": parts.Module("random", Random)}, torch.zeros(2)))
        return turn.a.features.clone()

    assert torch.equal(features(0), features(5))
