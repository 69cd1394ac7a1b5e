"""The training loop: killed at any moment and started again it ends the same; what goes wrong is said."""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model.preprocessing import Preprocessing
from tests.helpers.paths import DATA, ROOT
from training.checkpoint import CHECKPOINT, DONE
from training.curve import CURVE, Curve, problems
from training.loop import fit, generator, seed_everything
from training.masking import MaskedModel, mask_backbone
from training.objectives import Batch, SelfSupervised, Supervised
from training.recipe import Recipe

pytestmark = pytest.mark.slow

RECIPE = Recipe(
    "",
    size=32,
    batch=16,
    lr=0.05,
    local_crops=1,
    prototypes=30,
    projection=16,
    queue=48,
    queue_from=0.3,
    freeze_prototypes=0.2,
    train_norms=True,
    head_lr=0.15,
)
STEPS, EVERY = 14, 3


@pytest.fixture(scope="module")
def pixels(cifar: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in cifar[:100]])


def train(
    folder: Path, pixels: np.ndarray, recipe: Recipe, labels: np.ndarray | None = None, **options: object
) -> MaskedModel:
    """A run of the loop on a small ResNet; with labels a supervised one."""
    backbone = backbones.load("test_resnet", "random:0")
    model = mask_backbone(
        backbone,
        2,
        initial=recipe.initial,
        threshold=recipe.threshold,
        train_norms=recipe.train_norms,
        amp=recipe.amp,
    )
    preprocessing = Preprocessing.of(backbone.config, 32)
    seed_everything(recipe.seed)
    if labels is None:
        objective: SelfSupervised | Supervised = SelfSupervised(recipe, backbone.features, preprocessing)
    else:
        objective = Supervised(recipe, backbone.features, preprocessing, labels)
    settings = {"every": EVERY} | options
    fit("a mask", model, objective, pixels, recipe, STEPS, folder, **settings)  # type: ignore[arg-type]
    return model


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of the curve, but for how fast it was."""
    found = [json.loads(line) for line in (folder / CURVE).read_text().splitlines()]
    assert all(line.pop("steps_per_s", 1) > 0 for line in found)
    return found


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


# Killed and started again

# One process imports everything and forks a child for each start, which is what makes many of them affordable.
# It kills them with SIGKILL: some while they compute, after a random number of steps and a random while,
# others in the midst of a write: at a sync, or right before or after a rename or a removal. A child that is to be
# killed waits for it some steps later: it must not get to its end where the machine has no time for the killer.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from tests.training.test_loop import RECIPE, STEPS, replace, train

folder, pixels, plan = Path(sys.argv[1]), np.load(sys.argv[2]), json.loads(sys.argv[3])
recipe = replace(RECIPE, **plan["recipe"])
labels = np.arange(len(pixels)) % 10 if plan["supervised"] else None
random.seed(plan["seed"])

def start(trap=None, folder=folder, most=STEPS + 1):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        if trap:
            owner, name, count, before = trap
            owner = {"os": os, "Path": Path}[owner]
            real, calls = getattr(owner, name), [0]
            def caught(*arguments, **more):
                calls[0] += 1
                if calls[0] == count and before: os.kill(os.getpid(), signal.SIGKILL)
                out = real(*arguments, **more)
                if calls[0] == count: os.kill(os.getpid(), signal.SIGKILL)
                return out
            setattr(owner, name, caught)
        left = [most]
        def watch(*_):
            os.write(tell, b".")
            left[0] -= 1
            if not left[0]: signal.pause()
        try:
            train(folder, pixels, recipe, labels, watch=watch)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    os.close(tell)
    return child, told

def end(child, told):
    status = os.waitpid(child, 0)[1]
    os.close(told)
    return -signal.SIGKILL if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

ends = [end(*start(folder=folder.with_name("undisturbed")))]
for steps in plan["steps"]:
    child, told = start(most=steps + 2)
    seen = 0
    while seen < steps and os.read(told, 1):
        seen += 1
    time.sleep(random.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    ends.append(end(child, told))
for trap in plan["traps"]:
    ends.append(end(*start(trap)))
ends.append(end(*start()))
print(json.dumps(ends))
"""


