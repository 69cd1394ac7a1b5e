"""The classifier pipeline: frozen head, trained mask, the better of both; and what class folders are warned of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.bundle.format import read
from cascade.engine.engine import Engine
from cascade.engine.results import Prediction
from tests.helpers.training import Recorder
from training import comparison, frozen, pipeline
from training.frozen import Candidate
from training.recipe import Recipe
from training.run import Run, begin, split_validation


def recipe(folder: Path) -> Recipe:
    return Recipe(
        str(folder),
        labels=True,
        backbone="test_efficientnet",
        source="random:0",
        size=32,
        steps=12,
        batch=32,
    )


@pytest.fixture(scope="module")
def run(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return begin(tmp_path_factory.mktemp("frozen") / "run", recipe(cifar_folder), Recorder())


def test_a_frozen_bundle_is_a_head_and_answers_as_it_was_measured(
    run: Run, cifar: list[Image.Image], tmp_path: Path
) -> None:
    bundle = read(pipeline.train(run, tmp_path / "store" / "a" / "1", frozen=True))
    assert sum(bundle.card.bytes.values()) < 100_000
    assert bundle.card.accuracy["serves"] == "frozen" and 0 <= bundle.card.accuracy["calibration_error"] <= 1
    engine = Engine()
    engine.add(bundle)
    answers = engine.predict([run.held_out.open(i) for i in range(len(run.held_out))])
    assert run.held_out.labels is not None
    names = [a.labels[0].name for a in answers if isinstance(a, Prediction)]
    truth = [run.held_out.classes[k] for k in run.held_out.labels]
    right = np.mean([name == wanted for name, wanted in zip(names, truth, strict=True)])
    assert right == pytest.approx(bundle.card.accuracy["accuracy"], abs=0.03)


def test_of_equal_validation_accuracies_test_images_decide_or_the_loss(run: Run) -> None:
    head = frozen.frozen_head(run)
    tested, untested = replace(head, test=head.test + 0.01, loss=2 * head.loss), replace(head, test=float("nan"))
    assert tested.beats(head) and not head.beats(tested) and not untested.beats(head)
    assert replace(untested, loss=head.loss / 2).beats(head)
    surer = replace(head, loss=head.loss / 2)
    assert head.loss > 0 and surer.beats(head) and not head.beats(surer) and not head.beats(head)
    assert not surer.beats(replace(head, validation=head.validation + 0.01))


def test_the_mask_is_kept_only_where_it_beats_the_head(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import dispatcher

    dispatcher.train(run)
    for better, tested, verdict in (
        (True, 0.1, "the mask is worth having"),
        (True, -0.1, "in doubt"),
        (False, 0.1, "the mask is not worth having"),
    ):
        own = frozen.trained_head(run, "dispatcher")
        head = frozen.frozen_head(run)
        score = head.validation + (0.1 if better else -0.1)
        changed = Candidate("dispatcher", own.head, score, head.test + tested, own.calibration_error, own.temperature)
        monkeypatch.setattr(comparison, "trained_head", lambda *_, made=changed: made)
        chosen, facts = comparison.compare(run)
        assert (chosen.name, facts["serves"]) == (("dispatcher", "both") if better else ("frozen", "frozen"))
        assert comparison.verdict(facts).startswith(verdict)


def test_a_bundle_of_a_trained_mask_serves_the_head_that_was_trained(run: Run, tmp_path: Path) -> None:
    from training import dispatcher, export

    dispatcher.train(run)
    own = frozen.trained_head(run, "dispatcher")
    bundle = read(export.export_classifier(run, own, {}, tmp_path / "store" / "b" / "1"))
    assert bundle.dispatcher.channels and not bundle.banks
    torch.testing.assert_close(bundle.linear["dispatcher"].weight.float(), own.head.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("counts", [[50] * 10, [200, 3, 1], [2, 2], [1, 9]])
def test_validation_images_leave_every_class_something_to_train_on(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    train, validation = split_validation(labels, 0)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert set(labels[train]) == set(labels), "a class has nothing left"
    assert len(validation) <= max(1, len(labels) // 5)


def test_odd_class_folders_are_warned_of(run: Run) -> None:
    recorder = run.watch
    assert isinstance(recorder, Recorder) and run.images.labels is not None
    images = run.images
    odd = Run(run.folder, run.recipe, recorder)
    few = [*np.flatnonzero(images.labels == 0)[:1], *np.flatnonzero(images.labels == 1)]
    odd.__dict__["images"] = images.take(np.array(few))
    frozen.check_labels(odd)
    said = " ".join(recorder.said)
    assert "have one training image" in said and "--class-weights" in said and "never be an answer" in said
    twice = images.take(np.array([0, 0]))
    assert twice.labels is not None
    twice.labels[1] = (twice.labels[0] + 1) % 10
    odd.__dict__["images"] = twice
    frozen.check_labels(odd)
    assert any("in several class folders" in line for line in recorder.said)
