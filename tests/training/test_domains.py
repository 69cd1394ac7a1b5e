"""Domains of bundles: fitted by training, or added to a bundle that has none."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cascade import Engine, Options, Prediction
from cascade.bundle.format import read, write
from cascade.cli.main import app
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from tests.conftest import sheet
from tests.helpers.bundles import handmade
from training import domains


def test_training_gives_a_bundle_its_domain(bundle_path: Path) -> None:
    bundle = read(bundle_path)
    assert bundle.domain is not None and bundle.card.domain is not None
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source)
    assert bundle.card.domain.stage == domains.stage_of(backbone) == 5
    assert len(bundle.domain.prototypes) == 16 and len(bundle.domain.samples) == 48


def test_stages_are_the_middle_rounded_up() -> None:
    for name, stage in (("test_resnet", 3), ("test_vit", 4), ("test_byobnet", 0)):
        assert domains.stage_of(backbones.load(name, "random:0")) == stage


@pytest.mark.parametrize("name", ["photos", "clothes"])
def test_added_to_a_bundle_that_has_none(tmp_path: Path, name: str) -> None:
    """Its files stay as they were, and images are dispatched to it."""
    images = sheet("cifar10" if name == "photos" else "fashion_mnist")
    old = write(handmade(images[:20], experts=0, name=name), tmp_path / "store" / name / "1")
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images[:60]):
        image.save(folder / f"{i}.png")
    out = tmp_path / "store" / name / "2"
    done = CliRunner().invoke(app, ["domain", str(old), str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    for file in ("masks.safetensors", "heads.safetensors", "fusion.safetensors"):
        assert (old / file).read_bytes() == (out / file).read_bytes()
    engine = Engine()
    engine.add(read(out))
    answers = engine.predict(images[60:80], Options("auto", embedding=True))
    right = [answer for answer in answers if isinstance(answer, Prediction)]
    assert len(right) >= 18, "a few may look unknown"
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert "images can be dispatched to it" in shown.output


def test_too_few_images(tmp_path: Path) -> None:
    images = sheet("cifar10")
    old = write(handmade(images[:20], experts=0), tmp_path / "store" / "hand" / "1")
    images[0].save(tmp_path / "one.png")
    with pytest.raises(CascadeError, match="1 images are too few to tell a domain from others: give 10 or more"):
        domains.add(old, [tmp_path / "one.png"], tmp_path / "store" / "hand" / "2")
    assert not (tmp_path / "store" / "hand" / "2").exists()


def test_the_same_images_give_the_same_domain() -> None:
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    one, two = domains.fit(features), domains.fit(features)
    assert all(torch.equal(getattr(one, part), getattr(two, part)) for part in one.layout)
