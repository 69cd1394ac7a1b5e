"""All stages in a row, in every shape that a bundle can have."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cascade.bundle.format import check, read, strip_prefix
from cascade.model.fusion import MODES
from tests.helpers.training import Recorder, flat, predict, recipe, train
from training import (
    comparison,
    distilled_experts,
    embed,
    evaluate,
    experts,
    fusion,
    pipeline,
)
from training.cli import Watch
from training.finetune import features
from training.frozen import Candidate
from training.masking import MaskedModel
from training.objectives import SelfSupervised
from training.run import CLUSTERS, begin, resume
from training.tuned import tune_backbone

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads_are_started")]

LITE0 = {"backbone": "tf_efficientnet_lite0", "source": "", "mask_from": "blocks.6"}


def test_the_small_cascade_is_whole(bundle_path: Path, cifar: list[Image.Image]) -> None:
    """EfficientNet-Lite0 with its ImageNet weights; three experts, all of them used."""
    bundle, run = read(bundle_path), resume(bundle_path.parents[2] / "run", Watch(None))
    check(bundle, run.backbone)
    answers = predict(bundle, cifar[:60])
    assert {a.cluster for a in answers} == {0, 1, 2} and {a.mode for a in answers} == {"conditional"}
    assert all(a.labels and a.neighbors and 0 <= a.confidence <= 1 and 0 <= a.ood <= 1 for a in answers)
    assert all(m.differs_from_dispatcher > 0 for m in bundle.card.masks[1:])
    assert not list(run.folder.rglob("*.tmp")) and not list(run.folder.rglob("*.part"))


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "gmm", "slots": "padded", "mode": "unconditional"},
        {"router": "prototypes", "clusters": 2, "draws": 1, "lr": 0.2, "steps": 15} | LITE0,
        {"expert_from": "conv_head", "train_norms": True},
        {"mask_from": "0", "local_crops": 2, "queue": 64},
        {"draws": 2, "backbone": "test_resnet", "mask_from": "layer3"},
        {"clusters": 1, "mode": "unconditional", "router": "prototypes"},  # two masks, nothing to route
        {"backbone": "test_vit", "size": 160, "mask_from": "blocks.4", "clusters": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_cascades(changes: dict[str, object], cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image]) -> None:
    settings = recipe(cifar_folder, **changes)
    out = train(tmp_path, settings)
    bundle, run = read(out), resume(tmp_path / "run", Watch(None))
    check(bundle, run.backbone)
    assert bundle.router is not None and bundle.router.kind == settings.router
    assert bundle.card.mode == settings.mode
    starts = [m.start for m in bundle.masks]
    assert starts == [run.mask_from] + [run.expert_from] * settings.clusters
    assert all(m.differs_from_dispatcher > 0 for m in bundle.card.masks[1:])

    # Assigned as routed, each expert on its own images, and the same features in server and evaluation.
    features = evaluate.collect(run)
    routed = bundle.router.probabilities(torch.from_numpy(features.train[0])).argmax(dim=1)
    assert torch.equal(routed, load_file(run.folder / CLUSTERS)["assigned"])
    photos = [run.held_out.open(i) for i in range(12)]
    for mode in MODES:
        answers = predict(bundle, photos, mode)
        assert [a.cluster for a in answers] == features.routed[:12].tolist()
        expected = fusion.embed(bundle.fusions[mode], features.slots(mode, settings.slots)[1])[:12]
        got = np.stack([a.embedding for a in answers if a.embedding is not None])
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-2, atol=1e-2)


def test_experts_that_start_deeper_share_the_dispatchers_trunk(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expert that was trained, all stages of it, answers as the two masks one after the other do."""
    settings = recipe(cifar_folder, expert_from="conv_head", train_norms=True, mask_from="blocks.2", queue=64)
    train(tmp_path, settings)
    run = resume(tmp_path / "run", Watch(None))
    expert = run.experts[0]
    assert run.mask_from < run.expert_from == expert.start
    assert all(name.startswith(("bn2", "conv_head")) for name in expert.norms)
    assert {n.split(".")[0] for n in run.dispatcher.norms} >= {"blocks", "bn2"}

    made: list[tuple[MaskedModel, SelfSupervised]] = []
    monkeypatch.setattr(experts, "fit", lambda name, model, objective, *_, **__: made.append((model, objective)))
    experts.train(run)
    model, objective = made[0]
    start, trained = run.trained("dispatcher"), run.trained("expert-0")
    assert all(torch.equal(s, start[f"scores.{n}"]) for n, s in model.scores.items())
    assert all(torch.equal(b, start[f"norms.{n}"]) for n, b in model.norms.items())
    assert torch.equal(objective.module.prototypes, start["objective.prototypes"])
    buffers = dict(objective.module.named_buffers())
    counts = {"coded", "nearest", "crowded"}
    assert set(buffers) == {"queue", "filled"} | counts and not any(bool(b.any()) for b in buffers.values()), (
        "of other images"
    )
    model.load(strip_prefix(trained, "scores."), strip_prefix(trained, "norms."))
    x = run.preprocessing.transform()(run.held_out.open(0))[None]
    model.model.eval()
    with torch.no_grad():
        alone = model.tail(model.trunk(x))
    run.executor.swap(run.dispatcher)
    trunk = run.executor.run(x, 0, run.expert_from)
    run.executor.swap(expert)
    torch.testing.assert_close(run.executor.run(trunk, run.expert_from), alone, rtol=1e-4, atol=1e-4)


