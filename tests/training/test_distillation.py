"""Distillation: the loss, the cached teacher, and a student that comes closer to its teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cascade.errors import CascadeError
from training import dispatcher, distillation, embed, teacher
from training.cli import Watch
from training.data.augment import normalize, shift_flip
from training.objectives import Distillation
from training.recipe import Recipe
from training.run import Run, begin


@pytest.fixture(scope="module")
def run(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = Recipe(
        str(cifar_folder), backbone="test_efficientnet", source="random:0", size=32, steps=40, batch=32, limit=96
    )
    return begin(tmp_path_factory.mktemp("distilled") / "run", recipe, Watch(None))


def test_the_teacher_sees_the_images_and_their_mirror_images_at_twice_the_size(run: Run) -> None:
    features = teacher.features(run)
    backbone, preprocessing = teacher.load(run)
    assert preprocessing.size == 64 and features.shape == (2, 96, backbone.features)
    pixels = run.inputs("train", preprocessing)[:5]
    for side, seen in ((0, pixels), (1, pixels[..., ::-1])):
        expected = embed.frozen(run.executor, embed.normalized(seen, preprocessing))
        np.testing.assert_allclose(features[side, :5], expected, rtol=0.01, atol=0.01)
    before = sorted(p.stat().st_mtime_ns for p in run.cache.glob("teacher-*"))
    teacher.features(run)
    assert before == sorted(p.stat().st_mtime_ns for p in run.cache.glob("teacher-*")), "computed twice"


def test_features_equal_to_the_teachers_have_no_distance(run: Run) -> None:
    features = teacher.features(run)
    loss = Distillation(run.recipe, run.preprocessing, features)
    same = torch.from_numpy(features[0].astype(np.float32))
    assert float(loss.distance(same, features[0])) == 0
    assert float(loss.distance(same + loss.deviation, features[0])) == pytest.approx(0.5, rel=1e-3)


def test_the_student_comes_closer_to_its_teacher(run: Run) -> None:
    dispatcher.train(run)
    found = distillation.measure(run)
    assert found["distance"]["distilled"] < found["distance"]["frozen"]
    assert {"frozen", "distilled", "teacher"} == set(found["knn"])
    said = distillation.verdict(run, found, 12.0)
    assert "12 s of training" in said and "64 px costs" in said and "\n" not in said


def test_a_teacher_that_is_the_student_is_refused(run: Run) -> None:
    same = Run(
        run.folder,
        Recipe("photos", backbone="test_efficientnet", source="random:0", size=32, teacher_size=32),
        run.watch,
    )
    with pytest.raises(CascadeError, match="--teacher-size 32 is no larger than --size 32"):
        teacher.load(same)


def test_a_shift_moves_reflects_and_mirrors() -> None:
    batch = torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 8).expand(64, 3, 8, 8)
    out = shift_flip(batch, 2, torch.Generator().manual_seed(0), (0.0,) * 3, (1 / 255,) * 3)
    rows = {tuple(row) for row in out[:, 0, 0].round().int().tolist()}
    plain = [0, 1, 2, 3, 4, 5, 6, 7]
    shifted = {tuple(7 - abs(abs(i + s) - 7) for i in plain) for s in range(-2, 3)}
    assert rows <= shifted | {row[::-1] for row in shifted} and len(rows) > 5
    same = shift_flip(batch, 0, torch.Generator().manual_seed(0), (0.5,) * 3, (0.5,) * 3)
    expected = normalize(batch.float() / 255, (0.5,) * 3, (0.5,) * 3)
    assert bool(((same == expected) | (same == expected.flip(3))).all())


@pytest.mark.filterwarnings("ignore:.*the embedding collapses")
def test_swav_continues_from_the_distilled_adapter(cifar_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        str(cifar_folder),
        backbone="test_efficientnet",
        source="random:0",
        size=32,
        steps=2,
        batch=32,
        limit=64,
        objective="distill+swav",
        local_crops=0,
        prototypes=20,
    )
    ends = []
    for name in ("at-once", "interrupted"):
        run = begin(tmp_path / name, recipe, Watch(None))
        if name == "interrupted":
            assert run.distilled is not None
            dispatcher.train(run.distilled)
            run = begin(tmp_path / name, recipe, Watch(None))
        dispatcher.train(run)
        ends.append((tmp_path / name / "dispatcher" / "done.safetensors").read_bytes())
    assert ends[0] == ends[1]
    assert run.distilled is not None
    dispatcher.train(run, "none", steps=0)
    begun, distilled, ended = run.trained("none"), run.distilled.trained("dispatcher"), run.trained("dispatcher")
    learned = [n for n in distilled if n.startswith(("scores.", "channels."))]
    assert {n.partition(".")[0] for n in learned} == {"scores", "channels"}
    assert all(torch.equal(begun[n], distilled[n]) for n in learned)
    assert any(not torch.equal(ended[n], distilled[n]) for n in learned)
