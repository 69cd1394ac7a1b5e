"""Learning a mask: its arithmetic by hand, the copy that learns against the runtime's packed mask, the theorems."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.materialize import materialize
from cascade.model import backbone as backbones
from cascade.model import masks
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask
from cascade.model.preprocessing import Preprocessing
from training import embed
from training.curve import CURVE
from training.loop import fit, seed_everything
from training.masking import MaskedModel, ThresholdMask, active, mask_backbone, select, to_mask
from training.objectives import SelfSupervised
from training.recipe import Recipe

pytestmark = pytest.mark.slow

FAMILIES = [("test_resnet", 64), ("test_efficientnet", 64), ("test_convnext", 64), ("test_vit", 160)]


def load(name: str) -> Backbone:
    return backbones.load(name, "random:0")


def inputs(images: list[Image.Image], side: int, count: int = 8) -> Tensor:
    """Photos as float32 [count, 3, side, side], normalized."""
    photos = [np.asarray(image.resize((side, side))) for image in images[:count]]
    return (torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def scatter(model: MaskedModel, seed: int = 0) -> None:
    """Scores of which about nine in ten are above zero, and other norms than the backbone's."""
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.randn(s.shape, generator=generator) + 1.3 for n, s in model.scores.items()}
    norms = {n: t + 0.1 * torch.rand(t.shape, generator=generator) for n, t in model.norms.items()}
    model.load(scores, norms)


def packed(model: MaskedModel, name: str = "dispatcher") -> Mask:
    return to_mask(name, model.backbone, model.start, dict(model.scores), model.norms)


@torch.no_grad()
def features(model: MaskedModel, x: Tensor) -> Tensor:
    model.model.eval()
    return model.tail(model.trunk(x))


def executor(backbone: Backbone, *layers: Mask) -> PlainExecutor:
    made = PlainExecutor(backbone, WeightCache(2**30))
    for mask in layers:
        made.swap(mask)
    return made


# One tensor


def test_threshold_is_strict() -> None:
    mask = ThresholdMask(torch.ones(2, 2), 1, initial=0.25, threshold=0.25)
    with torch.no_grad():
        mask.scores[0] = torch.tensor([0.25 + 1e-6, 0.3])
    assert torch.equal(mask(torch.ones(2, 2)) > 0, torch.tensor([[True, True], [False, False]]))


def test_alpha_is_the_root_of_the_active_share() -> None:
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    mask = ThresholdMask(weight, 1, initial=1.0, threshold=0.0)
    assert torch.equal(mask(weight), weight)  # all on: the plain weights
    with torch.no_grad():
        mask.scores[0] = -1
    expected = weight / 0.75**0.5
    expected[0] = 0
    torch.testing.assert_close(mask(weight), expected)


def test_a_tensor_that_is_all_off_gives_zeros_and_can_come_back() -> None:
    weight = torch.randn(4, 10)
    mask = ThresholdMask(weight, 1, initial=-1.0, threshold=0.0)
    out = mask(weight)
    assert torch.equal(out, torch.zeros(4, 10))
    out.sum().backward()
    assert mask.scores.grad is not None
    torch.testing.assert_close(mask.scores.grad, weight * 40**0.5)  # alpha of one active weight


def hand_derived(weight: Tensor, active: Tensor, upstream: Tensor) -> Tensor:
    """dL/dM for L = sum(G * W * M / alpha(M)): directly, and through alpha = sqrt(mean(M))."""
    n, share = active.numel(), active.mean()
    direct = upstream * weight / share.sqrt()
    through = -(upstream * weight * active).sum() / (2 * n * share**1.5)
    return direct + through


def test_gradient_is_the_straight_through_one_alpha_included(generator: np.random.Generator) -> None:
    shape = (6, 5, 3, 3)
    weight, upstream, scores = (torch.from_numpy(generator.normal(size=shape)) for _ in range(3))
    mask = ThresholdMask(weight, 1, 0.0, 0.3)
    with torch.no_grad():
        mask.scores.copy_(scores * 100)  # far out: nothing is clipped
    (mask(weight) * upstream).sum().backward()
    active = (scores * 100 > 0.3).double()
    expected = hand_derived(weight, active, upstream)
    assert mask.scores.grad is not None
    torch.testing.assert_close(mask.scores.grad, expected, rtol=1e-12, atol=1e-12)

    # The formula itself against finite differences of L in M, at active and inactive weights.
    def loss(m: Tensor) -> float:
        return float((upstream * weight * m / m.mean().sqrt()).sum())

    for i in (0, 17, 100, 269):
        step = torch.zeros(shape, dtype=torch.float64)
        step.view(-1)[i] = 1e-6
        slope = (loss(active + step) - loss(active - step)) / 2e-6
        assert slope == pytest.approx(float(expected.view(-1)[i]), rel=1e-6)