@pytest.mark.parametrize(
    ("settings", "steps", "traps", "supervised"),
    [
        ({"optimizer": "adam"}, [4, 2, 5], [["os", "fsync", 3, True], ["Path", "replace", 1, False]], False),
        ({"optimizer": "sgd", "lr": 50.0}, [1, 4], [["Path", "replace", 2, True], ["Path", "unlink", 1, True]], False),
        (
            {"optimizer": "sgd", "lr": 50.0, "train_norms": False, "amp": "fp16"},
            [5],
            [["Path", "unlink", 1, False]],
            True,
        ),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_masks(
    settings: dict[str, object],
    steps: list[int],
    traps: list[list[object]],
    supervised: bool,
    pixels: np.ndarray,
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "pixels.npy", pixels)
    plan = json.dumps({"recipe": settings, "steps": steps, "traps": traps, "supervised": supervised, "seed": 0})
    command = [sys.executable, "-c", KILLER, str(tmp_path / "killed"), str(tmp_path / "pixels.npy"), plan]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, *[-9] * len(steps + traps), 0]
    undisturbed, resumed = ((tmp_path / name / DONE).read_bytes() for name in ("undisturbed", "killed"))
    assert resumed == undisturbed
    assert steps_of(tmp_path / "killed") == list(range(STEPS))
    assert lines(tmp_path / "killed") == lines(tmp_path / "undisturbed")
    assert {p.name for p in (tmp_path / "killed").iterdir()} <= {DONE, CURVE, CHECKPOINT}, "temporary files stayed"


def test_the_masks_depend_on_the_seed_and_on_nothing_else(pixels: np.ndarray, tmp_path: Path) -> None:
    runs = {"first": RECIPE, "again": RECIPE, "other": replace(RECIPE, seed=1)}
    for name, recipe in runs.items():
        torch.rand(3)  # whatever the process has drawn before
        train(tmp_path / name, pixels, recipe)
    first, again, other = ((tmp_path / name / DONE).read_bytes() for name in runs)
    assert first == again and first != other


def test_every_key_of_a_generator_has_numbers_of_its_own() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 64, 32), (1, 64, 32), (1, 128, 32)]
    drawn = [torch.rand(4, generator=generator(*key)) for key in keys]
    assert len({tuple(d.tolist()) for d in drawn}) == len(keys)
    assert torch.equal(drawn[1], torch.rand(4, generator=generator(0, 1)))


def test_seeds_and_steps_have_crops_of_their_own(pixels: np.ndarray, tmp_path: Path) -> None:
    """On the same images in the same order: what differs between seeds is not only what is drawn before the loop."""
    first: dict[int, list[list[float]]] = {}

    class Spy(SelfSupervised):
        def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
            (generator,) = batch.generators
            first.setdefault(self.recipe.seed, []).append(torch.rand(3, generator=generator).tolist())
            return super().loss(model, batch)

    backbone = backbones.load("test_resnet", "random:0")
    for seed in (0, 1):
        objective = Spy(replace(RECIPE, seed=seed), backbone.features, Preprocessing.of(backbone.config, 32))
        fit("m", mask_backbone(backbone, 2), objective, pixels, objective.recipe, 3, tmp_path / str(seed))
    assert len({tuple(numbers) for drawn in first.values() for numbers in drawn}) == 6


def test_a_finished_training_is_taken_over_as_it_is(pixels: np.ndarray, tmp_path: Path) -> None:
    model = train(tmp_path, pixels, RECIPE)
    before = (tmp_path / DONE).stat()
    again = train(tmp_path, pixels, RECIPE)
    assert (tmp_path / DONE).stat().st_mtime_ns == before.st_mtime_ns
    assert all(torch.equal(s, again.scores[n]) for n, s in model.scores.items())
    assert all(torch.equal(b, again.norms[n]) for n, b in model.norms.items())
    assert not (tmp_path / CHECKPOINT).exists()


# What moves


LEARNS = [
    {"optimizer": "adam", "lr": 0.2},
    {"optimizer": "sgd", "lr": 50.0},
    {"optimizer": "rms-sgd", "lr": 0.05},
    {"optimizer": "adam", "lr": 0.2, "amp": "bf16"},
    {"optimizer": "adam", "lr": 0.2, "amp": "fp16"},
]


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((0.5, 0.9, 0.7, 0.6), 1), ((0.5, 0.9, 0.89, 0.7), 2), ((0.6, 0.7, 0.66, 0.62), 2), ((0.8, 0.79, 0.75, 0.8), 3)],
)
def test_the_last_checkpoint_within_an_error_of_the_best_is_kept(
    scores: tuple[float, ...], kept: int, pixels: np.ndarray, tmp_path: Path
) -> None:
    checkpoints, left = [], iter(scores)
    model: MaskedModel

    def validate() -> tuple[float, float]:
        checkpoints.append({n: p.detach().clone() for n, p in model.learned.items()})
        return next(left), 0.05

    backbone = backbones.load("test_resnet", "random:0")
    model = mask_backbone(backbone, 2)
    objective = SelfSupervised(RECIPE, backbone.features, Preprocessing.of(backbone.config, 32))
    fit("a mask", model, objective, pixels, RECIPE, STEPS, tmp_path, validate=validate)
    equal = [all(p.equal(checkpoint[n]) for n, p in model.learned.items()) for checkpoint in checkpoints]
    assert equal == [n == kept for n in range(len(scores))]


