"""Accuracy of a finished bundle, as ``cascade evaluate`` shows it."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from cascade.bundle.format import read, write
from cascade.cli.main import app
from cascade.engine.engine import Engine
from cascade.engine.results import Neighbor, Options, Prediction
from cascade.errors import CascadeError
from tests.helpers.deferral import two_sizes
from tests.helpers.paths import DATA
from training import bundle_accuracy


def test_accuracy_is_the_engines_answers_against_the_class_folders(bundle_path: Path, cifar_folder: Path) -> None:
    table = bundle_accuracy.of_bundle(bundle_path, str(cifar_folder))
    console = Console(file=io.StringIO(), record=True, width=120)
    console.print(table)
    shown = console.export_text()
    assert "60 images" in shown
    bundle = read(bundle_path)
    engine = Engine()
    engine.add(bundle)
    files = sorted((cifar_folder / "test").rglob("*.png"))
    for row, mode in enumerate(bundle.fusions):
        answers = engine.predict([Image.open(f).convert("RGB") for f in files], Options(mode=mode))
        right = [
            a.labels[0].name == f.parent.name for a, f in zip(answers, files, strict=True) if isinstance(a, Prediction)
        ]
        assert len(right) == 60
        column = list(table.columns[1].cells)
        assert column[row] == f"{100 * np.mean(right):.1f}"
    assert [list(c.cells)[0] for c in table.columns][0] == "dispatcher"


def test_neighbors_vote_by_their_similarity() -> None:
    near = (Neighbor("a", "cat", 0.50), Neighbor("b", "dog", 0.30), Neighbor("c", "dog", 0.31))
    votes = {"cat": np.exp(5), "dog": np.exp(3) + np.exp(3.1)}
    assert bundle_accuracy._vote(answer(near)) == max(votes, key=votes.__getitem__) == "cat"
    close = (Neighbor("a", "cat", 0.50), Neighbor("b", "dog", 0.47), Neighbor("c", "dog", 0.46))
    assert bundle_accuracy._vote(answer(close)) == "dog"


def answer(neighbors: tuple[Neighbor, ...]) -> Prediction:
    return Prediction("small", "1", "dispatcher", 0, 1.0, 0.0, ("dispatcher",), (), neighbors, None)


def test_other_classes_than_the_bundles_are_refused(
    bundle_path: Path, tmp_path: Path, cifar: list[Image.Image]
) -> None:
    for i in range(20):
        folder = tmp_path / "pets" / ("hamster" if i % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        cifar[i].save(folder / f"{i}.png")
    with pytest.raises(CascadeError, match="must have class folders that the bundle knows: airplane, automobile"):
        bundle_accuracy.of_bundle(bundle_path, str(tmp_path / "pets"))
    done = CliRunner().invoke(app, ["evaluate", str(bundle_path), str(tmp_path / "pets")])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_some_of_the_classes_are_enough(bundle_path: Path, tmp_path: Path, cifar: list[Image.Image]) -> None:
    about = json.loads((DATA / "cifar10.json").read_text())
    for i in range(120):
        if (name := about["names"][about["labels"][i]]) in ("cat", "ship"):
            (tmp_path / name).mkdir(exist_ok=True)
            cifar[i].save(tmp_path / name / f"{i}.png")
    table = bundle_accuracy.of_bundle(bundle_path, str(tmp_path), limit=4)
    assert len(list(table.columns[0].cells)) == 3 and "4 images" in str(table.title)


def test_two_input_sizes_have_a_row_for_each_mode(cifar: list[Image.Image], cifar_folder: Path, tmp_path: Path) -> None:
    bundle = two_sizes(cifar[:20])
    for split in ("train", "test"):
        for name in bundle.card.classes:
            shutil.copytree(cifar_folder / split / name, tmp_path / "photos" / split / name)
    path = write(bundle, tmp_path / "sizes" / "1")
    table = bundle_accuracy.of_bundle(path, str(tmp_path / "photos"))
    assert list(table.columns[0].cells) == ["dispatcher", "fast", "adaptive", "full"]
    same, fast, _, full = table.columns[1].cells
    assert same == fast != full