def test_fused_rows_have_an_alpha_each_and_none_leaks_into_the_others(generator: np.random.Generator) -> None:
    weight, upstream, scores = (torch.from_numpy(generator.normal(size=(12, 7))) for _ in range(3))
    fused = ThresholdMask(weight, 3, 0.0, 0.0)
    shifted = scores + torch.tensor([1.0, 0.0, -1.0]).repeat_interleave(4)[:, None]
    with torch.no_grad():
        fused.scores.copy_(shifted)
    out = fused(weight)
    (out * upstream).sum().backward()
    assert fused.scores.grad is not None
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        active = (shifted[rows] > 0).double()
        torch.testing.assert_close(out[rows], weight[rows] * active / active.mean().sqrt())
        expected = hand_derived(weight[rows], active, upstream[rows])
        torch.testing.assert_close(fused.scores.grad[rows], expected, rtol=1e-12, atol=1e-12)


# A whole backbone


@pytest.mark.parametrize(("name", "side"), FAMILIES)
@pytest.mark.parametrize("start", [0, 3])
def test_the_copy_that_learns_equals_the_packed_mask(
    name: str, side: int, start: int, cifar: list[Image.Image]
) -> None:
    backbone, x = load(name), inputs(cifar, side)
    model = mask_backbone(backbone, start)
    plain = executor(backbone).run(x)
    torch.testing.assert_close(features(model, x), plain, rtol=1e-5, atol=1e-5)  # all on
    scatter(model)
    got = features(model, x)
    torch.testing.assert_close(got, executor(backbone, packed(model)).run(x), rtol=1e-4, atol=1e-4)
    assert (got - plain).norm() > 0.05 * plain.norm(), "the mask must do something, or this proves little"


def test_masked_weights_are_those_of_the_runtime_bit_for_bit() -> None:
    """The same division by alpha, tensor by tensor, the three blocks of a ViT's qkv included."""
    model = mask_backbone(load("test_vit"), 0)
    scatter(model)
    flat = materialize(model.backbone, packed(model))
    modules = dict(model.model.named_modules())
    for name in model.scores:
        path, _, kind = name.rpartition(".")
        pieces = [flat[s.offset : s.end] for s in model.backbone.segments if s.parameter == name]
        assert len(pieces) == (3 if ".qkv." in name else 1)
        torch.testing.assert_close(torch.cat(pieces), getattr(modules[path], kind).flatten(), rtol=1e-6, atol=0)


def test_norms_adapt_from_start_on_only_and_travel_in_the_mask(cifar: list[Image.Image]) -> None:
    backbone = load("test_resnet")
    model = mask_backbone(backbone, backbone.stage("layer3"), train_norms=True)
    model.train()
    training = {n for n, m in model.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and m.training}
    assert training == {n.rpartition(".")[0] for n in model.norms}
    assert all(n.startswith(("layer3.", "layer4.")) for n in training)
    rest = {n: m for n, m in model.model.named_modules() if n not in training and ".parametrizations" not in n}
    assert not any(m.training for m in rest.values())
    model.tail(model.trunk(inputs(cifar, 64)))
    mask = packed(model)
    assert set(mask.norms) == set(model.norms)
    for name, buffer in model.model.named_buffers():
        if name in backbone.norms:
            assert torch.equal(buffer, backbone.norms[name]) == (name not in mask.norms), name
        if name in mask.norms:
            assert torch.equal(mask.norms[name], buffer)
    x = inputs(cifar, 64)
    torch.testing.assert_close(features(model, x), executor(backbone, mask).run(x), rtol=1e-4, atol=1e-4)


def test_norms_in_eval_mode_do_not_move_and_do_not_travel(cifar: list[Image.Image]) -> None:
    model = mask_backbone(load("test_resnet"), 0)
    model.train()
    model.tail(model.trunk(inputs(cifar, 64)))
    assert packed(model).norms == {}


def test_only_scores_and_norms_from_start_on_are_trained(cifar: list[Image.Image], tmp_path: Path) -> None:
    backbone = load("test_efficientnet")
    before = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    start = backbone.stage("blocks.3")
    model = mask_backbone(backbone, start, train_norms=True)
    same = {n: t.clone() for n, t in model.model.state_dict().items()}
    recipe = Recipe(
        "", size=32, local_crops=0, prototypes=20, queue=0, projection=16, optimizer="sgd", lr=500.0, batch=16
    )
    preprocessing = Preprocessing.of(backbone.config, 32)
    fit("m", model, SelfSupervised(recipe, backbone.features, preprocessing), bytes_of(cifar), recipe, 3, tmp_path)
    moved = {n for n, t in model.model.state_dict().items() if not torch.equal(t, same[n])}
    counters = {n for n in same if n.endswith("num_batches_tracked")}
    scores = {n for n in same if n.endswith(".scores")}
    assert moved - counters == scores | set(model.norms)
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())


