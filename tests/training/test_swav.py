"""SwAV's pieces against plain float64 references, on the scores of real photos."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.model import backbone as backbones
from cascade.model.preprocessing import Preprocessing
from training import objectives
from training.loop import fit, seed_everything
from training.masking import MaskedModel, mask_backbone
from training.objectives import Batch, SelfSupervised
from training.recipe import Recipe
from training.swav import Projector, push, sinkhorn, swapped_loss

RECIPE = Recipe("", size=32, batch=16, local_crops=0, prototypes=30, projection=16, queue=40)


@pytest.fixture(scope="module")
def pixels(cifar: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in cifar[:64]])


@pytest.fixture(scope="module")
def scores(pixels: np.ndarray) -> list[Tensor]:
    """z . c of two views (the photos and their mirror images), float32 [64, 30] each."""
    torch.manual_seed(0)
    projector = Projector(3 * 32 * 32, 16, 30)
    photos = torch.from_numpy(pixels).float() / 255 - 0.5
    with torch.no_grad():
        return [projector(x.flatten(1)) @ projector.prototypes.T for x in (photos, photos.flip(-1))]


def reference(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """The authors' algorithm, element by element in float64: Q [prototypes, images]."""
    q = np.exp(scores.astype(np.float64).T / epsilon)
    prototypes, images = q.shape
    q /= q.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] /= q[k].sum() * prototypes
        for i in range(images):
            q[:, i] /= q[:, i].sum() * images
    return (q * images).T


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.05, 1), (0.5, 10)])
def test_sinkhorn_is_the_references(scores: list[Tensor], epsilon: float, iterations: int) -> None:
    expected = reference(scores[0].numpy(), epsilon, iterations)
    np.testing.assert_allclose(sinkhorn(scores[0], epsilon, iterations).numpy(), expected, rtol=1e-4, atol=1e-7)


def test_codes_are_distributions_that_use_every_prototype_alike(scores: list[Tensor]) -> None:
    codes = sinkhorn(scores[0], 0.05, 3)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(64))
    even, plain = torch.full((30,), 64 / 30), (scores[0] / 0.05).softmax(dim=1).sum(dim=0)
    assert (plain - even).abs().max() > 2 * even[0], "a plain softmax must be uneven, or this proves little"
    assert (codes.sum(dim=0) - even).abs().max() < 0.5 * even[0]
    torch.testing.assert_close(sinkhorn(scores[0], 0.05, 200).sum(dim=0), even, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_codes_stay_finite_at_large_scores(scores: list[Tensor], scale: float) -> None:
    lopsided = scores[0] * scale
    lopsided[0] -= 1.9 * scale  # an image that is like no prototype at all
    codes = sinkhorn(lopsided, 0.01, 3)
    assert bool(codes.isfinite().all())
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(64))


def hand_written(scores: Sequence[np.ndarray], codes: Sequence[np.ndarray], temperature: float) -> float:
    terms = []
    for i, code in enumerate(codes):
        for v, other in enumerate(scores):
            if v == i:
                continue
            for q, s in zip(code, other, strict=True):
                logits = s.astype(np.float64) / temperature
                terms.append(-np.dot(q, logits - np.log(np.exp(logits).sum())))
    return float(np.mean(terms))


def test_loss_predicts_each_code_from_every_other_crop(scores: list[Tensor]) -> None:
    local = [scores[0].roll(1, 0), scores[1].roll(2, 0), scores[0].roll(3, 0)]
    codes = [sinkhorn(s, 0.05, 3) for s in scores]
    got = swapped_loss([*scores, *local], codes, 0.1).item()
    expected = hand_written([s.numpy() for s in (*scores, *local)], [c.numpy() for c in codes], 0.1)
    assert got == pytest.approx(expected, rel=1e-5)
    assert swapped_loss(scores, codes, 0.1) < swapped_loss([s.flip(0) for s in scores], codes, 0.1)


def test_no_gradient_flows_into_the_codes() -> None:
    scores = torch.randn(8, 5, requires_grad=True)
    assert not sinkhorn(scores, 0.05, 3).requires_grad


