"""A bundle as a plain model gives the engine's answers: as a timm checkpoint, in ONNX Runtime and as TorchScript."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import cascade
from cascade.bundle.export import export
from cascade.bundle.format import Bundle, BundleError, write
from cascade.bundle.schema import MaskCard
from cascade.model import backbone as backbones
from tests.helpers.adapters import NETWORKS, adapters
from tests.helpers.bundles import CLASSES, handmade


def bundle_of(images: list[Image.Image], network: str, kind: str) -> Bundle:
    base = handmade(images, backbone=network, experts=0)
    backbone = backbones.load(network, "random:0")
    mask = replace(adapters(backbone, 1)[kind], name="dispatcher")
    weights = backbone.weights.numel() - backbone.offset(mask.start)
    card = MaskCard(name="dispatcher", start=mask.start, weights=weights, density=1.0)
    card_of_all = base.card.model_copy(update={"masks": [card], "format": 2})
    return replace(base, dispatcher=mask, ood=None, banks={}, card=card_of_all)


@pytest.mark.parametrize(
    ("network", "kind"), [*((n, "mask+channels") for n in NETWORKS), ("test_efficientnet", "delta")]
)
def test_equals_the_engine(cifar: list[Image.Image], tmp_path: Path, network: str, kind: str) -> None:
    bundle = bundle_of(cifar[:12], network, kind)
    path = write(bundle, tmp_path / "hand" / "1")
    results = cascade.load(path).predict(cifar[:4], cascade.Options(labels=len(CLASSES)))
    answers = [answer for answer in results if isinstance(answer, cascade.Prediction)]
    assert len(answers) == 4
    wanted = np.array([[{x.name: x.score for x in a.labels}[c] for c in CLASSES] for a in answers])
    x = torch.stack([bundle.preprocessing.transform()(image) for image in cifar[:4]])

    timm_file = export(path, tmp_path / "model.safetensors", "timm")
    with safe_open(timm_file, "pt") as file:
        about = file.metadata()
    model = timm.create_model(about["architecture"], num_classes=len(json.loads(about["classes"]))).eval()
    model.load_state_dict(load_file(timm_file))
    with torch.inference_mode():
        np.testing.assert_allclose(model(x).softmax(dim=1), wanted, atol=1e-4)
        program = torch.jit.load(str(export(path, tmp_path / "model.pt", "torchscript")))
        np.testing.assert_allclose(program(x), wanted, atol=1e-4)

    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(export(path, tmp_path / "model.onnx", "onnx")))
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["architecture"] == network


def test_experts_are_refused(cifar: list[Image.Image], tmp_path: Path) -> None:
    path = write(handmade(cifar[:30]), tmp_path / "hand" / "1")
    with pytest.raises(BundleError, match="has experts"):
        export(path, tmp_path / "model.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["hand"]


def test_an_existing_file_is_kept(cifar: list[Image.Image], tmp_path: Path) -> None:
    path = write(handmade(cifar[:30], experts=0), tmp_path / "hand" / "1")
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(BundleError, match="exists"):
        export(path, tmp_path / "model.onnx", "onnx")
    assert (tmp_path / "model.onnx").read_text() == "mine"
