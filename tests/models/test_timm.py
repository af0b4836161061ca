"""Networks of the package timm as extractors: their sizes, weights from files, and refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from pfedmoe_mpi import user_code
from pfedmoe_mpi.checkpoint import weights
from pfedmoe_mpi.errors import ConfigError
from pfedmoe_mpi.models import names, pretrained, registry, trained

timm = pytest.importorskip("timm")
VIT, RESNET = "timm:vit_tiny_patch16_224", "timm:resnet10t"
SHAPE, DIM = (1, 32, 32), 12


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_networks_map_images_to_representations(name: str) -> None:
    state = torch.get_rng_state()
    registry.check_model(name, SHAPE, 4, DIM, "small")
    assert torch.equal(torch.get_rng_state(), state), "the trial changed the random generator"
    model = registry.build_model(name, SHAPE, 4, DIM, "small")
    assert model(torch.randn(2, *SHAPE)).shape == (2, 4)
    make = partial(registry.build_model, name, SHAPE, 4, DIM, "small")
    chosen = [key for key, p in trained.build(make, "head", 1, 1.0).named_parameters() if p.requires_grad]
    last = "head" if name == VIT else "fc"
    assert chosen == [f"extractor.{last}.weight", f"extractor.{last}.bias", "head.weight", "head.bias"]


def test_weights_of_timm_and_of_this_program(tmp_path: Path) -> None:
    """Both call a last layer `head`: that of the network, and the classifier behind it."""
    published = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    extractor = registry.build_extractor(VIT, SHAPE, DIM, "small")
    match = pretrained.match(extractor, weights.read_all(tmp_path / "published.pth"))
    assert set(match.drawn) == {"head.weight", "head.bias"}
    source = registry.build_model(VIT, SHAPE, DIM, DIM, "small")  # as many classes as d
    torch.save(source.state_dict(), tmp_path / "own.pth")
    pretrained.fill(extractor, weights.read_all(tmp_path / "own.pth"))
    assert torch.equal(extractor.head.bias, source.extractor.head.bias)
    assert not torch.equal(extractor.head.bias, source.head.bias)


def test_names_and_refusals() -> None:
    assert names.resolve_name("timm:ViT-tiny-patch16-224") == VIT
    assert not user_code.is_reference(VIT) and not names.is_own(VIT) and names.kind_of(VIT) == VIT
    assert names.labels([VIT, "timm:resnet18", "resnet18"]) == (
        *("vit_tiny_patch16_224", "timm:resnet18", "resnet18"),
    )
    for name, shape, vocabulary, pattern in (
        ("timm:vit_tinny_patch16_224", SHAPE, 0, "timm has no model .* did you mean"),
        ("timm:hf-hub:someone/model", SHAPE, 0, "timm has no model"),
        (VIT, (9,), 0, "takes images"),
        (VIT, (9,), 50, "takes numbers, but the samples are texts"),
        (VIT, (1, 8, 8), 0, "cannot take 1x8x8"),
    ):
        with pytest.raises(ConfigError, match=pattern):
            registry.check_model(name, shape, 4, DIM, "small", vocabulary)
