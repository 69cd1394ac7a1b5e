"""Importing a fine-tuned copy: what the delta keeps, what distillation gains, and which copies are refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor

import cascade
from cascade.bundle.format import check, read
from cascade.model import backbone as backbones
from cascade.model import finetuned
from cascade.model.backbone import Backbone
from cascade.model.decoding import read as open_image
from cascade.model.delta import compress
from cascade.model.preprocessing import Preprocessing
from cascade.model.pretrained import BackboneError
from tests.helpers.adapters import NETWORKS, reference
from training.delta import _batches, compare, fit_deltas, images_in, import_copy

CLASSES = ["cat", "dog", "ship"]


def tuned_copy(backbone: Backbone, share: float = 0.05, seed: int = 1) -> dict[str, Tensor]:
    """A whole copy with a classifier of three classes: each tensor moved by a share of its own spread."""
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(backbone.name, num_classes=len(CLASSES))
    state = model.state_dict() | backbone.model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            spread = float(tensor.std()) if tensor.numel() > 1 else 1.0
            moved = tensor + share * (spread + 0.1) * torch.randn(tensor.shape, generator=generator)
            state[name] = moved.abs() if name.endswith("running_var") else moved
    return state


@pytest.fixture(scope="module", params=NETWORKS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbones.load(request.param, "random:0")


def test_a_copy_that_is_a_delta_is_kept(backbone: Backbone) -> None:
    """Where each difference is plus or minus one number a channel, nothing is lost but half precision."""
    generator = torch.Generator().manual_seed(0)
    state = dict(backbone.model.state_dict())
    for name, rows in backbone.rows().items():
        sign = torch.where(torch.rand(state[name].shape, generator=generator) < 0.5, 1.0, -1.0)
        step = torch.rand(rows, generator=generator).view(-1, *[1] * (sign.dim() - 1)) / 50
        state[name] = state[name] + sign * step
    mask, losses = compress(backbone, state)
    assert all(loss.lost < 1e-5 for loss in losses) and not mask.channels
    x = torch.randn(2, *backbone.config["input_size"], generator=generator)
    own = backbones.load(backbone.name, backbone.source).model
    own.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(reference(backbone, mask, x), own(x), rtol=1e-2, atol=1e-3)


def test_a_frozen_trunk_is_not_stored(backbone: Backbone) -> None:
    last = len(backbone.stages) - 1
    name = next(n for n in backbone.channels(last))
    state = dict(backbone.model.state_dict())
    state[name] = state[name] + 1
    mask, _ = compress(backbone, state)
    assert mask.start == last
    assert mask.channels.keys() == {name}


def test_import_writes_a_bundle_that_fits(backbone: Backbone, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    safetensors.torch.save_file(tuned_copy(backbone), copy)
    path, tuned, losses = import_copy(copy, backbone, tmp_path / "mine" / "1", classes=CLASSES)
    bundle = read(path)
    check(bundle, backbone)
    assert bundle.card.classes == CLASSES
    assert tuned.weight is not None and bundle.linear["dispatcher"].weight.equal(tuned.weight)
    assert {loss.weight for loss in losses} >= backbone.rows().keys()
    assert sum(p.stat().st_size for p in path.iterdir()) < copy.stat().st_size / 3
    (answer,) = cascade.load(path).predict([Image.new("RGB", (64, 64), "red")], cascade.Options(labels=1))
    assert isinstance(answer, cascade.Prediction) and answer.labels[0].name in CLASSES


def test_distillation_comes_closer_to_the_copy(cifar_folder: Path, tmp_path: Path) -> None:
    backbone = backbones.load("test_efficientnet", "random:0")
    tuned = tuned_copy(backbone, 0.3)
    state = {n: t for n, t in tuned.items() if n in backbone.model.state_dict()}
    mask, _ = compress(backbone, state)
    view, images = Preprocessing.of(backbone.config, 32), images_in(cifar_folder / "test")
    fitted = fit_deltas(backbone, mask, state, _batches(images_in(cifar_folder / "train"), view, 10, 0), 10)
    x = torch.stack([view.transform()(open_image(file)) for file in images[:32]])
    teacher = backbones.load(backbone.name, backbone.source).model
    teacher.load_state_dict(state)
    with torch.inference_mode():
        wanted = teacher(x)
    before, after = ((reference(backbone, m, x) - wanted).square().mean() for m in (mask, fitted))
    assert after < before
    assert all(t.dtype == torch.float16 for t in (*fitted.deltas.values(), *fitted.channels.values()))
    assert any(not t.equal(mask.channels[n]) for n, t in fitted.channels.items()), "scales and shifts learn as well"


def test_compare_counts_both(cifar_folder: Path, tmp_path: Path) -> None:
    backbone = backbones.load("test_efficientnet", "random:0")
    names = sorted(p.name for p in (cifar_folder / "test").iterdir())
    model = timm.create_model(backbone.name, num_classes=len(names))
    state = model.state_dict() | backbone.model.state_dict()
    copy = tmp_path / "copy.safetensors"
    safetensors.torch.save_file(state, copy)
    path, tuned, _ = import_copy(copy, backbone, tmp_path / "mine" / "1", classes=names, size=32)
    before, after = compare(path, backbone, tuned, cifar_folder / "test")
    assert before == after, "an unchanged backbone loses nothing"
    with pytest.raises(cascade.CascadeError, match="a folder for each class"):
        compare(path, backbone, tuned, cifar_folder)


def lora(folder: Path, backbone: Backbone, **config: object) -> dict[str, Tensor]:
    """A LoRA adapter of one layer as PEFT saves it, and the weights that it means."""
    generator = torch.Generator().manual_seed(0)
    name = next(iter(backbone.rows()))
    weight = backbone.model.state_dict()[name]
    a = torch.randn(2, *weight.shape[1:], generator=generator)
    b = torch.randn(len(weight), 2, *[1] * (weight.dim() - 2), generator=generator)
    layer = f"base_model.model.{name.removesuffix('.weight')}"
    tensors = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return {name: weight + 3 * torch.einsum("or,r...->o...", b.flatten(1), a)}


def test_lora_is_merged(backbone: Backbone, tmp_path: Path) -> None:
    wanted = lora(tmp_path / "lora", backbone)
    found = finetuned.read(tmp_path / "lora", backbone)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found.state[name], tensor)
    assert found.weight is None


@pytest.mark.parametrize("option", ["use_dora", "fan_in_fan_out"])
def test_what_is_not_a_sum_is_refused(tmp_path: Path, option: str) -> None:
    backbone = backbones.load("test_vit", "random:0")
    lora(tmp_path / "lora", backbone, **{option: True})
    with pytest.raises(BackboneError, match=f"can't merge {option}"):
        finetuned.read(tmp_path / "lora", backbone)


def test_wrong_names_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    safetensors.torch.save_file(tuned_copy(backbone), copy)
    with pytest.raises(cascade.CascadeError, match="has 3 classes, but 2 names"):
        import_copy(copy, backbone, tmp_path / "mine" / "1", classes=["cat", "dog"])
    assert not (tmp_path / "mine").exists()
