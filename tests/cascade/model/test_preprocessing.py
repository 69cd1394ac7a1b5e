"""The input of a backbone equals timm's, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from cascade.errors import CascadeError
from cascade.model.decoding import ImageError
from cascade.model.preprocessing import Preprocessing

MODELS = [
    "tf_efficientnet_lite0",
    "resnet50",
    "vit_base_patch32_clip_224.openai",
    "vit_base_patch16_siglip_224",
]


def config(model: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(model)
    assert cfg is not None
    return cfg.to_dict()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_preprocessing_equals_timm(model: str, name: str) -> None:
    image = Image.fromarray(load_sample_image(name))
    data_config = timm.data.resolve_data_config(pretrained_cfg=config(model))
    theirs: Callable[[Image.Image], torch.Tensor] = timm.data.create_transform(**data_config, is_training=False)
    ours = Preprocessing.of(config(model)).transform()(image)
    assert ours.dtype == torch.float32 and ours.shape == data_config["input_size"]
    assert torch.equal(ours, theirs(image))


def test_preprocessing_at_another_size() -> None:
    image = Image.fromarray(load_sample_image("flower.jpg"))
    data_config = timm.data.resolve_data_config({"img_size": 64, "crop_pct": 1.0}, config("resnet50"))
    ours = Preprocessing.of(config("resnet50"), size=64, crop_pct=1.0).transform()(image)
    assert torch.equal(ours, timm.data.create_transform(**data_config, is_training=False)(image))


@pytest.mark.parametrize("model", MODELS)
def test_preprocessing_survives_json(model: str) -> None:
    preprocessing = Preprocessing.of(config(model))
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": 64.5}, "size"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"interpolation": "random"}, "interpolation"),
        ({"crop_mode": "left"}, "crop_mode"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"mean": [0.5]}, "mean"),
        ({"gamma": 2}, "gamma"),
        ({"mean": None}, "preprocessing"),
    ],
)
def test_preprocessing_refuses_nonsense(change: dict[str, Any], named: str) -> None:
    data = Preprocessing.of(config("resnet50")).to_json()
    with pytest.raises(CascadeError, match=named):
        Preprocessing.from_json(data | change)


def test_an_image_too_long_and_thin_to_resize() -> None:
    """Refused before the resized image is allocated: this one would have 100 times 2,048 squared pixels."""
    preprocessing = Preprocessing(1024, 0.5, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ImageError) as refused:
        preprocessing.crop()(Image.new("RGB", (100, 1)))
    assert refused.value.kind == "too_wide"
    assert preprocessing.crop()(Image.new("RGB", (4, 1))).shape == (3, 1024, 1024)
    assert replace(preprocessing, crop_mode="squash").crop()(Image.new("RGB", (100, 1))).shape == (3, 1024, 1024)


def test_preprocessing_names_a_missing_field() -> None:
    data = Preprocessing.of(config("resnet50")).to_json()
    for field in ("size", "mean"):
        with pytest.raises(CascadeError, match=field):
            Preprocessing.from_json({key: value for key, value in data.items() if key != field})


def test_oblong_backbones_need_a_size() -> None:
    oblong = config("resnet50") | {"input_size": (3, 128, 256)}
    with pytest.raises(CascadeError, match="pass a size"):
        Preprocessing.of(oblong)
    assert Preprocessing.of(oblong, size=128).size == 128
