"""Kept images as training data: which are taken, and by which settings."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cascade.bundle.format import write
from cascade.cli.main import app
from cascade.engine.dispatch_table import DispatchTable, Target
from cascade.engine.unknown import Origin
from cascade.errors import CascadeError
from tests.conftest import sheet
from tests.helpers.bundles import handmade
from tests.helpers.domains import activations, with_domain
from tests.helpers.training import Recorder
from training.recipe import Recipe
from training.unknown import recipe_of

STAGE = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one bundle, of clothes."""
    images, store = sheet("fashion_mnist"), tmp_path_factory.mktemp("store")
    bundle = with_domain(handmade(images[:20], name="clothes", experts=0), images[:200], STAGE)
    write(bundle, store / "clothes" / "1")
    return store


def kept(folder: Path, images: list[Image.Image]) -> Path:
    """The images as a server keeps them that has the same backbone, and no bundle that they fit."""
    folder.mkdir()
    bundle = with_domain(handmade(sheet("fashion_mnist")[:20], experts=0), sheet("fashion_mnist")[:200], STAGE)
    (space,) = DispatchTable.of([Target.of(bundle)]).spaces
    for n, (image, embedding) in enumerate(zip(images, activations(bundle, images, STAGE).numpy(), strict=True)):
        image.save(folder / f"{n}.jpg", comment=Origin.of(space, embedding).to_comment())
    return folder


def test_without_those_that_fit_by_now(store: Path, tmp_path: Path) -> None:
    clothes, photos = sheet("fashion_mnist")[200:210], sheet("cifar10")[:40]
    folder, recorder = kept(tmp_path / "unknown", [*clothes, *photos]), Recorder()
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:30])
    wanted = Recipe("", crop_pct=0.9)
    recipe = recipe_of(wanted, folder, store / "new" / "1", tmp_path / "run", recorder)
    assert recipe.data == str(tmp_path / "run-unknown" / "images")
    assert (recipe.backbone, recipe.source, recipe.size, recipe.crop_pct) == ("test_resnet", "random:0", 64, 0.9)
    taken = {int(path.stem) for path in Path(recipe.data).glob("*.jpg") if path.stem != "cut"}
    assert len(taken & {*range(10)}) <= 1, "clothes fit"
    assert len(taken & {*range(10, 50)}) >= 25
    assert any("fit a bundle by now: clothes" in line for line in recorder.said)
    for path in folder.iterdir():
        path.unlink()  # evicted: the copies stay, so that the run can be resumed
    assert recipe_of(wanted, folder, store / "new" / "1", tmp_path / "run", recorder) == recipe
    named = Recipe("", backbone="test_vit", source="random:1", size=32)
    assert recipe_of(named, folder, store / "new" / "1", tmp_path / "run", recorder).backbone == "test_vit"


def test_any_folder_of_images(store: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for n, image in enumerate(sheet("cifar10")[:20]):
        image.save(tmp_path / "photos" / f"{n}.png")
    recipe = recipe_of(Recipe(""), tmp_path / "photos", tmp_path / "none" / "new" / "1", tmp_path / "run", Recorder())
    assert recipe == replace(Recipe(""), data=recipe.data) and len([*Path(recipe.data).iterdir()]) == 20


def test_errors(store: Path, tmp_path: Path) -> None:
    folder = kept(tmp_path / "unknown", sheet("cifar10")[:12])
    for recipe, source, message in (
        (Recipe(""), folder, "too few for a new one: wait for 20"),
        (Recipe(""), tmp_path / "none", "is not a folder"),
        (Recipe("", labels=True), folder, "have no labels"),
    ):
        with pytest.raises(CascadeError, match=message):
            recipe_of(recipe, source, store / "new" / "1", tmp_path / "run", Recorder())
    for arguments in ([], ["photos", "--from-unknown", str(folder)]):
        done = CliRunner().invoke(app, ["train", *arguments, "--out", str(tmp_path / "new" / "1")])
        assert done.exit_code == 1 and "or --from-unknown FOLDER, and not both" in str(done.output), done.output


@pytest.mark.parametrize("comment", [b"", b"{}", b"[1]", b"\xff", b'{"embedding": 1}'])
def test_a_foreign_comment_is_no_origin(comment: bytes) -> None:
    from cascade.engine.unknown import origin_of

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out := BytesIO(), "jpeg", comment=comment)
    assert origin_of(out.getvalue()) is None
