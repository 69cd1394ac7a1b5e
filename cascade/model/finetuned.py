"""Read fine-tuned copies of a backbone: full checkpoints and LoRA adapters, with their classifier."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor

from cascade.model.backbone import Backbone
from cascade.model.pretrained import BackboneError, fit, read_checkpoint, unwrap

PEFT = "base_model.model."


@dataclass(frozen=True)
class FineTuned:
    """A copy's tensors under the backbone's names, and its linear classifier if it has one.

    Attributes:
        state: with the keys of the backbone's ``state_dict``.
        weight: float32 [classes, F]; bias: float32 [classes].
    """

    state: dict[str, Tensor]
    weight: Tensor | None
    bias: Tensor | None


def read(path: Path, backbone: Backbone) -> FineTuned:
    """Read a checkpoint (safetensors or torch), or merge a LoRA adapter from a PEFT folder.

    Raises:
        BackboneError: it can't be read, or is not a copy of this backbone.
    """
    state = merge_lora(path, backbone) if path.is_dir() else read_checkpoint(path)
    tuned = fit(backbone.name, backbone.model, state, path)
    config = timm.get_pretrained_cfg(backbone.name)
    classifier = config.classifier if config else None
    state = unwrap(state, backbone.model)
    weight = next((state[f"{name}.weight"] for name in _names(classifier) if f"{name}.weight" in state), None)
    bias = next((state[f"{name}.bias"] for name in _names(classifier) if f"{name}.bias" in state), None)
    if weight is None or weight.dim() != 2 or weight.shape[1] != backbone.features:
        return FineTuned(tuned, None, None)
    bias = torch.zeros(len(weight)) if bias is None else bias
    return FineTuned(tuned, weight.float(), bias.float())


def merge_lora(folder: Path, backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's tensors, with ``W + B A * alpha / r`` wherever the adapter has a pair of matrices.

    Raises:
        BackboneError: there is no adapter, it can't be merged as a sum, or it belongs to another network.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{folder} has no readable adapter_config.json for a LoRA adapter ({error!r})") from error
    unsupported = [k for k in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern") if config.get(k)]
    if unsupported or config.get("peft_type") != "LORA":
        what = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}"
        raise BackboneError(f"{folder}: can't merge {what}; merge it with PEFT (merge_and_unload) and save the model")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    adapter = {k.removeprefix(PEFT): t for k, t in read_checkpoint(folder / "adapter_model.safetensors").items()}
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    for name, tensor in adapter.items():
        module, _, part = name.partition(".lora_")
        if not part:
            state[name.replace(".modules_to_save.", ".")] = tensor  # a classifier trained along with the adapter
        elif part == "A.weight":
            up, weight = adapter.get(f"{module}.lora_B.weight"), state.get(f"{module}.weight")
            product = None if up is None else up.flatten(1) @ tensor.flatten(1)
            if weight is None or product is None or product.numel() != weight.numel():
                raise BackboneError(f"{folder}: {module} of the adapter does not fit {backbone.name}")
            state[f"{module}.weight"] = weight + scale * product.view(weight.shape)
        elif part != "B.weight":
            raise BackboneError(f"{folder}: {name} can't be merged; merge it with PEFT and save the model")
    return state


def _names(classifier: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return classifier if isinstance(classifier, tuple) else (classifier,) if classifier else ()
