"""SwAV's multi-crop augmentation (arXiv 2006.09882) for a whole batch at once, on the batch's device.

Cropping, resizing and flipping one image is linear and separable: `Wy @ image @ Wx.T` with two small matrices
of triangle-filter weights. So a batch takes two batched matrix products, with the same antialiasing at every
ratio of crop to output (torchvision's `resized_crop(antialias=True)` to float accuracy), whereas grid_sample
aliases as soon as a crop is larger than the output and would also need a pyramid. Blur is a product of the same
kind.

All randomness is drawn from the given generator, on its device: the same generator state gives the same
crops, and a CPU generator gives the same random numbers whatever device the batch is on.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Number of crops, side of the output in px, range of the crop's share of the image's area.
Crop = tuple[int, int, tuple[float, float]]

CROPS: tuple[Crop, ...] = ((2, 64, (0.14, 1.0)), (6, 32, (0.05, 0.14)))
RATIO = (3 / 4, 4 / 3)  # width / height
JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation: 1 -+ this; hue: -+ this
IDENTITY = (1.0, 1.0, 1.0, 0.0)
JITTER_P, GRAY_P, BLUR_P = 0.8, 0.2, 0.5
SIGMA, SIGMA_SIDE = (0.1, 2.0), 224  # blur in px, for a first crop of 224 px
LUMA = (0.2989, 0.587, 0.114)


def multi_crop(
    batch: Tensor,
    sizes: Sequence[Crop] = CROPS,
    *,
    generator: torch.Generator,
    mean: Sequence[float],
    std: Sequence[float],
    blur: float | None = None,
) -> list[Tensor]:
    """uint8 [B, 3, S, S] -> for each crop, in the order of `sizes`, normalized float32 [B, 3, side, side].

    The blur is in pixels of the output, as in the paper, but scaled with the first crop's side: smaller
    training images are blurred as much as the paper's images shrunk to this size. `blur` sets that scale
    if the crops are made one size at a time.
    """
    pixels = batch.float().div_(255)
    blur = sizes[0][1] / SIGMA_SIDE if blur is None else blur
    crops = []
    for count, side, scale in sizes:
        for _ in range(count):
            crop = random_resized_crop(pixels, side, scale, generator)
            crop = random_gray(random_jitter(crop, generator), generator)
            crops.append(normalize(random_blur(crop, blur, generator), mean, std))
    return crops


def crop_flip(
    batch: Tensor,
    size: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Random crop and flip only: uint8 [B, 3, S, S] -> normalized float32 [B, 3, size, size]."""
    return normalize(random_resized_crop(batch.float().div_(255), size, scale, generator), mean, std)


def shift_flip(
    batch: Tensor, most: int, generator: torch.Generator, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Shift by up to ``most`` px in both directions, reflected at the borders, and mirror with p 0.5.

    Like padding with reflection and a random crop: uint8 [B, 3, S, S] -> normalized float32 [B, 3, S, S].
    """
    side = batch.shape[-1]
    shifts = torch.randint(-most, most + 1, (2, len(batch), 1), generator=generator)
    flip = torch.rand(len(batch), 1, generator=generator) < 0.5
    rows, columns = _reflect(torch.arange(side) + shifts, side)
    columns = torch.where(flip, columns.flip(1), columns)
    index = rows[:, None, :, None].to(batch.device), columns[:, None, None, :].to(batch.device)
    images, channels = torch.arange(len(batch)), torch.arange(3)
    shifted = batch[
        images[:, None, None, None].to(batch.device), channels[None, :, None, None].to(batch.device), *index
    ]
    return normalize(shifted.float().div_(255), mean, std)


def _reflect(index: Tensor, side: int) -> Tensor:
    """Reflect indices beyond 0 and side - 1, without repeating the border."""
    last = max(1, side - 1)
    return (last - (index % (2 * last) - last).abs()).clamp(max=side - 1)


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute (x - mean) / std for each channel, in place."""
    shape = (1, 3, 1, 1)
    return x.sub_(x.new_tensor(mean).view(shape)).div_(x.new_tensor(std).view(shape))


def random_resized_crop(x: Tensor, side: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Crop a random box from each image and flip it with p 0.5: float [B, 3, S, S] -> [B, 3, side, side]."""
    box = random_boxes(len(x), x.shape[-1], scale, generator)
    flip = _rand(generator, len(x)) < 0.5
    return resized_crop(x, side, box.to(x.device), flip.to(x.device))


def random_boxes(n: int, source: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Boxes int64 [n, 4]: top, left, height, width, drawn from a square like torchvision's RandomResizedCrop.

    Each is the first of ten draws that fits; if none does, it is the whole square of side `source`.
    """
    area, log_ratio, top, left = _rand(generator, 4, 10, n)
    area = source**2 * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = torch.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * log_ratio)
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height <= source) & (width <= source) & (height > 0) & (width > 0)
    boxes = torch.stack([top * (source + 1 - height), left * (source + 1 - width), height, width], -1).long()
    boxes[~fits] = torch.tensor([0, 0, source, source], device=boxes.device)
    return boxes[fits.int().argmax(0), torch.arange(n, device=boxes.device)]


