"""Checkpoints in the very layouts in which SwAV, DINO and CLIP are published, made of random tensors."""

from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from cascade.model.backbone import load, wrap
from cascade.model.pretrained import BackboneError, fit, read_checkpoint

pytestmark = pytest.mark.slow

CLIP = "vit_base_patch32_clip_quickgelu_224"


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    """A ResNet-50's tensors in torchvision's names, which are timm's, without classifier."""
    torch.manual_seed(0)
    state = timm.create_model("resnet50", pretrained=False, num_classes=0).state_dict()
    return {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in state.items()}


def same(found: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[k], v) for k, v in state.items() if not k.endswith("num_batches_tracked"))


def swav(state: dict[str, Tensor]) -> dict[str, object]:
    """The published swav_800ep_pretrain.pth.tar: the table itself, wrapped by DistributedDataParallel."""
    head = {"projection_head.0.weight": (2048, 2048), "projection_head.0.bias": (2048,)}
    head |= {f"projection_head.1.{k}": (2048,) for k in ("weight", "bias", "running_mean", "running_var")}
    head |= {"projection_head.3.weight": (128, 2048), "projection_head.3.bias": (128,), "prototypes.weight": (30, 128)}
    return {**{f"module.{k}": v for k, v in state.items()}, **{f"module.{k}": torch.zeros(s) for k, s in head.items()}}


def swav_training(state: dict[str, Tensor]) -> dict[str, object]:
    """What SwAV's training itself writes."""
    return {"epoch": 800, "state_dict": swav(state), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def dino(state: dict[str, Tensor]) -> dict[str, object]:
    """The published dino_resnet50_pretrain.pth: the teacher's backbone alone."""
    return dict(state)


def dino_full(state: dict[str, Tensor], prefix: str = "module.") -> dict[str, object]:
    """The published dino_resnet50_pretrain_full_checkpoint.pth, with its options as a Namespace."""
    head = {"mlp.0.weight": (2048, 2048), "mlp.0.bias": (2048,), "last_layer.weight_g": (60, 1)}
    heads = {f"{prefix}head.{k}": torch.zeros(s) for k, s in head.items()}
    teacher = {f"{prefix}backbone.{k}": v for k, v in state.items()} | heads
    student = {f"module.backbone.{k}": torch.zeros_like(v) for k, v in state.items()} | heads
    options = Namespace(arch="resnet50", lr=0.3, local_crops_scale=(0.05, 0.14))
    return {"student": student, "teacher": teacher, "epoch": 800, "args": options, "dino_loss": {"center": head}}


def dino_full_plain(state: dict[str, Tensor]) -> dict[str, object]:
    """The same of one process."""
    return dino_full(state, prefix="")


@pytest.mark.parametrize("layout", [swav, swav_training, dino, dino_full, dino_full_plain])
def test_resnet50(layout: object, resnet: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(layout(resnet), path)  # type: ignore[operator]
    with torch.device("meta"):
        model = timm.create_model("resnet50", num_classes=0)
    found = fit("resnet50", model, read_checkpoint(path), path)
    assert list(found) == list(model.state_dict())
    assert same(found, resnet)


def test_a_source_reads_them(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(dino_full(resnet), tmp_path / "dino.pth")
    backbone = load("resnet50", f"file:{tmp_path / 'dino.pth'}")
    assert same(backbone.model.state_dict(), resnet) and backbone.source == "file:dino.pth"


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(CLIP, pretrained=False, num_classes=512, depth=2)  # the head is CLIP's projection


def openai(model: nn.Module) -> dict[str, Tensor]:
    """OpenAI's and open_clip's names for the image tower; open_clip's resblocks keep in_proj fused, too."""
    names = [("patch_embed.proj", "conv1"), ("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre")]
    names += [("attn.qkv.weight", "attn.in_proj_weight"), ("attn.qkv.bias", "attn.in_proj_bias")]
    names += [("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]
    names += [("norm1", "ln_1"), ("norm2", "ln_2"), ("norm.", "ln_post.")]
    out = {}
    for key, tensor in model.state_dict().items():
        for timms, theirs in names:
            key = key.replace(timms, theirs)
        match key:
            case "cls_token":
                out["class_embedding"] = tensor[0, 0]
            case "pos_embed":
                out["positional_embedding"] = tensor[0]
            case "head.weight":
                out["proj"] = tensor.T
            case "head.bias":
                pass
            case _:
                out[key] = tensor
    return out


def text_tower() -> dict[str, Tensor]:
    rows: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (40, 512),
        "text_projection": (512, 512),
        "positional_embedding": (77, 512),
    }
    rows |= {"transformer.resblocks.0.attn.in_proj_weight": (1536, 512), "logit_scale": (), "ln_final.weight": (512,)}
    return {k: torch.ones(s) for k, s in rows.items()}


@pytest.mark.parametrize("layout", ["openai", "half", "open_clip", "timm", "timm trunk"])
def test_clip_vit(layout: str, vit: nn.Module, tmp_path: Path) -> None:
    state = {f"visual.{k}": v for k, v in openai(vit).items()} | text_tower()
    match layout:
        case "half":
            state = {k: v.half() for k, v in state.items()}
        case "open_clip":  # a training's checkpoint
            state = {"epoch": 32, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}  # type: ignore[dict-item]
        case "timm":
            state = vit.state_dict()
        case "timm trunk":  # open_clip around timm's own network
            state = {f"visual.trunk.{k}": v for k, v in vit.state_dict().items()} | text_tower()
    path = tmp_path / "vit.pt"
    torch.save(state, path)
    expected = {k: v for k, v in vit.state_dict().items() if not k.startswith("head.")}
    model = timm.create_model(CLIP, num_classes=0, depth=2)
    model.load_state_dict(fit(CLIP, model, read_checkpoint(path), path), strict=True)
    if layout == "half":
        expected = {k: v.half().float() for k, v in expected.items()}
    assert model.state_dict().keys() == expected.keys() and same(model.state_dict(), expected)
    # fused q, k and v are three row blocks, each with an alpha of its own
    assert sum(s.parameter == "blocks.0.attn.qkv.weight" for s in wrap(model, CLIP, "test").segments) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_not_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(
        BackboneError, match=r"TorchScript program, which is not executed here: save the state_dict\(\)"
    ):
        read_checkpoint(tmp_path / "ViT-B-32.pt")


def test_what_is_left_when_wrappers_are_off_must_fit(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    state = swav(resnet)
    del state["module.layer4.2.conv3.weight"]
    torch.save(state, tmp_path / "swav.pth.tar")
    with pytest.raises(BackboneError, match=r"has \d+ tensors, resnet50 has \d+; is it another network"):
        load("resnet50", f"file:{tmp_path / 'swav.pth.tar'}")
