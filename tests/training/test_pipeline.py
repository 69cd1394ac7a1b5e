"""All stages in a row, in every shape that a bundle can have; and what stops them says so in one line."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from cascade.bundle.format import Bundle, check, read, strip_prefix
from cascade.cli.main import app
from cascade.engine.engine import Engine
from cascade.engine.results import Options, Prediction
from cascade.errors import CascadeError
from cascade.kernels.materialize import materialize
from cascade.model import masks
from cascade.model.fusion import MODES
from training import (
    clusters,
    comparison,
    dispatcher,
    distilled_experts,
    embed,
    evaluate,
    experts,
    export,
    fusion,
    pipeline,
)
from training.cli import Watch, start
from training.finetune import features
from training.frozen import Candidate
from training.masking import MaskedModel
from training.objectives import SelfSupervised
from training.recipe import Recipe
from training.run import CLUSTERS, Run, begin, resume
from training.tuned import tune_backbone

pytestmark = pytest.mark.slow

LITE0 = {"backbone": "tf_efficientnet_lite0", "source": "", "mask_from": "blocks.6"}
OPTIONS = {
    "backbone": "test_efficientnet",
    "source": "random:0",
    "size": 32,
    "mask_from": "blocks.3",
    "steps": 6,
    "expert_steps": 4,
    "batch": 32,
    "lr": 0.3,
    "local_crops": 0,
    "prototypes": 40,
    "objective": "swav",
    "clusters": 3,
    "router": "centroid",
    "dim": 16,
    "bank": 50,
    "neighbors": 5,
}


@pytest.fixture(scope="module", autouse=True)
def threads_are_started() -> None:
    """The swap's kernel, when it first runs, sets the number of threads for all; from then on it is the same."""
    run = Run(Path(), recipe(Path()), Watch(None))
    n = run.backbone.weights.numel()
    materialize(run.backbone, masks.Mask("all", 0, masks.pack(torch.ones(n, dtype=torch.bool))))


def recipe(folder: Path, **changes: object) -> Recipe:
    return Recipe(str(folder), **OPTIONS | changes)  # type: ignore[arg-type]


class Ear(Watch):
    """Keeps what is said to a person."""

    def __init__(self) -> None:
        super().__init__(None)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def train(root: Path, recipe: Recipe, **more: bool) -> Path:
    return pipeline.train(begin(root / "run", recipe, Watch(None)), root / "store" / "small" / "1", **more)


def content(bundle: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(bundle.iterdir())}


def predict(bundle: Bundle, images: list[Image.Image], mode: str | None = None) -> list[Prediction]:
    engine = Engine()
    engine.add(bundle)
    answers = engine.predict(images, Options(mode=mode, embedding=True))
    assert all(isinstance(a, Prediction) for a in answers), answers
    return answers  # type: ignore[return-value]


def flat(cifar: list[Image.Image], folder: Path, count: int) -> Path:
    """Photos without class folders."""
    folder.mkdir(parents=True)
    for i, image in enumerate(cifar[:count]):
        image.save(folder / f"{i:04d}.png")
    return folder


# Every shape of a cascade


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
    run = begin(tmp_path / "run", recipe(cifar_folder, **options), Ear())
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
    ear = Ear()
    options = {"objective": "distill", "adapt": "both", "lr": 0.02, "steps": 80, "clusters": 2}
    run = begin(tmp_path / "run", recipe(cifar_folder, **options), ear)
    measured = distilled_experts.compare
    monkeypatch.setattr(distilled_experts, "compare", lambda *a: measured(*a) | {"serves": better})
    bundle = read(pipeline.train(run, tmp_path / "store" / "cifar" / "1"))
    (said,) = (line for line in ear.said if "distance to the teacher, experts remove" in line)
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
    ear = Ear()
    options = {"labels": True, "adapt": "both", "lr": 0.2, "steps": 12, "clusters": 2, "bank": 0}
    run = begin(tmp_path / "run", recipe(cifar_folder, **options), ear)
    out = pipeline.train(run, tmp_path / "store" / "cifar" / "1")
    bundle = read(out)
    facts = bundle.card.accuracy
    assert [*facts["rows"]] == ["frozen backbone, linear head", "one mask for all clusters", "an expert per cluster"]
    assert facts["steps"] == {"experts": 12, "each": 6} and facts["serves"] == better
    assert any("experts against one mask for the same 12 steps" in line for line in ear.said)
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