def resized_crop(x: Tensor, side: int, box: Tensor, flip: Tensor) -> Tensor:
    """Cut out `box` (int64 [B, 4], as above), resize to side x side, mirror where `flip` (bool [B])."""
    top, left, height, width = box.unbind(1)
    rows = _resize_weights(x.shape[2], side, top, height, torch.zeros_like(flip))
    return _separable(x, rows, _resize_weights(x.shape[3], side, left, width, flip))


def _separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns.T for each image and channel: [B, 3, H, W], [B, h, H], [B, w, W] -> [B, 3, h, w]."""
    return rows.unsqueeze(1) @ (x.flatten(1, 2) @ columns.mT).unflatten(1, x.shape[1:3])


def _resize_weights(source: int, side: int, start: Tensor, length: Tensor, flip: Tensor) -> Tensor:
    """Weight of each source pixel in each output pixel, float [B, side, source].

    A triangle filter as wide as two pixels of the coarser grid, cut off at the box.
    """
    out = torch.arange(side, device=start.device, dtype=torch.float32)
    out = torch.where(flip[:, None], side - 1 - out, out) + 0.5
    step = (length / side)[:, None]
    center = (start[:, None] + out * step)[..., None]
    pixel = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    weights = (1 - (pixel - center).abs_().div_(step.clamp(min=1)[..., None])).clamp_(min=0)
    end = start + length
    weights *= ((pixel > start[:, None]) & (pixel < end[:, None]))[:, None]
    return weights.div_(weights.sum(-1, keepdim=True))


def random_jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Apply color jitter in place, with separate factors for each image (none for one in five).

    The order of the four steps is drawn once per call, that is per crop and batch, not per image.
    """
    spread = (2 * _rand(generator, 4, len(x)) - 1) * (_rand(generator, len(x)) < JITTER_P)
    spread = spread.to(x.device)[..., None, None, None]
    steps = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for k in torch.randperm(4, generator=generator, device=generator.device).tolist():
        x = steps[k](x, JITTER[k] * spread[k] + IDENTITY[k])
    return x


def random_gray(x: Tensor, generator: torch.Generator) -> Tensor:
    """Convert one image in five to gray, in place."""
    chosen = (_rand(generator, len(x)) < GRAY_P).nonzero()[:, 0].to(x.device)
    x[chosen] = luma(x[chosen]).expand(-1, 3, -1, -1)
    return x


def random_blur(x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Blur every other image in place, with a separate sigma drawn from `scale` times `SIGMA`."""
    sigma = scale * (SIGMA[0] + (SIGMA[1] - SIGMA[0]) * _rand(generator, len(x)))
    chosen = (_rand(generator, len(x)) < BLUR_P).nonzero()[:, 0]
    sigma, chosen = sigma[chosen].to(x.device), chosen.to(x.device)
    x[chosen] = gaussian_blur(x[chosen], sigma)
    return x


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale away from black. The four `adjust_*` are torchvision's for a batch, in place: x is float [B, 3, H, W]
    in [0, 1], with one factor (or shift) per image, [B, 1, 1, 1].
    """
    return x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale away from the mean gray of the image."""
    mean = luma(x.mean((2, 3), keepdim=True))
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale away from the gray of the pixel."""
    gray = luma(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` of a full circle; value and saturation (HSV) do not change.

    As a function of the hue in sixths of the circle, each channel is a trapezoid between the pixel's lowest
    and highest value.
    """
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    sixth = 1 / torch.where(chroma > 0, chroma, 1)
    hue = torch.where(high == g, (b - r) * sixth + 2, (r - g) * sixth + 4)
    hue = torch.where(high == r, (g - b) * sixth, hue).add_(6 * shift[:, 0]).remainder_(6)
    red = (hue - 3).abs_().sub_(1).clamp_(0, 1)
    green = (hue - 2).abs_().neg_().add_(2).clamp_(0, 1)
    blue = (hue - 4).abs_().neg_().add_(2).clamp_(0, 1)
    for channel, level in enumerate((red, green, blue)):
        torch.addcmul(low, chroma, level, out=x[:, channel])
    return x


def luma(x: Tensor) -> Tensor:
    """Gray with the weights of ITU-R 601: [B, 3, H, W] -> [B, 1, H, W]."""
    r, g, b = x.split(1, 1)
    return (LUMA[0] * r).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each square image with its own sigma, float [B], px; the image is mirrored at its borders."""
    last = x.shape[-1] - 1
    at = torch.arange(2 * last + 2, device=x.device)
    table = torch.exp(-0.5 * (at / sigma[:, None]) ** 2)  # by distance; the last entry serves as "not seen"
    table = F.threshold(table, 1e-6, 0.0)  # denormals in the tails would be slow
    here, there = at[: last + 1, None], at[None, : last + 1]
    # a source pixel is seen directly and, unless it is outermost, mirrored in both borders
    left = (here + there).masked_fill(there == 0, -1)
    right = (2 * last - here - there).masked_fill(there == last, -1)
    table[:, -1] = 0
    weights = table[:, (here - there).abs()] + table[:, left] + table[:, right]
    weights /= weights.sum(-1, keepdim=True)
    return _separable(x, weights, weights)


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)