def test_controls(cifar_folder: Path, tmp_path: Path) -> None:
    train(tmp_path, recipe(cifar_folder), controls=True)
    accuracy = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    methods = ["frozen backbone", "learning-rate zero", "equal-steps dispatcher"]
    assert list(accuracy["whitened"]) == [*methods, "dispatcher", "conditional", "unconditional"]
    for table in (accuracy["whitened"], accuracy["plain"]):
        assert table["learning-rate zero"] == table["frozen backbone"], "nothing but the rate is different"
    curve = (tmp_path / "run" / "equal-steps" / "curve.jsonl").read_text().splitlines()
    assert len(curve) == 6 + 3 * 4


# Bundles that are one mask


def test_a_supervised_mask_has_a_head_and_no_experts(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image]
) -> None:
    out = train(tmp_path, recipe(cifar_folder, labels=True, lr=0.2, steps=20, clusters=0))
    bundle = read(out)
    assert bundle.experts == () and bundle.router is None and set(bundle.fusions) == {"dispatcher"}
    assert bundle.card.mode == "dispatcher" and len(bundle.card.classes) == 10
    answers = predict(bundle, cifar[:20])
    assert all(a.cluster == 0 and a.confidence == 1 and a.masks == ("dispatcher",) for a in answers)
    assert all(a.labels[0].name in bundle.card.classes and len(a.neighbors) == 5 for a in answers)
    curve = [json.loads(line)["loss"] for line in (tmp_path / "run/dispatcher/curve.jsonl").read_text().splitlines()]
    assert curve[0] == pytest.approx(np.log(10), abs=0.3) and np.mean(curve[-5:]) < np.mean(curve[:5])
    assert 0 < bundle.card.masks[0].density < 1, "no bit has flipped"


