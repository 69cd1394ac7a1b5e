"""Full fine-tuning through the same loop: weights and affines move, stages before it do not, and it goes on alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.model import backbone as backbones
from cascade.model.preprocessing import Preprocessing
from training.checkpoint import DONE
from training.finetune import features
from training.loop import fit, schedule, seed_everything
from training.objectives import Supervised
from training.recipe import Recipe
from training.tuned import TunedModel, tune_backbone

RECIPE = Recipe(
    "", size=32, batch=16, optimizer="sgd", lr=0.05, weight_decay=1e-4, labels=True, train_norms=True, warmup=0.25
)


def tuned(images: list[Image.Image], folder: Path, steps: int = 6, lr: float = 0.05) -> TunedModel:
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images[:64]])
    backbone = backbones.load("test_resnet", "random:0")
    model = tune_backbone(backbone, 2)
    seed_everything(0)
    head = Supervised(RECIPE, backbone.features, Preprocessing.of(backbone.config, 32), np.arange(64) % 10)
    fit("fine-tuned", model, head, pixels, RECIPE, steps, folder, lr=lr)
    return model


def test_everything_from_its_stage_on_learns(cifar: list[Image.Image], tmp_path: Path) -> None:
    model = tuned(cifar, tmp_path)
    before = model.backbone.model.state_dict()
    for name, tensor in model.model.state_dict().items():
        late = name.startswith(("layer2.", "layer3.", "layer4."))
        if "num_batches" not in name:
            assert torch.equal(tensor, before[name]) != late, name
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.backbone.model.eval()(x).numpy()
    found = features(model, iter([x]))
    assert found.shape == plain.shape and np.abs(found - plain).max() > 1e-4
    again = tuned(cifar, tmp_path)  # finished: taken over as it is
    assert np.array_equal(features(again, iter([x])), found) and (tmp_path / DONE).exists()


def test_the_schedule_rises_and_falls() -> None:
    assert schedule(0.0) == 1 and schedule(0.5) == pytest.approx(0.5)
    assert [schedule(p, 0.25) for p in (0.0, 0.125, 0.25)] == pytest.approx([0, 0.5, 1])
    assert schedule(0.625, 0.25) == pytest.approx(0.5) and schedule(1.0, 0.25) == pytest.approx(0)
