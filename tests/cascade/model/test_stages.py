"""Stages: a pass may stop and start again between any two of them, and each weight lives where it is used."""

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import resize, to_tensor

from cascade.model.backbone import Backbone, wrap
from cascade.model.stages import stage_of, stages

STAGES = {
    "resnet18": 5,
    "efficientnet_lite0": 9,
    "mobilenetv2_100": 9,
    "convnext_atto": 6,
    "vit_tiny_patch16_224": 14,
    "regnety_002": 1,
}


@pytest.fixture(scope="module", params=STAGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that do something
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return wrap(model, name, "random:0")


@pytest.fixture(scope="module")
def images(name: str, cifar: list[Image.Image]) -> Tensor:
    """Two real images, as large as the network needs them."""
    side = 224 if "vit" in name else 64
    return torch.stack([to_tensor(resize(i, [side, side])) for i in cifar[:2]]) * 4 - 2


@torch.inference_mode()
def test_in_two_parts_as_in_one(name: str, backbone: Backbone, images: Tensor) -> None:
    assert len(backbone.stages) == STAGES[name]
    whole = backbone.model(images)
    assert whole.shape == (2, backbone.features)
    assert float(whole.std(dim=0).mean()) > 1e-4, "two photos must differ, or this proves little"
    for s in range(len(backbone.stages)):
        torch.testing.assert_close(backbone.run(backbone.run(images, 0, s), s), whole, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_weights_live_in_the_stage_that_uses_them(backbone: Backbone, images: Tensor) -> None:
    """Everything from offset(s) on may be changed without a change before stage s, and the other way round."""
    pristine = backbone.weights.clone()
    for s in range(1, len(backbone.stages)):
        before = backbone.run(images, 0, s)
        after = backbone.run(before, s)
        backbone.weights[backbone.offset(s) :] = 0
        assert backbone.run(images, 0, s).equal(before)
        backbone.weights.copy_(pristine)
        backbone.weights[: backbone.offset(s)] = 0
        assert backbone.run(before, s).equal(after)
        backbone.weights.copy_(pristine)


def test_every_parameter_and_buffer_has_its_stage(backbone: Backbone) -> None:
    """Only what the network's end holds (a last norm, say) is left to the last stage."""
    last = len(backbone.stages) - 1
    for parameter, _ in [*backbone.model.named_parameters(), *backbone.model.named_buffers()]:
        if stage_of(parameter, backbone.stages) == last and last:
            assert parameter.startswith((*backbone.stages[last].prefixes, "head.norm", "norm", "fc_norm")), parameter


def test_a_prefix_ends_at_a_dot() -> None:
    row = stages(timm.create_model("efficientnet_lite0", num_classes=0))
    assert [stage_of(n, row) for n in ("conv_stem.weight", "bn1.bias", "bn2.bias", "conv_head.weight")] == [0, 0, 8, 8]
    vit = stages(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    assert stage_of("blocks.1.attn.qkv.weight", vit) == 2
    assert stage_of("blocks.11.attn.qkv.weight", vit) == 12
    assert stage_of("pos_embed", vit) == 0


def test_a_subclass_may_run_otherwise_and_is_one_stage() -> None:
    class Reversed(timm.models.ResNet):
        pass

    model = timm.create_model("test_resnet", num_classes=0)
    model.__class__ = Reversed
    assert [stage.name for stage in stages(model)] == ["all"]
