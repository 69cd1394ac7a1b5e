"""Checkpoints of backbones in the layouts that they are published in, as timm's tensors.

| published as | layout |
|---|---|
| timm, torchvision | the tensors by name; or by order, in another library's names |
| SwAV ResNet-50 | ``module.conv1.weight`` .., beside ``module.projection_head.*`` and ``module.prototypes.*`` |
| DINO ResNet-50 | torchvision's names; the full checkpoint is ``{"teacher": .., "student": .., "args": ..}`` with \
``module.backbone.*`` or ``backbone.*`` beside a head; the teacher is what DINO evaluates |
| CLIP ViT | OpenAI's and open_clip's ``visual.*`` beside a text tower, read by timm; the fused qkv as it is |

Files are read with ``weights_only``: nothing in one is executed.
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

COUNTERS = "num_batches_tracked"  # BatchNorm's: no forward pass reads them, many files lack them
WHOLE = ("state_dict", "model", "teacher")  # under which a training's checkpoint keeps the network
WRAPPERS = ("module.", "backbone.", "timm_model.")
"""What DistributedDataParallel, DINO and Hugging Face's wrapper of timm put before each name."""


class BackboneError(CascadeError):
    """The backbone's weights can't be found, or are not those they should be."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or torch checkpoint (weights only, never unpickled objects).

    Raises:
        BackboneError: there is no such file, or no tensors in it.
    """
    if not path.is_file():
        how = "give the checkpoint with --weights FILE (cascade train: --source file:PATH)"
        raise BackboneError(f"no weights at {path}; {how}")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # DINO keeps its options beside; a plain container
                state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the two readers raise; nothing in it was executed
        if "TorchScript" in str(error):
            way = "save the state_dict() of torch.jit.load(FILE) with torch.save, and give that"
            raise BackboneError(f"{path} is a TorchScript program, which is not run here: {way}") from error
        raise BackboneError(f"{path} can't be read as a checkpoint ({first_line(error)}); download it again") from error
    for key in WHOLE:
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path} holds no plain table of tensors; save model.state_dict() and try again")
    return state


def fit(name: str, model: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A published checkpoint's tensors under the names of ``model``, timm's ``name``: strict, nothing may lack.

    By name once the wrappers are off, else by order (same network, other names). What belongs to heads and to a
    text tower is left out.

    Raises:
        BackboneError: it is another network.
    """
    wanted = model.state_dict()
    state = {k: v for k, v in unwrap(state, model).items() if not k.endswith(COUNTERS)}
    if not all(k in state for k in wanted if not k.endswith(COUNTERS)):
        order = [k for k in timm.create_model(name, pretrained=False).state_dict() if not k.endswith(COUNTERS)]
        if len(state) != len(order):
            raise BackboneError(f"{path} holds {len(state)} tensors, {name} has {len(order)}; is it another network?")
        state = dict(zip(order, state.values(), strict=True))
    for key, tensor in wanted.items():
        if not key.endswith(COUNTERS) and state[key].shape != tensor.shape:
            found, need = list(state[key].shape), list(tensor.shape)
            raise BackboneError(f"{path} does not fit {name}: {key} is {found}, should be {need}")
    return {key: state.get(key, tensor) for key, tensor in wanted.items()}


def unwrap(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names without what a training put around the network, and CLIP's image tower in timm's names."""
    for prefix in WRAPPERS:
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = inner or state
    if isinstance(model, VisionTransformer) and any(k.startswith("visual.") for k in state):
        state = checkpoint_filter_fn(state, model)
    return state


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
