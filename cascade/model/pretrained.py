"""Read published checkpoints of backbones, in any of these layouts, as timm's tensors.

| published as | layout |
|---|---|
| timm, torchvision | the tensors by name; or by order, in another library's names |
| SwAV ResNet-50 | ``module.conv1.weight`` .., beside ``module.projection_head.*`` and ``module.prototypes.*`` |
| DINO ResNet-50 | torchvision's names; the full checkpoint is ``{"teacher": .., "student": .., "args": ..}`` with \
``module.backbone.*`` or ``backbone.*`` beside a head; the teacher is what DINO evaluates |
| CLIP ViT | OpenAI's and open_clip's ``visual.*`` beside a text tower, read by timm; the fused qkv as it is |

Files are read with ``weights_only``: nothing in them is executed.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cascade.errors import CascadeError

COUNTERS = "num_batches_tracked"  # of BatchNorm: no forward pass reads them, many files lack them
WHOLE = ("state_dict", "model", "teacher")  # keys under which training checkpoints store the network
WRAPPERS = ("module.", "backbone.", "timm_model.")
"""Prefixes of DistributedDataParallel, DINO and Hugging Face's timm wrapper."""


class BackboneError(CascadeError):
    """The backbone's weights are missing, or are the wrong ones."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` or torch checkpoint (weights only, never unpickled objects).

    Raises:
        BackboneError: the file is missing, damaged, or holds no tensors.
    """
    if not path.is_file():
        how = "pass the checkpoint with --weights FILE (cascade train: --source file:PATH)"
        raise BackboneError(f"no weights at {path}; {how}")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # DINO also stores its options, a plain container
                state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the two readers raise anything; nothing in it was executed
        if "TorchScript" in str(error):
            way = "save the state_dict() of torch.jit.load(FILE) with torch.save, and pass that file"
            raise BackboneError(f"{path} is a TorchScript program, which is not executed here: {way}") from error
        raise BackboneError(f"{path} can't be read as a checkpoint ({first_line(error)}); download it again") from error
    for key in WHOLE:
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path} is not a plain dictionary of tensors; save model.state_dict() and try again")
    return state


def fit(name: str, model: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A published checkpoint's tensors under the names of ``model``, timm's ``name``; strict, none may be missing.

    Tensors are matched by name without the wrappers' prefixes, else by order (same network, other names). Heads and
    text towers are left out.

    Raises:
        BackboneError: the checkpoint is of another network.
    """
    wanted = model.state_dict()
    state = {k: v for k, v in unwrap(state, model).items() if not k.endswith(COUNTERS)}
    if not all(k in state for k in wanted if not k.endswith(COUNTERS)):
        order = [k for k in timm.create_model(name, pretrained=False).state_dict() if not k.endswith(COUNTERS)]
        if len(state) != len(order):
            raise BackboneError(f"{path} has {len(state)} tensors, {name} has {len(order)}; is it another network?")
        state = dict(zip(order, state.values(), strict=True))
    for key, tensor in wanted.items():
        if not key.endswith(COUNTERS) and state[key].shape != tensor.shape:
            actual, expected = list(state[key].shape), list(tensor.shape)
            raise BackboneError(f"{path} does not fit {name}: {key} has shape {actual}, expected {expected}")
    return {key: state.get(key, tensor) for key, tensor in wanted.items()}


def unwrap(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Strip the prefixes of training wrappers, and rename CLIP's image tower to timm's names."""
    for prefix in WRAPPERS:
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = inner or state
    if isinstance(model, VisionTransformer) and any(k.startswith("visual.") for k in state):
        state = checkpoint_filter_fn(state, model)
    return state


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