# The same inputs, the same bytes


@pytest.fixture(scope="module")
def once(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was made in one go."""
    return train(tmp_path_factory.mktemp("once"), recipe(cifar_folder, router="gmm"))


def test_same_inputs_same_bytes_wherever_they_lie(once: Path, cifar_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(cifar_folder, tmp_path / "elsewhere" / cifar_folder.name)
    again = train(tmp_path, recipe(moved, router="gmm"))
    assert content(again) == content(once) and len(content(once)) == 8


def module(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m training.<name>`` in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, f"training.{name}", raising=False)  # it may run more than once
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"training.{name}", run_name="__main__")
    assert not end.value.code


def test_stage_by_stage_gives_what_all_in_a_row_give(
    once: Path, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "store" / "small" / "1"
    options = [[f"--{n.replace('_', '-')}", v] for n, v in (OPTIONS | {"router": "gmm"}).items()]
    module("dispatcher", cifar_folder, "--run", run, *sum(options, []), monkeypatch=monkeypatch)
    module("clusters", "--run", run, monkeypatch=monkeypatch)
    for some in (("2",), ("0", "1")):  # in any order, by whomever
        only = [word for number in some for word in ("--only", number)]
        module("experts", "--run", run, *only, monkeypatch=monkeypatch)
    module("evaluate", "--run", run, monkeypatch=monkeypatch)
    module("export", "--run", run, "--out", out, monkeypatch=monkeypatch)
    assert content(out) == content(once)


def test_stopped_at_every_stage_it_goes_on_to_the_same_bytes(
    once: Path, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for stage, name in ((clusters, "fit"), (experts, "train"), (evaluate, "evaluate"), (export, "export")):
        with monkeypatch.context() as patch:
            patch.setattr(stage, name, stop)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path, recipe(cifar_folder, router="gmm"))
    assert content(train(tmp_path, recipe(cifar_folder, router="gmm"))) == content(once)


# Broken images


def test_trains_on_the_rest_and_names_what_it_left_out(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(cifar_folder, tmp_path / "photos")
    whole = (folder / "train" / "cat").glob("*.png").__next__().read_bytes()
    bad = {"cat/text.jpg": b"no image at all", "dog/cut.png": whole[: len(whole) // 2], "ship/none.webp": b""}
    for name, raw in bad.items():
        (folder / "train" / name).write_bytes(raw)
    (folder / "test" / "cat" / "half.jpeg").write_bytes(whole[:200])
    bundle = read(train(tmp_path, recipe(folder)))
    assert bundle.card.training["images"] == 240
    names = {f"train/{name}" for name in bad}
    assert all(name in caplog.text for name in names)
    kept = {split: json.loads((tmp_path / "run" / f"{split}.json").read_text()) for split in ("train", "test")}
    assert set(kept["train"]["broken"]) == names and kept["train"]["images"] == 240
    assert set(kept["test"]["broken"]) == {"test/cat/half.jpeg"} and kept["test"]["images"] == 60
    assert all("\n" not in reason and reason for part in kept.values() for reason in part["broken"].values())


def test_a_class_whose_training_images_are_all_broken_keeps_its_place(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image]
) -> None:
    folder = shutil.copytree(cifar_folder, tmp_path / "photos")
    for path in (folder / "train" / "bird").iterdir():
        path.write_bytes(b"")
    bundle = read(train(tmp_path, recipe(folder, clusters=0)))
    assert bundle.card.classes[2] == "bird" and bundle.linear["dispatcher"].weight.shape == (10, 16)
    scores = {label.name: label.score for a in predict(bundle, cifar[:20]) for label in a.labels}
    assert scores.get("bird", 0) == 0 and "ship" in scores


def test_many_broken_images_are_all_in_the_file(tmp_path: Path, cifar: list[Image.Image]) -> None:
    folder = flat(cifar, tmp_path / "photos", 40)
    for i in range(60):
        (folder / f"bad-{i}.jpg").write_bytes(b"?")
    run = begin(tmp_path / "run", recipe(folder, clusters=0), Watch(None))
    broken = {name for images in (run.images, run.held_out) for name, _ in images.broken}
    written = [json.loads((run.folder / f"{split}.json").read_text())["broken"] for split in ("train", "test")]
    assert broken == set(written[0]) | set(written[1]) == {f"bad-{i}.jpg" for i in range(60)}


# What stops it


def command(*arguments: object) -> str:
    """The error of ``cascade train``: one line, exit status 1."""
    with pytest.raises(SystemExit) as told:
        start(pipeline.command, [str(a) for a in arguments])
    line = str(told.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


def options_of(root: Path, **changes: object) -> list[object]:
    flags = [[f"--{n.replace('_', '-')}", v] for n, v in (OPTIONS | changes).items()]
    return ["--run", root / "run", "--out", root / "store" / "small" / "1", *sum(flags, [])]


def empty(root: Path, cifar: list[Image.Image]) -> Path:
    (root / "photos").mkdir()
    return root / "photos"


def nothing(root: Path, cifar: list[Image.Image]) -> Path:
    return root / "photos"


def few(root: Path, cifar: list[Image.Image]) -> Path:
    return flat(cifar, root / "photos", 20)


def enough(root: Path, cifar: list[Image.Image]) -> Path:
    return flat(cifar, root / "photos", 60)


def all_broken(root: Path, cifar: list[Image.Image]) -> Path:
    for path in flat(cifar, root / "photos", 60).iterdir():
        path.write_bytes(path.read_bytes()[:50])
    return root / "photos"


def one_class(root: Path, cifar: list[Image.Image]) -> Path:
    flat(cifar[:60], root / "photos" / "train" / "cat", 60)
    flat(cifar[60:], root / "photos" / "test" / "dog", 10)
    return root / "photos"


def one_test_image(root: Path, cifar: list[Image.Image]) -> Path:
    flat(cifar, root / "photos" / "train", 60)
    flat(cifar[60:], root / "photos" / "test", 1)
    return root / "photos"


@pytest.mark.parametrize(
    ("folder", "changes", "says"),
    [
        (empty, {}, "no train images in .*photos: put JPEG, PNG or WebP files there"),
        (nothing, {}, "photos is not a folder: name a folder of images"),
        (few, {}, "16 training images are too few for 3 clusters of 16: add some, or lower --clusters"),
        (few, {"clusters": 0, "limit": 12}, "12 training images are too few for a mask, which needs 16: add some$"),
        (all_broken, {}, "none of the 48 train images in .*photos can be read; .*png: "),
        (one_class, {}, "all training images are in the class folder cat"),
        (one_test_image, {}, "1 test image is too few to calibrate with"),
        (enough, {"mask_from": "layer4"}, "test_efficientnet has no stage 'layer4'; choose 0-6 or: stem blocks.0"),
        (enough, {"backbone": "test_convnext", "mask_from": "norm_pre"}, "nothing to mask from norm_pre on: choose an"),
        (
            enough,
            {"backbone": "test_vit", "size": 160, "mask_from": "-3", "local_crops": 2},
            r"test_vit can't take images of 72 px \(.*\): try another --size, or --local-crops 0",
        ),
        (enough, {"expert_from": "blocks.1"}, "--expert-from is before --mask-from"),
        (enough, {"expert_from": "conv_head", "draws": 2}, "leave --expert-from out, or --draws"),
        (enough, {"backbone": "resnet-five-hundred"}, "timm knows no model 'resnet-five-hundred'"),
        (enough, {"prototypes": 2, "router": "prototypes"}, "2 prototypes can't form 3 clusters"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(
    folder: Callable[[Path, list[Image.Image]], Path],
    changes: dict[str, object],
    says: str,
    tmp_path: Path,
    cifar: list[Image.Image],
) -> None:
    import re

    line = command(folder(tmp_path, cifar), *options_of(tmp_path, **changes))
    assert re.search(says, line), line
    assert not (tmp_path / "store").exists()
    if "prototypes" not in says:
        assert not (tmp_path / "run" / "dispatcher").exists(), "nothing was trained for it"


def test_labels_are_asked_for_where_there_are_none(tmp_path: Path, cifar: list[Image.Image]) -> None:
    line = command(enough(tmp_path, cifar), *options_of(tmp_path), "--labels")
    assert "photos has no class folders: omit --labels" in line


def test_a_version_that_exists_is_found_before_anything_is_trained(
    once: Path, cifar_folder: Path, tmp_path: Path
) -> None:
    line = command(cifar_folder, "--run", tmp_path / "run", "--out", once)
    assert "exists and versions are never overwritten: choose a new version" in line
    assert not (tmp_path / "run" / "dispatcher").exists()


def test_folders_that_cannot_be_written_are_found_before_anything_is_trained(
    cifar_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for place in ("--out", "--run"):
        line = command(
            cifar_folder, "--run", tmp_path / "run", "--out", tmp_path / "a" / "1", place, tmp_path / "file/b"
        )
        assert "file" in line and ("choose another --out" in line or "choose writable folders" in line)
    assert not (tmp_path / "run" / "dispatcher").exists()


def test_another_recipe_in_the_same_folder_is_refused(once: Path, cifar_folder: Path) -> None:
    run, done = once.parents[2] / "run", once.parents[2] / "run" / "dispatcher" / "done.safetensors"
    before = done.read_bytes()
    with pytest.raises(CascadeError, match="started with other settings; choose another --run folder"):
        begin(run, recipe(cifar_folder, router="gmm", lr=0.7), Watch(None))
    assert done.read_bytes() == before


def test_other_images_in_the_same_run_are_refused(tmp_path: Path, cifar: list[Image.Image]) -> None:
    folder = flat(cifar, tmp_path / "photos", 60)
    settings = recipe(folder, clusters=0)
    dispatcher.train(begin(tmp_path / "run", settings, Watch(None)))
    cifar[70].save(folder / "another.png")
    with pytest.raises(
        CascadeError, match="images of .*photos are not those that .*run was started with: put them back"
    ):
        train(tmp_path, settings)
    (folder / "another.png").unlink()
    assert read(train(tmp_path, settings)).card.training["images"] == 48


def test_a_stage_without_the_one_before_says_which(tmp_path: Path, cifar: list[Image.Image]) -> None:
    settings = recipe(enough(tmp_path, cifar), clusters=2)
    run = begin(tmp_path / "run", settings, Watch(None))
    with pytest.raises(CascadeError, match=r"dispatcher/done.safetensors does not exist yet: train dispatcher first"):
        clusters.fit(run)
    with pytest.raises(CascadeError, match=r"clusters.safetensors does not exist yet: run python -m training.clusters"):
        experts.train(run)
    with pytest.raises(CascadeError, match="no run at .*: start it with python -m training.dispatcher"):
        resume(tmp_path / "another", Watch(None))


# As commands


@pytest.mark.parametrize("name", ["dispatcher", "clusters", "experts", "evaluate", "export", "pipeline"])
def test_every_stage_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module(name, "--help", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "--run" in shown
    assert ("--mask-from" in shown) == (name in ("dispatcher", "pipeline"))


def test_cascade_train_has_the_pipelines_options() -> None:
    done = CliRunner().invoke(app, ["train", "--help"])
    assert done.exit_code == 0 and "--mask-from" in done.stdout and "--controls" in done.stdout


def test_the_budget_is_said_before_the_first_step(cifar_folder: Path, tmp_path: Path) -> None:
    run = begin(tmp_path, replace(recipe(cifar_folder), expert_from="conv_head"), ear := Ear())
    pipeline.budget(run, controls=True)
    assert ear.said == [
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
            tmp_path / str(steps), recipe(cifar_folder, objective="distill", clusters=0, steps=steps), ear := Ear()
        )
        pipeline.train(run, tmp_path / "store" / "cifar" / "1")
        assert ear.said[-1] == said


@pytest.mark.parametrize("steps, rate, warned", [(5, 1e-6, True), (5, 2.0, False), (0, 2.0, False)])
def test_a_mask_that_masks_nothing_is_said_unless_that_was_asked_for(
    steps: int, rate: float, warned: bool, tmp_path: Path, cifar: list[Image.Image]
) -> None:
    settings = recipe(flat(cifar, tmp_path / "photos", 40), clusters=0, steps=steps, lr=rate)
    pipeline.train(begin(tmp_path / "run", settings, ear := Ear()), tmp_path / "store" / "small" / "1")
    assert any("has switched no weight off" in line for line in ear.said) == warned