def test_a_delta_is_the_fine_tuned_copy_in_bits(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are trained, and the bundle serves what is left of the copy as a delta, with its head."""
    monkeypatch.setattr(Candidate, "beats", lambda self, other: self.name == "dispatcher")
    options = {"labels": True, "adapt": "delta", "lr": 0.01, "steps": 12, "clusters": 0}
    run = begin(tmp_path / "run", recipe(cifar_folder, **options), Recorder())
    bundle = read(pipeline.train(run, tmp_path / "store" / "cifar" / "1", compare=True))
    check(bundle, run.backbone)
    facts = bundle.card.accuracy
    assert facts["serves"] == "delta" and {"1-bit delta", "full fine-tuning"} < facts["rows"].keys()
    delta = bundle.dispatcher
    assert delta.deltas.keys() == run.backbone.rows(run.mask_from).keys() and delta.channels
    assert not (tmp_path / "run" / "fine-tuned").exists(), "that training is the delta's own"
    copy = tune_backbone(run.backbone, run.mask_from)
    copy.load_state(run.trained("dispatcher"))
    inputs = embed.normalized(run.inputs("test"), run.preprocessing)
    wanted, plain, found = features(copy, inputs), run.features("frozen")[1], run.features("dispatcher")[1]
    assert np.abs(found - wanted).mean() < 0.7 * np.abs(plain - wanted).mean()
    assert all(a.labels for a in predict(bundle, cifar[:5]))
    assert "delta is worth having" in comparison.verdict(facts) or "delta is better" in comparison.verdict(facts)


@pytest.mark.parametrize("better", ["experts", "one mask"])
def test_experts_that_imitate_a_teacher(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image], better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are served if they come closer to it than one mask does in the same steps."""
    recorder = Recorder()
    options = {"objective": "distill", "adapt": "both", "lr": 0.02, "steps": 80, "clusters": 2}
    run = begin(tmp_path / "run", recipe(cifar_folder, **options), recorder)
    measured = distilled_experts.compare
    monkeypatch.setattr(distilled_experts, "compare", lambda *a: measured(*a) | {"serves": better})
    bundle = read(pipeline.train(run, tmp_path / "store" / "cifar" / "1"))
    (said,) = (line for line in recorder.said if "distance to the teacher, experts remove" in line)
    assert "in the same 80 steps" in said and said.endswith(f"the bundle serves: {better}")
    for name, steps in (("run/expert-0", 40), ("run/expert-1", 40), ("run-joint/dispatcher", 80)):
        assert len((tmp_path / name / "curve.jsonl").read_text().splitlines()) == steps
    answers = predict(bundle, cifar[:20])
    if better == "one mask":
        assert bundle.experts == () and all(a.embedding is not None for a in answers)
        return
    assert len(bundle.experts) == 2 and bundle.card.mode == "conditional"
    assert not bundle.fusions["conditional"].weight[0].any(), "the frozen backbone adds nothing"
    facts = bundle.card.accuracy["experts"]
    assert {"frozen", "one mask", "experts"} == facts["distance"].keys() == facts["knn"].keys()
    assert facts["distance"]["experts"] < facts["distance"]["frozen"]


@pytest.mark.parametrize("better", ["experts", "equal-steps"])
def test_experts_with_labels_each_have_a_head(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image], better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are served if they beat one mask of the same steps, which the table shows beside them."""
    monkeypatch.setattr(Candidate, "beats", lambda self, other: self.name == better)
    recorder = Recorder()
    options = {"labels": True, "adapt": "both", "lr": 0.2, "steps": 12, "clusters": 2, "bank": 0}
    run = begin(tmp_path / "run", recipe(cifar_folder, **options), recorder)
    out = pipeline.train(run, tmp_path / "store" / "cifar" / "1")
    bundle = read(out)
    facts = bundle.card.accuracy
    assert [*facts["rows"]] == ["frozen backbone, linear head", "one mask for all clusters", "an expert per cluster"]
    assert facts["steps"] == {"experts": 12, "each": 6} and facts["serves"] == better
    assert any("experts against one mask for the same 12 steps" in line for line in recorder.said)
    for name, steps in (("expert-0", 6), ("expert-1", 6), ("equal-steps", 12)):
        assert len((tmp_path / "run" / name / "curve.jsonl").read_text().splitlines()) <= steps
    if better != "experts":
        assert bundle.experts == () and bundle.router is None and bundle.card.mode == "dispatcher"
        assert all(a.labels for a in predict(bundle, cifar[:5]))
        return
    assert len(bundle.experts) == 2 and bundle.card.mode == "conditional" and bundle.card.dim == 10
    rows = run.rows[1]
    images = [run.images.open(i) for i in rows]
    answers = predict(bundle, images)
    assert {a.masks for a in answers} <= {("dispatcher", "expert-0"), ("dispatcher", "expert-1")}
    assert [a.cluster for a in answers] == run.clusters["assigned"][rows].tolist()
    blocks = run.blocks()[0][:, rows]
    for i, a in enumerate(answers):
        head = strip_prefix(run.trained(f"expert-{a.cluster}"), "objective.")
        assert head["bias"].any()
        wanted = int((head["weight"].numpy() @ blocks[a.cluster + 1, i] + head["bias"].numpy()).argmax())
        assert a.labels[0].name == bundle.card.classes[wanted], "the label of the image's own expert"
    assert run.images.labels is not None
    truth = [run.images.classes[label] for label in run.images.labels[rows]]
    right = np.mean([a.labels[0].name == label for a, label in zip(answers, truth, strict=True)])
    assert facts["rows"]["an expert per cluster"]["validation"] == pytest.approx(right, abs=1e-3)


def test_an_unlabeled_single_mask_has_neighbors_and_no_head(tmp_path: Path, cifar: list[Image.Image]) -> None:
    out = train(tmp_path, recipe(flat(cifar, tmp_path / "photos", 40), clusters=0, dim=0))
    bundle = read(out)
    assert bundle.experts == () and bundle.router is None and bundle.linear == {} and bundle.card.classes == []
    assert bundle.card.dim == 31, "32 training images span 31 dimensions"
    answers = predict(bundle, cifar[:4])
    assert all(a.labels == () and len(a.neighbors) == 5 and a.neighbors[0].label is None for a in answers)
    assert "whitened" not in bundle.card.accuracy


def test_the_budget_is_said_before_the_first_step(cifar_folder: Path, tmp_path: Path) -> None:
    run = begin(tmp_path, replace(recipe(cifar_folder), expert_from="conv_head"), recorder := Recorder())
    pipeline.budget(run, controls=True)
    assert recorder.said == [
        "240 images to train on, 60 to measure by",
        "mask from blocks.3 on, experts from conv_head on",
        "36 steps of 32 images: dispatcher 6, 3 experts 12, equal-steps control 18",
    ]


def test_the_time_of_a_long_training_is_said_first(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_seconds_per_step", lambda run: 0.6)
    monkeypatch.setattr(pipeline, "_distilled", lambda run, out, *_: out)
    for steps, said in ((1000, "about 10.0 min, at 0.6 s a step"), (50, "50 steps of 32 images: mask 50")):
        run = begin(
            tmp_path / str(steps),
            recipe(cifar_folder, objective="distill", clusters=0, steps=steps),
            recorder := Recorder(),
        )
        pipeline.train(run, tmp_path / "store" / "cifar" / "1")
        assert recorder.said[-1] == said


@pytest.mark.parametrize("steps, rate, warned", [(5, 1e-6, True), (5, 2.0, False), (0, 2.0, False)])
def test_a_mask_that_masks_nothing_is_said_unless_that_was_asked_for(
    steps: int, rate: float, warned: bool, tmp_path: Path, cifar: list[Image.Image]
) -> None:
    settings = recipe(flat(cifar, tmp_path / "photos", 40), clusters=0, steps=steps, lr=rate)
    pipeline.train(begin(tmp_path / "run", settings, recorder := Recorder()), tmp_path / "store" / "small" / "1")
    assert any("has switched no weight off" in line for line in recorder.said) == warned
