"""Split a backbone into stages, so that a forward pass can stop and resume between any two of them.

A mask may start at a later stage. The stages before it are then shared with all masks that have the same weights
there. ``stages(model)`` returns the list for the timm families below. Any other timm model is a single stage, which
is always correct but shares nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import timm.models as families
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One step of the forward pass.

    Attributes:
        name: its name in timm, such as ``layer4`` or ``blocks.6``.
        run: features in, features out.
        prefixes: the stage owns the parameters whose name begins with one of these and a dot.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    prefixes: tuple[str, ...]


def stages(model: nn.Module) -> list[Stage]:
    """The stages of a timm model, in order.

    ``model.forward_head(run_n(... run_0(x)))`` equals ``model(x)``. Parameters that no prefix
    claims belong to the last stage. Types are compared exactly: a subclass may run its parts in
    another order.
    """
    if type(model) is families.ResNet:
        stem = Stage("stem", lambda x: model.maxpool(model.act1(model.bn1(model.conv1(x)))), ("conv1", "bn1"))
        return [stem, *(_module(model, f"layer{i}") for i in (1, 2, 3, 4))]
    if type(model) is families.EfficientNet:
        stem = Stage("stem", lambda x: model.bn1(model.conv_stem(x)), ("conv_stem", "bn1"))
        head = Stage("conv_head", lambda x: model.bn2(model.conv_head(x)), ("conv_head", "bn2"))
        return [stem, *_children(model, "blocks"), head]
    if type(model) is families.ConvNeXt:
        return [_module(model, "stem"), *_children(model, "stages"), _module(model, "norm_pre")]
    if type(model) is families.VisionTransformer:
        embed = ("patch_embed", "cls_token", "pos_embed", "reg_token", "norm_pre")
        stem = Stage("patch_embed", lambda x: _embed(model, x), embed)
        return [stem, *_children(model, "blocks"), _module(model, "norm")]
    return [Stage("all", model.forward_features, ("",))]  # type: ignore[arg-type]


def stage_of(parameter: str, stage_list: list[Stage]) -> int:
    """Index of a parameter's stage, by its dotted name."""
    for index, stage in enumerate(stage_list):
        if any(parameter == prefix or parameter.startswith(f"{prefix}.") for prefix in stage.prefixes):
            return index
    return len(stage_list) - 1


def _module(model: nn.Module, name: str) -> Stage:
    return Stage(name, model.get_submodule(name), (name,))


def _children(model: nn.Module, name: str) -> list[Stage]:
    return [_module(model, f"{name}.{child}") for child, _ in model.get_submodule(name).named_children()]


def _embed(model: families.VisionTransformer, x: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