@pytest.mark.parametrize("settings", LEARNS)
def test_it_learns(settings: dict[str, object], pixels: np.ndarray, tmp_path: Path) -> None:
    """With real labels the loss falls, though nothing but masks, statistics and a head can move."""
    labels = np.array(json.loads((DATA / "cifar10.json").read_text())["labels"])[:100]
    recipe = replace(RECIPE, head_lr=0.05, head_steps=0, **settings)  # type: ignore[arg-type]
    model = train(tmp_path, pixels, recipe, labels)
    losses = [json.loads(line)["loss"] for line in (tmp_path / CURVE).read_text().splitlines()]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
    assert any(bool((s <= recipe.threshold).any()) for s in model.scores.values()), "no bit has flipped"


def test_rate_zero_moves_no_score(pixels: np.ndarray, tmp_path: Path) -> None:
    model = train(tmp_path, pixels, replace(RECIPE, train_norms=False), lr=0.0)
    assert all(bool((s == 1).all()) for s in model.scores.values())
    assert all(torch.equal(b, model.backbone.norms[n]) for n, b in model.norms.items())


def test_the_rate_falls_as_a_cosine_to_zero(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *arguments: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(tmp_path, pixels, replace(RECIPE, optimizer="sgd", lr=50.0))
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))
    np.testing.assert_allclose(seen[0::2], 50 * cosine)  # the scores'
    np.testing.assert_allclose(seen[1::2], RECIPE.head_lr * cosine)  # head's and prototypes'


def test_sgd_has_momentum_and_scores_have_no_weight_decay(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    real = torch.optim.Optimizer.__init__

    def spy(self: torch.optim.Optimizer, *arguments: object, **more: object) -> None:
        made.append(self)
        real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", spy)
    for kind in ("adam", "sgd"):
        train(tmp_path / kind, pixels, replace(RECIPE, optimizer=kind), lr=0.1)
    groups = [group for optimizer in made for group in optimizer.param_groups]
    decays = {group["initial_lr"]: group["weight_decay"] for group in groups}
    assert len(groups) == 4 and decays == {0.1: 0, RECIPE.head_lr: RECIPE.head_decay}
    assert [(g["momentum"], g["nesterov"]) for g in groups if "momentum" in g] == [(0.9, False)] * 3


def test_only_the_given_images_are_trained_on(pixels: np.ndarray, tmp_path: Path) -> None:
    rows = np.arange(3, 40, 2)
    seen: list[np.ndarray] = []

    class Spy(SelfSupervised):
        def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
            seen.append(batch.rows)
            assert torch.equal(batch.pixels, torch.from_numpy(images[batch.rows]))
            return super().loss(model, batch)

    images, backbone = pixels, backbones.load("test_resnet", "random:0")
    objective = Spy(RECIPE, backbone.features, Preprocessing.of(backbone.config, 32))
    fit("a mask", mask_backbone(backbone, 2), objective, pixels, RECIPE, 4, tmp_path, rows=rows)
    assert set(np.concatenate(seen)) <= set(rows) and len(np.concatenate(seen)) == 4 * 16


# What goes wrong


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stays(pixels: np.ndarray, tmp_path: Path) -> None:
    class Breaks(SelfSupervised):
        def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
            return super().loss(model, batch) * (torch.nan if batch.progress > 0.5 else 1)

    backbone = backbones.load("test_resnet", "random:0")
    objective = Breaks(RECIPE, backbone.features, Preprocessing.of(backbone.config, 32))
    with pytest.raises(
        CascadeError, match=r"loss of expert-3 became nan at step 8: .* lower --lr \(now 0.05\)"
    ) as told:
        fit("expert-3", mask_backbone(backbone, 2), objective, pixels, RECIPE, STEPS, tmp_path, every=EVERY)
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)
    assert not (tmp_path / DONE).exists()
    kept = load_file(tmp_path / CHECKPOINT)
    assert all(bool(t.isfinite().all()) for t in kept.values())
    assert steps_of(tmp_path)[-1] == 7


