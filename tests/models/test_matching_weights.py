"""Files of weights and modules: which tensors fit, what keeps its own draw, and what each refusal lists."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import h5py
import pytest
import torch
from torch import Tensor, nn

from pfedmoe_mpi.checkpoint import weights
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import pretrained, registry

SHAPE, DIM = (3, 16, 16), 12


def model(classes: int = 4, dim: int = DIM, name: str = "cnn5", stem: str = "small") -> registry.Model:
    return registry.build_model(name, SHAPE, classes, dim, stem)


def saved(tensors: dict[str, Tensor], path: Path) -> pretrained.Weights:
    torch.save(tensors, path)
    return weights.read_all(path)


def assert_begins_with(module: nn.Module, source: dict[str, Tensor], drawn: set[str]) -> None:
    for name, tensor in pretrained.float_tensors(module).items():
        assert torch.equal(tensor, source[name]) != (name in drawn), name


def test_a_model_and_its_extractor_begin_with_either_of_both(tmp_path: Path) -> None:
    source = model()
    whole = saved(source.state_dict(), tmp_path / "whole.pt")
    bare = saved(source.extractor.state_dict(), tmp_path / "bare.pt")
    for file, drawn in ((whole, set()), (bare, {"head.weight", "head.bias"})):
        other = model()
        pretrained.fill(other, file)
        assert_begins_with(other, source.state_dict(), drawn)
        assert set(pretrained.match(other, file).drawn) == drawn
        extractor = model().extractor
        pretrained.fill(extractor, file)
        assert_begins_with(extractor, source.extractor.state_dict(), set())


def test_last_layers_may_differ(tmp_path: Path) -> None:
    file = saved(model(classes=7).state_dict(), tmp_path / "seven.pt")
    assert set(pretrained.match(model(), file).drawn) == {"head.weight", "head.bias"}
    file = saved(model(dim=20).extractor.state_dict(), tmp_path / "wide.pt")
    assert set(pretrained.match(model().extractor, file).drawn) == {"fc2.weight", "fc2.bias"}


def test_published_names(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    published = resnet18(weights=None)
    file = saved(published.state_dict(), tmp_path / "resnet18.pth")
    ours = model(name="resnet18", stem="imagenet")
    pretrained.fill(ours, file)
    assert torch.equal(ours.extractor.layer4[1].bn2.running_var, published.layer4[1].bn2.running_var)
    assert torch.equal(ours.extractor.conv1.weight, published.conv1.weight)
    with pytest.raises(ConfigError, match=r"extractor\.conv1\.weight 64×3×7×7, expected 64×3×3×3") as caught:
        pretrained.fill(model(name="resnet18"), file)
    assert "--model.stem imagenet" in caught.value.remedy
    grey = registry.build_model("resnet18", (1, 32, 32), 4, DIM, "imagenet")
    with pytest.raises(ConfigError, match=r"64×3×7×7, expected 64×1×7×7") as caught:
        pretrained.fill(grey, file)
    assert "samples of 3 channels" in caught.value.remedy
    with pytest.raises(ConfigError, match=r"not part of it: bn1\.weight") as caught:
        pretrained.fill(model().extractor, file)
    assert "--model.weights NAME=FILE" in caught.value.remedy


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = model()
    safetensors.save_file(source.state_dict(), tmp_path / "a.safetensors")
    other = model()
    pretrained.fill(other, weights.read_all(tmp_path / "a.safetensors"))
    assert_begins_with(other, source.state_dict(), set())
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is not a safetensors file, or is damaged"):
        weights.read_all(tmp_path / "b.safetensors")


def test_tied_tensors_may_be_in_a_file_once_or_twice(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2))
        net[1].weight = net[0].weight
        return net

    source = tied()
    state = source.state_dict()
    once = {name: tensor for name, tensor in state.items() if name != "1.weight"}
    for number, tensors in enumerate((state, once)):
        other = tied()
        pretrained.fill(other, saved(tensors, tmp_path / f"{number}.pt"))
        assert_begins_with(other, state, set())


def test_everything_that_does_not_fit_is_in_one_message(tmp_path: Path) -> None:
    state = model().state_dict()
    del state["extractor.conv1.bias"]
    state["extractor.conv2.bias"] = torch.ones(3)
    state["extractor.fc1.bias"][0] = float("nan")
    state["more"] = torch.ones(1)
    with pytest.raises(ConfigError) as caught:
        pretrained.match(model(), saved(state, tmp_path / "x.pt"), "cnn5")
    text = caught.value.problem
    assert "x.pt does not fit cnn5: missing: extractor.conv1.bias; " in text
    assert "of another shape: extractor.conv2.bias 3, expected 32; " in text
    assert "not finite: extractor.fc1.bias; not part of it: more" in text
    with pytest.raises(ConfigError, match=r"missing: .*, … \(\d\d"):
        pretrained.match(model(name="vgg11"), saved(state, tmp_path / "x.pt"))


def test_unusable_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2).long()}, tmp_path / "integers.pt")
    for name, pattern in (("none.pt", "there is no file"), ("integers.pt", "holds no weights")):
        with pytest.raises(ConfigError, match=pattern):
            weights.read_all(tmp_path / name)


def test_tensors_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    """A file from elsewhere must not read other files of the user's."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    source = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (4,), "f4")
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = source
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("model/a", layout)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("model/a", (4,), "f4", external=[(str(secret), 0, 16)])
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["model/a"] = h5py.Empty("f4")
    for name, problem in (
        ("virtual", "virtual dataset"),
        ("external", "external files"),
        ("empty", "values"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}\.h5 cannot be used as weights: model/a .*{problem}"):
            weights.read_all(tmp_path / f"{name}.h5")


def test_low_rank_changes_begin_at_the_weights_of_the_file(tmp_path: Path) -> None:
    from pfedmoe_mpi.models import trained

    def build(train: str) -> nn.Module:
        make = partial(registry.build_extractor, "vit_b_32", (3, 32, 32), DIM, "small")
        return trained.build(make, train, 2, 6.0).eval()

    source = build("all")
    file = saved(source.state_dict(), tmp_path / "vit.pt")
    changed = build("lora")
    assert not pretrained.match(changed, file).drawn
    pretrained.fill(changed, file)
    x = torch.randn(2, 3, 32, 32)
    expected = source(x)
    assert torch.equal(changed(x), expected), "B is zero"
    layer = changed.encoder.layers[3]
    for owner, name in ((layer.self_attention, "in_proj_weight"), (layer.mlp[0], "weight")):
        factors = owner.parametrizations[name][0]
        with torch.no_grad():
            factors.b.fill_(0.01)
        original = owner.parametrizations[name].original
        torch.testing.assert_close(getattr(owner, name), original + 3.0 * factors.b @ factors.a)
    assert not torch.allclose(changed(x), expected)
    trained_numbers = sum(p.numel() for p in changed.parameters() if p.requires_grad)
    # Of 12 blocks: in_proj, out_proj and two layers of the perceptron; and the last layer.
    by_block = 2 * (768 + 2304) + 2 * (768 + 768) + 2 * 2 * (768 + 3072)
    assert trained_numbers == 12 * by_block + 768 * DIM + DIM
