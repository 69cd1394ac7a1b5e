"""Convert an RGB image to a backbone's input: resize, crop and normalize, as timm's evaluation transform does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from cascade.errors import CascadeError
from cascade.model.decoding import ImageError

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_RESIZED = 40_000_000
"""Most pixels of a resized image before the crop. A small ``crop_pct`` and an extreme aspect ratio multiply."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """The parameters of timm's evaluation transform.

    Attributes:
        size: side of the square input, pixels.
        crop_pct: the shorter side is resized to size / crop_pct, then the center is cropped.
        interpolation: one of INTERPOLATIONS.
        mean, std: of RGB in [0, 1].
        crop_mode: one of CROP_MODES; timm has ``center`` for most models.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if not (isinstance(self.size, int) and self.size >= 1):
            raise CascadeError(f"preprocessing: size must be a whole number of pixels, not {self.size!r}")
        if not 0 < self.crop_pct <= 1:
            raise CascadeError(f"preprocessing: crop_pct must be in (0, 1], not {self.crop_pct!r}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise CascadeError(f"preprocessing: interpolation must be one of {known}, not {self.interpolation!r}")
        if self.crop_mode not in CROP_MODES:
            raise CascadeError(
                f"preprocessing: crop_mode must be one of {', '.join(CROP_MODES)}, not {self.crop_mode!r}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise CascadeError("preprocessing: mean and std must have three numbers each, and std must be positive")

    @property
    def resized_side(self) -> int:
        """The shorter side of a resized image before the crop, pixels."""
        return math.floor(self.size / self.crop_pct)

    @classmethod
    def of(cls, backbone_cfg: dict[str, Any], size: int | None = None, crop_pct: float | None = None) -> Preprocessing:
        """The preprocessing in timm's ``model.pretrained_cfg``; ``size`` and ``crop_pct`` override it."""
        from timm.data import resolve_data_config

        config = resolve_data_config(pretrained_cfg=backbone_cfg)
        _, height, width = config["input_size"]
        if size is None and height != width:
            raise CascadeError(
                f"the backbone expects {height} x {width} pixels, but only square inputs are supported: pass a size"
            )
        return cls(
            size=size or height,
            crop_pct=crop_pct or config["crop_pct"],
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop_mode=config["crop_mode"],
        )

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """RGB image -> float32 [3, size, size], bit-identical to timm's evaluation transform.

        Pixels are normalized in NumPy. PyTorch would start a team of OpenMP threads in every decoding thread, which
        would compete with the forward pass for cores.
        """
        import numpy as np

        geometry = self.geometry()
        return lambda image: self.normalize(np.asarray(geometry(image)).transpose(2, 0, 1))

    def geometry(self) -> Callable[[Image.Image], Image.Image]:
        """The first part of ``transform``: resize and crop to [size, size]."""
        from timm.data import create_transform

        settings = asdict(self)
        whole = create_transform(input_size=(3, settings.pop("size"), self.size), is_training=False, **settings)
        *steps, _, _ = whole.transforms  # the last two are ToTensor and Normalize

        def resized(image: Image.Image) -> Image.Image:
            for step in steps:
                image = step(image)
            return image

        return resized

    def normalize(self, pixels: np.ndarray) -> torch.Tensor:
        """The second part of ``transform``: uint8 [..., 3, size, size] -> float32 of the same shape."""
        import numpy as np
        import torch

        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        numbers = pixels.astype(np.float32, order="C")
        numbers /= 255
        numbers -= mean
        numbers /= std
        return torch.from_numpy(numbers)

    def crop(self) -> Callable[[Image.Image], torch.Tensor]:
        """RGB image -> uint8 [3, size, size], resized and cropped; the forward pass normalizes it on its device.

        It raises ImageError ("too_wide") if the resized image would have more than ``MAX_RESIZED`` pixels.
        """
        import numpy as np
        import torch

        geometry = self.geometry()

        def cropped(image: Image.Image) -> torch.Tensor:
            aspect = max(image.size) / min(image.size) if self.crop_mode != "squash" else 1
            if self.resized_side**2 * aspect > MAX_RESIZED:
                sides = f"the image is {image.width} x {image.height} pixels"
                raise ImageError("too_wide", f"{sides}, too long and thin for an input of {self.size}: crop it")
            return torch.from_numpy(np.array(geometry(image))).permute(2, 0, 1)

        return cropped

    def to_json(self) -> dict[str, Any]:
        """Plain types, as in cascade.json."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preprocessing:
        """The inverse of ``to_json``.

        Raises:
            CascadeError: a field is missing, unknown or out of range.
        """
        try:
            return cls(**data | {"mean": tuple(data["mean"]), "std": tuple(data["std"])})
        except (KeyError, TypeError) as e:
            raise CascadeError(f"preprocessing: {e}: export the bundle again") from e


def normalize_on_device(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> float32, on the same device; bit-identical to timm's ToTensor and Normalize."""
    divisor, center, scale = _constants(mean, std, str(pixels.device))
    return pixels.float().div_(divisor).sub_(center).div_(scale)


@cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: str) -> tuple[torch.Tensor, ...]:
    """255, mean and std as tensors: on a GPU, PyTorch divides by a Python number via its rounded reciprocal."""
    import torch

    return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in ((255.0,), mean, std))
