"""The half of ``benchmarks.lightly_peer`` that runs in lightly-train's own environment; it needs nothing of Cascade."""

import json
import sys
from pathlib import Path
from typing import Any

import lightly_train
import timm
from safetensors.torch import load_file
from torch import Tensor, nn


class Whole(nn.Module):
    """All of timm's feature extractor: lightly-train's own wrapper ends before ``conv_head``, and then fails."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._pool = nn.AdaptiveAvgPool2d((1, 1))

    def get_model(self) -> nn.Module:
        return self._model

    def feature_dim(self) -> int:
        return int(self._model.num_features)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self._model.forward_features(x)}

    def forward_pool(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled_features": self._pool(x["features"])}

    def architecture_info(self) -> dict[str, str]:
        return {"model_type": "convolutional", "norm_type": "batchnorm"}


def main(settings: dict[str, Any]) -> None:
    """Train from the given weights; lightly-train's own loading would find none of them, silently."""
    folder, side = Path(settings["folder"]), (settings["size"], settings["size"])
    model = timm.create_model(settings["backbone"], num_classes=0)
    model.load_state_dict(load_file(folder / "start.safetensors"))
    transforms: dict[str, Any] = {
        "image_size": side,
        "normalize": {"mean": tuple(settings["mean"]), "std": tuple(settings["std"])},
    }
    if settings["method"] == "dino":
        transforms["local_view"] = {"view_size": (side[0] // 2, side[1] // 2)}
    lightly_train.pretrain(
        out=folder / "out",
        data=folder / "images",
        model=Whole(model),
        method=settings["method"],
        epochs=settings["epochs"],
        batch_size=settings["batch"],
        seed=settings["seed"],
        num_workers=0,
        accelerator="cpu",
        devices=1,
        precision="32-true",
        overwrite=True,
        loggers={"tensorboard": None},
        optim="adamw",
        optim_args={"lr": settings["rate"], "weight_decay": 0.0},
        transform_args=transforms,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
