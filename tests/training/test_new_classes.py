"""``cascade heads add`` and ``remove``: classes come and go, the mask stays."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

from cascade.bundle.format import read, write
from cascade.bundle.schema import DeferralCard
from cascade.bundle.thumbnails import Thumbnails
from cascade.cli.main import app
from cascade.engine.engine import Engine
from cascade.engine.results import Options, Prediction
from cascade.errors import CascadeError
from tests.helpers.bundle_files import edit_tensors, refusal
from training import new_classes, pipeline
from training.cli import Watch
from training.recipe import Recipe
from training.run import begin


@pytest.fixture(scope="module")
def folders(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Class folders without the last two classes, and those two."""
    old, new = tmp_path_factory.mktemp("classes") / "old", tmp_path_factory.mktemp("classes") / "new"
    names = sorted(path.name for path in (cifar_folder / "train").iterdir())
    for folder, part in ((old, names[:-2]), (new, names[-2:])):
        for name in part:
            shutil.copytree(cifar_folder / "train" / name, folder / name)
    return old, new


@pytest.fixture(scope="module")
def bundle(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new-classes")
    recipe = Recipe(
        str(folders[0]), labels=True, backbone="test_efficientnet", source="random:0", size=32, steps=0, bank=20
    )
    run = begin(folder / "run", recipe, Watch(None))
    out = folder / "store" / "photos" / "1"
    return pipeline.train(run, out, frozen=True, extensible=True, thumbnails=True)


def test_added_classes_are_answered_and_removed_ones_are_not(
    bundle: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    before = read(bundle)
    names = sorted(path.name for path in folders[1].iterdir())
    added = new_classes.add(bundle, folders[1], tmp_path / "photos" / "2")
    after = read(added.path)
    assert after.card.classes == [*before.card.classes, *names]
    assert added.images == {name: len(list((folders[1] / name).iterdir())) for name in names}
    assert after.card.training["heads"] == [{"added": added.images}]
    assert after.dispatcher.bits.equal(before.dispatcher.bits)
    assert before.domain is not None and after.domain is not None
    assert len(after.domain.prototypes) > len(before.domain.prototypes), "its images can be dispatched to it"
    files = sorted(path for name in names for path in (folders[1] / name).iterdir())
    engine = Engine()
    engine.add(after)
    found = [a.labels[0].name for a in engine.predict(files, Options(labels=1)) if isinstance(a, Prediction)]
    right = [name == file.parent.name for name, file in zip(found, files, strict=True)]
    assert sum(right) > 0.5 * len(files), "of ten classes, by features of a random network"

    less = read(new_classes.remove(added.path, [names[0], before.card.classes[0]], tmp_path / "photos" / "3"))
    assert less.card.classes == [*before.card.classes[1:], names[1]]
    assert before.banks["dispatcher"].labels[0] and before.card.classes[0] not in less.banks["dispatcher"].labels
    assert isinstance(less.thumbnails, Thumbnails) and len(less.thumbnails) == len(less.banks["dispatcher"].names)
    assert less.map is not None and len(less.map.points) == len(less.thumbnails)
    engine.add(less)
    (answer,) = engine.predict(files[:1], Options(labels=50))
    assert isinstance(answer, Prediction) and len(answer.labels) == len(less.card.classes)


def test_more_images_of_a_known_class_change_its_mean_alone(bundle: Path, tmp_path: Path) -> None:
    before = read(bundle)
    name = before.card.classes[0]
    folder = tmp_path / "more" / name
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for i in range(6):
        to_pil_image(torch.rand(3, 32, 32)).save(folder / f"{i}.png")
    after = read(new_classes.add(bundle, tmp_path / "more", tmp_path / "photos" / "2").path)
    assert after.card.classes == before.card.classes
    assert before.discriminant is not None and after.discriminant is not None
    gained = after.discriminant.counts - before.discriminant.counts
    assert gained.tolist() == [6, *[0] * 7]
    assert after.discriminant.means[1:].equal(before.discriminant.means[1:])
    assert not after.discriminant.means[0].equal(before.discriminant.means[0])


def test_serving_does_not_hold_the_statistics(bundle: Path) -> None:
    kept = read(bundle)
    engine = Engine()
    engine.add(kept)
    (held,) = engine.loaded
    assert kept.discriminant is not None and held.discriminant is None and held.bytes() < kept.bytes()


def test_a_larger_input_size_knows_only_the_old_classes(bundle: Path, tmp_path: Path) -> None:
    before = read(bundle)
    preprocessing = replace(before.preprocessing, size=2 * before.preprocessing.size)
    mask = before.card.masks[0]
    deferral = DeferralCard(threshold=0.5, lose=0.3, share=0.5, preprocessing=preprocessing.to_json(), mask=mask)
    card = before.card.model_copy(update={"deferral": deferral})
    assert (of_larger := card.larger()) is not None
    parts: dict[str, Any] = dict.fromkeys(("ood", "domain", "thumbnails", "map", "discriminant"))
    larger = replace(before, card=of_larger, preprocessing=preprocessing, banks={}, **parts)
    path = write(replace(before, card=card, larger=larger), tmp_path / "photos" / "1")
    assert read(path).larger is not None
    less = read(new_classes.remove(path, before.card.classes[:1], tmp_path / "photos" / "2"))
    assert less.larger is None and less.card.deferral is None


def test_the_commands_write_the_next_version(bundle: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "photos" / "1")
    shutil.copytree(bundle, tmp_path / "photos" / "9")
    run = CliRunner().invoke
    out = run(app, ["heads", "add", str(tmp_path / "photos" / "1"), str(folders[1])])
    assert out.exit_code == 0, out.output
    added = read(tmp_path / "photos" / "10")
    assert "new images were right while they were held out" in out.output
    out = run(app, ["heads", "remove", str(tmp_path / "photos" / "10"), added.card.classes[0]])
    assert out.exit_code == 0 and read(tmp_path / "photos" / "11").card.classes == added.card.classes[1:]


def test_what_is_wrong_is_said(bundle: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    classes = read(bundle).card.classes
    with pytest.raises(CascadeError, match="has no class unicorn; it has:"):
        new_classes.remove(bundle, ["unicorn"], tmp_path / "a" / "1")
    with pytest.raises(CascadeError, match="a classifier needs two"):
        new_classes.remove(bundle, classes[1:], tmp_path / "a" / "1")
    with pytest.raises(CascadeError, match="into a subfolder for each class"):
        new_classes.add(bundle, folders[1] / next(folders[1].iterdir()).name, tmp_path / "a" / "1")
    with pytest.raises(CascadeError, match="is not a folder"):
        new_classes.add(bundle, tmp_path / "nothing", tmp_path / "a" / "1")
    plain = shutil.copytree(bundle, tmp_path / "photos" / "1")
    edit_tensors(plain, "discriminant", lambda tensors: tensors.update(ridge=-tensors["ridge"]))
    assert "ridge and temperature must be above 0" in refusal(plain)
    edit_tensors(plain, "discriminant", lambda tensors: tensors.update(correlation=tensors["correlation"][1:].clone()))
    assert "a triangle of" in refusal(plain)
    assert not (tmp_path / "a").exists()


def test_bundles_without_the_statistics_say_how_to_get_them(cifar_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(cifar_folder), labels=True, backbone="test_efficientnet", source="random:0", size=32, steps=0)
    run = begin(tmp_path / "run", recipe, Watch(None))
    plain = pipeline.train(run, tmp_path / "photos" / "1", frozen=True)
    with pytest.raises(CascadeError, match="cascade train --labels --extensible"):
        new_classes.add(plain, cifar_folder, tmp_path / "photos" / "2")
    unlabeled = begin(tmp_path / "other", Recipe(str(cifar_folder)), Watch(None))
    with pytest.raises(CascadeError, match="--extensible keeps statistics of each class: add --labels"):
        pipeline.train(unlabeled, tmp_path / "photos" / "3", extensible=True)