def test_projector_lives_on_the_sphere() -> None:
    torch.manual_seed(0)
    projector = Projector(20, 16, 30)
    torch.testing.assert_close(projector(5 * torch.randn(4, 20)).norm(dim=1), torch.ones(4))
    with torch.no_grad():
        projector.prototypes.mul_(torch.linspace(0.1, 3, 30)[:, None])
    direction = projector.prototypes[7].detach() / projector.prototypes[7].detach().norm()
    projector.renormalize()
    torch.testing.assert_close(projector.prototypes.norm(dim=1), torch.ones(30))
    torch.testing.assert_close(projector.prototypes[7].detach(), direction)


# The queue


def test_the_newest_come_first_and_the_oldest_fall_out() -> None:
    queue = torch.zeros(2, 5, 1)
    for batch in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]):
        queue = push(queue, torch.tensor([batch, [-b for b in batch]])[..., None])
    assert queue[0, :, 0].tolist() == [5, 6, 3, 4, 1]
    assert queue[1, :, 0].tolist() == [-5, -6, -3, -4, -1]


def objective(recipe: Recipe) -> tuple[SelfSupervised, MaskedModel]:
    backbone = backbones.load("test_resnet", "random:0")
    seed_everything(0)
    return SelfSupervised(recipe, backbone.features, Preprocessing.of(backbone.config, 32)), mask_backbone(backbone, 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 16 images a step: 40 places are full after three. Eight steps, from the share 0.5 on it may be used.
        ({"queue_from": 0.5}, [16] * 4 + [56] * 4),
        ({"queue_from": 0.0}, [16] * 3 + [56] * 5),
        ({"queue": 0}, [16] * 8),
    ],
)
def test_codes_see_the_queue_once_it_is_full_and_its_time_has_come(
    settings: dict[str, Any],
    expected: list[int],
    pixels: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, seen = replace(RECIPE, **settings), list[Tensor]()

    def spy(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
        seen.append(scores)
        return sinkhorn(scores, epsilon, iterations)

    monkeypatch.setattr(objectives, "sinkhorn", spy)
    swav, model = objective(recipe)
    fit("m", model, swav, pixels, recipe, 8, tmp_path)
    assert [len(s) for s in seen[0::2]] == [len(s) for s in seen[1::2]] == expected
    for first, second in zip(seen[0::2], seen[1::2], strict=True):
        assert len(first) == 16 or not torch.equal(first[16:], second[16:]), "each view has a queue of its own"


def test_the_queue_holds_each_views_own_features_of_earlier_steps(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    swav, model = objective(replace(RECIPE, queue=32, queue_from=0.0))
    batch, rows, past = torch.from_numpy(pixels[:16]), np.arange(16), list[Tensor]()
    project = swav.module.forward

    def spy(x: Tensor) -> Tensor:
        past.append(project(x))
        return past[-1]

    monkeypatch.setattr(swav.module, "forward", spy)
    model.train()
    for step in range(3):
        queue = swav.module.queue.clone()  # type: ignore[operator]
        for view in range(2):
            earlier = [z.detach().chunk(2)[view] for z in past[::-1]][:2]
            blank = torch.zeros(32 - 16 * len(earlier), 16)
            assert torch.equal(queue[view], torch.cat([*earlier, blank])), (step, view)
        swav.before(step / 3)
        swav.loss(model, Batch(batch, rows, step / 3, [torch.Generator().manual_seed(step)]))


# The prototypes


def test_prototypes_are_frozen_at_first_and_then_move_on_the_sphere(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, seen, heads = replace(RECIPE, freeze_prototypes=0.5), list[Tensor](), list[Tensor]()
    swav, model = objective(recipe)
    begin = swav.module.prototypes.detach().clone()
    before = swav.before

    def spy(progress: float) -> None:
        before(progress)
        seen.append(swav.module.prototypes.detach().clone())
        heads.append(swav.module.head.weight.detach().clone())

    monkeypatch.setattr(swav, "before", spy)
    fit("m", model, swav, pixels, recipe, 8, tmp_path)
    for prototypes in seen:
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(30))
    for prototypes in seen[:5]:  # what step 4 starts with
        torch.testing.assert_close(prototypes, begin)
    assert (seen[5] - begin).abs().max() > 1e-4 and not torch.equal(seen[5], seen[6])
    assert not torch.equal(heads[0], heads[1]), "the head learns from the first step"