def test_an_expert_that_starts_deeper_stands_on_the_dispatcher(cifar: list[Image.Image]) -> None:
    backbone, x = load("test_resnet"), inputs(cifar, 64)
    dispatcher = mask_backbone(backbone, 1, train_norms=True)
    scatter(dispatcher)
    mask = packed(dispatcher)
    expert = mask_backbone(backbone, 3, below=mask)
    expert.load(dict(dispatcher.scores), dispatcher.norms)
    assert set(expert.scores) < set(dispatcher.scores)
    run = executor(backbone, mask)
    torch.testing.assert_close(expert.trunk(x), run.run(x, 0, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features(expert, x), features(dispatcher, x), rtol=1e-4, atol=1e-4)
    scatter(expert, seed=1)
    trunk = run.run(x, 0, 3)
    run.swap(packed(expert, "expert-0"))
    torch.testing.assert_close(features(expert, x), run.run(trunk, 3), rtol=1e-4, atol=1e-4)


def test_an_expert_that_starts_deeper_stands_on_the_dispatchers_channels(cifar: list[Image.Image]) -> None:
    backbone, x = load("test_resnet"), inputs(cifar, 64)
    dispatcher = mask_backbone(backbone, 1, adapt="both")
    learned = dispatcher.learned | {n: 1.1 * p.detach() + 0.05 for n, p in dispatcher.channels.items()}
    dispatcher.load(learned, dispatcher.norms)
    mask = to_mask("m", backbone, 1, dict(dispatcher.scores), dispatcher.norms, channels=dispatcher.channels)
    expert = mask_backbone(backbone, 3, below=mask, adapt="both")
    torch.testing.assert_close(expert.trunk(x), executor(backbone, mask).run(x, 0, 3), rtol=1e-4, atol=1e-4)


def test_the_copy_is_made_from_the_pristine_weights_whatever_mask_is_in_place(cifar: list[Image.Image]) -> None:
    backbone, x = load("test_resnet"), inputs(cifar, 64)
    model = mask_backbone(backbone, 1, train_norms=True)
    expected = features(model, x)
    scatter(model)
    executor(backbone, packed(model))
    assert torch.equal(features(mask_backbone(backbone, 1), x), expected)


def test_embedding_under_trained_channels_leaves_the_plain_backbone(cifar: list[Image.Image]) -> None:
    backbone, x = load("test_resnet"), inputs(cifar, 64)
    expected = features(mask_backbone(backbone, 1), x)
    channels = {n: torch.full(shape, 0.5) for n, shape in backbone.channels(1).items()}
    mask = to_mask("m", backbone, 1, {}, {}, channels=channels)
    found = embed.blocks(executor(backbone), [mask], iter([x]))
    assert not np.allclose(found[0], expected.numpy())
    assert torch.equal(features(mask_backbone(backbone, 1), x), expected)


# Theorems 1 and 2


def bytes_of(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


def trained(lr: float, initial: float, threshold: float, pixels: np.ndarray, folder: Path) -> tuple[Tensor, float]:
    """Bits of a ResNet that was trained in float64 with momentum SGD, and the share that is active."""
    recipe = Recipe("", size=32, batch=16, local_crops=1, prototypes=30, projection=16, queue=32, optimizer="sgd")
    recipe = replace(recipe, lr=lr, initial=initial, threshold=threshold)
    network = load("test_resnet").model.double()
    network.get_submodule("conv1").register_forward_pre_hook(lambda _, arguments: (arguments[0].double(),))
    backbone = backbones.wrap(network, "test_resnet", "random:0")
    model = mask_backbone(backbone, 0, initial=initial, threshold=threshold, train_norms=True)
    seed_everything(0)
    objective = SelfSupervised(recipe, backbone.features, Preprocessing.of(backbone.config, 32))
    objective.module.double()
    fit("m", model, objective, pixels, recipe, 12, folder)
    assert all(s.dtype == torch.float64 for s in model.scores.values())
    mask = to_mask("m", backbone, 0, dict(model.scores), model.norms, threshold)
    return mask.bits, masks.density(backbone, mask)


def test_theorems_1_and_2(cifar: list[Image.Image], tmp_path: Path) -> None:
    """Shifting S0 and mu changes nothing; scaling the scores is scaling the learning rate. To the last bit."""
    pixels = bytes_of(cifar[:48])
    bits, active = trained(50, 1.0, 0.0, pixels, tmp_path / "a")
    assert 0.05 < active < 0.999, "some bits must have flipped from all on"
    assert torch.equal(bits, trained(100, 2.5, 0.5, pixels, tmp_path / "b")[0])
    for i, other in enumerate([(100, 1.0, 0.0), (50, 2.5, 0.0), (50, 1.0, 0.5)]):
        assert not torch.equal(bits, trained(*other, pixels, tmp_path / str(i))[0]), other


# Other masks than those of a threshold (appendices E and F)


@pytest.mark.parametrize("share", [0.5, 0.13, 0.0001])
def test_exactly_the_highest_scores_are_active(share: float) -> None:
    backbone = load("test_resnet")
    model = mask_backbone(backbone, 2, share=share)
    generator = torch.Generator().manual_seed(0)
    model.load({n: torch.randn(s.shape, generator=generator) for n, s in model.scores.items()}, {})
    mask = packed_with(model, share=share)
    active = masks.unpack(mask.bits, backbone.weights.numel() - backbone.offset(2))
    for segment, on in masks.split(backbone, 2, active):
        scores = model.scores[segment.parameter].detach().flatten()
        assert int(on.sum()) == max(1, round(share * segment.size))
        assert scores[on].min() >= (scores[~on].max() if bool((~on).any()) else -np.inf)
    x = torch.randn(2, 3, 64, 64, generator=generator)
    torch.testing.assert_close(features(model, x), executor(backbone, mask).run(x), rtol=1e-4, atol=1e-4)


def packed_with(model: MaskedModel, **choice: Any) -> Mask:
    return to_mask("m", model.backbone, model.start, dict(model.scores), model.norms, **choice)


def test_where_only_the_order_counts_the_largest_weights_begin() -> None:
    model = mask_backbone(load("test_resnet"), 4, share=0.25)
    for name, scores in model.scores.items():
        begin, end = model.backbone.spans[name]
        weight = model.backbone.weights[begin:end].abs()
        on = masks.unpack(masks.pack(active(scores.detach(), 0.0, 0.25)), scores.numel())
        assert weight[on].min() >= weight[~on].max() - 1e-3  # but for the rounding of scores near one


def test_progressive_goes_from_all_to_the_share(cifar: list[Image.Image], tmp_path: Path) -> None:
    recipe = Recipe("", size=32, local_crops=0, prototypes=20, projection=16, batch=16, share=0.5, progressive=True)
    backbone = load("test_resnet")
    model = mask_backbone(backbone, 3, share=0.5)
    objective = SelfSupervised(recipe, backbone.features, Preprocessing.of(backbone.config, 32))
    fit("m", model, objective, bytes_of(cifar), recipe, 4, tmp_path, every=1)
    shares = [json.loads(line)["active"] for line in (tmp_path / CURVE).read_text().splitlines()]
    assert shares == pytest.approx([1, 0.875, 0.75, 0.625], abs=1e-4)


@pytest.mark.parametrize("how", ["random", "largest"])
def test_selected_weights_alone_may_be_off(how: Any, cifar: list[Image.Image], tmp_path: Path) -> None:
    backbone = load("test_resnet")
    free = select(backbone, 2, how, 0.3, seed=1)
    recipe = Recipe("", size=32, local_crops=0, prototypes=20, projection=16, batch=16, optimizer="sgd", lr=500.0)
    model = mask_backbone(backbone, 2, free=free)
    objective = SelfSupervised(recipe, backbone.features, Preprocessing.of(backbone.config, 32))
    fit("m", model, objective, bytes_of(cifar), recipe, 3, tmp_path)
    assert set(free) == set(model.scores)
    off = 0
    for name, scores in model.scores.items():
        begin, end = backbone.spans[name]
        assert int(free[name].sum()) == max(1, round(0.3 * (end - begin)))
        assert bool((scores[~free[name]] == 1.0).all()), "the others learn nothing"
        if how == "largest":
            weight = backbone.weights[begin:end].abs().view(free[name].shape)
            assert weight[free[name]].min() >= weight[~free[name]].max()
        off += int((~active(scores.detach(), 0.0, None, free[name]) & ~free[name]).sum())
    assert off == 0 and model.active() < 1
    assert select(backbone, 2, how, 0.3, seed=1)[name].equal(free[name])


def test_the_first_stages_alone(cifar: list[Image.Image]) -> None:
    """Masks that stop at a stage: everything behind is the plain backbone's, all active, alpha one."""
    backbone, x = load("test_resnet"), inputs(cifar, 64)
    model = mask_backbone(backbone, 1, stop=3)
    assert {n.split(".")[0] for n in model.scores} == {"layer1", "layer2"}
    scatter(model)
    mask = packed(model)
    rest = backbone.offset(3) - backbone.offset(1)
    assert bool(masks.unpack(mask.bits, backbone.weights.numel() - backbone.offset(1))[rest:].all())
    torch.testing.assert_close(features(model, x), executor(backbone, mask).run(x), rtol=1e-4, atol=1e-4)