def test_an_update_that_is_not_finite_is_noticed_before_it_is_stored(pixels: np.ndarray, tmp_path: Path) -> None:
    """The first step's loss is finite, its update is not; with a checkpoint after each step none of it is kept."""
    with pytest.raises(CascadeError, match="became NaN or infinite after step 0: .* lower --lr"):
        train(tmp_path, pixels, replace(RECIPE, head_lr=float("inf")), every=1)
    assert not (tmp_path / CHECKPOINT).exists() and not (tmp_path / DONE).exists()


@pytest.fixture
def heard() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def test_warns_once_of_each_tensor_with_less_than_5_percent_active(
    pixels: np.ndarray, tmp_path: Path, heard: list[warnings.WarningMessage]
) -> None:
    model = train(tmp_path, pixels, replace(RECIPE, initial=-1.0, lr=0.001))
    *texts, collapse = sorted((str(w.message) for w in heard), key=lambda text: "prototypes" in text)
    assert "step 2: the images are nearest to " in collapse and "100% of a batch to the same one" in collapse
    assert len(texts) == len(set(texts)) == len(model.scores)
    assert all("only 0.0% of layer" in t and t.endswith("lower --lr") for t in texts)
    told = [line for line in lines(tmp_path) if "warnings" in line]
    assert [line["step"] for line in told] == [2, 5, 8, 11, 13], "the curve tells it as long as it lasts"
    assert all(line["warnings"].keys() == model.scores.keys() | {"embedding"} for line in told)


def test_a_collapse_is_judged_by_what_so_many_images_can_show() -> None:
    model = mask_backbone(backbones.load("test_resnet", "random:0"), 2)
    recipe = replace(RECIPE, prototypes=500)
    for nearest, largest, images, collapsed in (
        (14.0, 0.1, 16, False),  # two batches of eight: all different
        (14.0, 0.1, 3200, True),
        (240.0, 0.05, 3200, False),
        (240.0, 0.9, 3200, True),  # each batch is one point, which wanders
        (1.5, 0.7, 16, True),
    ):
        line = {"step": 49, "nearest": nearest, "largest": largest}
        assert ("embedding" in problems(model, line, recipe, images)) == collapsed, line


def test_what_is_told_of_the_prototypes() -> None:
    """By hand: two batches of four images; codes even, six images nearest to one prototype and two to another."""
    backbone = backbones.load("test_resnet", "random:0")
    objective = SelfSupervised(RECIPE, backbone.features, Preprocessing.of(backbone.config, 32))
    eye = torch.eye(RECIPE.prototypes)
    for nearest in ([0, 0, 0, 0], [1, 0, 1, 0]):
        objective._count(eye[:4], eye[nearest])
    assert objective.facts() == {"used": 4.0, "nearest": 1.8, "largest": 0.75}
    assert objective.facts()["largest"] == 0, "it begins again"


def test_does_not_warn_of_dense_masks(pixels: np.ndarray, tmp_path: Path, heard: list[warnings.WarningMessage]) -> None:
    train(tmp_path, pixels, RECIPE)
    assert [str(w.message) for w in heard] == []


def test_warns_at_the_end_of_a_training_without_checkpoints(
    pixels: np.ndarray, tmp_path: Path, heard: list[warnings.WarningMessage]
) -> None:
    train(tmp_path, pixels, replace(RECIPE, initial=-1.0, lr=0.001), every=1000)
    assert heard


# A loss that rises


def test_a_head_rate_that_is_too_high_is_named(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.jsonl", 0)
    rates = {"scores": 0.02, "channels": 0.002, "head": 0.5}
    with pytest.raises(
        CascadeError, match=r"rose from 2.3 to 9 in 40 steps, while only the head .* --head-lr \(now 0.5\)"
    ):
        for step in range(100):
            curve.write({"step": step, "loss": 2.3 if step < 20 else 9.0})
            curve.check_rise("m", 100, rates)
    curve.close()


def test_rates_of_the_network_that_are_too_high_are_named(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.jsonl", 0)
    rates = {"scores": 0.02, "channels": 0.002, "head": 0.001}
    with pytest.raises(CascadeError, match=r"began to train: lower --lr \(now 0.02\) and --channel-lr \(now 0.002\)"):
        for step in range(100):
            curve.write({"step": step, "loss": 2.3 if step < 20 else 9.0})
            curve.check_rise("m", 10, rates)
    curve.close()


def test_a_loss_that_falls_or_wavers_is_left_alone(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "curve.jsonl", 0)
    for step in range(100):
        curve.write({"step": step, "loss": 2.3 + 0.8 * (step % 2) - step / 100})
        curve.check_rise("m", 10, {"scores": 0.02, "head": 0.001})
    curve.close()
