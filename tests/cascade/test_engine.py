"""The engine against a plain reference that builds each masked model separately."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cascade
from cascade import Engine, Options, Prediction
from cascade import backbone as backbones
from cascade.bundle import Bundle, read
from cascade.fusion import MODES
from cascade.masks import Mask, apply


def masked_model(bundle: Bundle, masks: list[Mask]) -> torch.nn.Module:
    """A whole model of its own with the masks' weights written into it, one after the other."""
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source)
    for mask in masks:
        first = backbone.offset(mask.start)
        flat = apply(backbone, mask)
        backbone.point(flat, first)
        state = backbone.model.state_dict()
        for name, tensor in mask.norms.items():
            state[name].copy_(tensor)
    return backbone.model


@torch.inference_mode()
def reference(bundle: Bundle, images: list[Image.Image], mode: str) -> tuple[list[int], np.ndarray]:
    """Clusters and embeddings, image by image, from separately built models."""
    transform = bundle.preprocessing.transform()
    dispatcher = masked_model(bundle, [bundle.dispatcher])
    experts = [masked_model(bundle, [bundle.dispatcher, e]) for e in bundle.experts]
    fusion = bundle.fusions[mode]  # type: ignore[index]
    clusters, embeddings = [], []
    for image in images:
        x = transform(image)[None]
        features = dispatcher(x)
        assert bundle.router is not None
        cluster = int(bundle.router.probabilities(features).argmax())
        out = fusion.bias + features @ fusion.weight[0].float()
        for k, expert in enumerate(experts):
            if mode == "unconditional" or (mode == "conditional" and k == cluster):
                slot = 1 if len(fusion.weight) == 2 else k + 1
                out = out + expert(x) @ fusion.weight[slot].float()
        clusters.append(cluster)
        embeddings.append(out[0].numpy())
    return clusters, np.stack(embeddings)


def answers(engine: Engine, images: list[Image.Image], **wishes: object) -> list[Prediction]:
    out = engine.predict(images, Options(embedding=True, **wishes))  # type: ignore[arg-type]
    assert all(isinstance(a, Prediction) for a in out), out
    return out  # type: ignore[return-value]


@pytest.mark.parametrize("mode", MODES)
def test_equals_separately_built_models(bundle_path: Path, cifar: list[Image.Image], mode: str) -> None:
    images = cifar[:24]
    clusters, embeddings = reference(read(bundle_path), images, mode)
    got = answers(cascade.load(bundle_path), images, mode=mode)
    assert [a.cluster for a in got] == clusters
    assert len(set(clusters)) > 1, "the images must need more than one expert, or this proves little"
    found = np.stack([a.embedding for a in got if a.embedding is not None])
    np.testing.assert_allclose(found, embeddings, rtol=1e-3, atol=1e-3)
