"""Images ready for a pass, and the transfers between host and device: one up, one down."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cascade.bundle.format import Bundle
from cascade.engine.dispatch_table import DispatchTable, Target
from cascade.engine.results import Dispatch, ItemError, Options, Prediction
from cascade.model.fusion import Mode
from cascade.model.preprocessing import Preprocessing, normalize_on_device

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Entry:
    """Activations of the plain backbone from which an image continues.

    Attributes:
        stage: the first one that has not run.
        x: its input, [...] for this image.
    """

    stage: int
    x: Tensor


@dataclass(frozen=True, eq=False)
class Resolution:
    """The input size of an image, for bundles with two sizes, see ``cascade.engine.deferral``.

    Attributes:
        mode: of the answer.
        cost: of this pass, in passes at the small size.
        larger: pixels for a second pass; None if there will be none.
        first: in the second pass, the answer of the first one.
    """

    mode: str
    cost: int = 1
    larger: Tensor | None = None
    first: Prediction | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """One image that is ready for a pass: decoded, with its bundle and mode resolved.

    Attributes:
        bundle: serves this image even if a newer version arrives before its pass.
        mode: one of the bundle's modes.
        options: what the answer should contain.
        pixels: uint8 [3, H, W], resized and cropped; or float32 [3, H, W], normalized as well.
        entry: where the pass continues if the image was dispatched; None to start from the pixels.
        dispatch: why this bundle was chosen; None if the request named it.
        resolution: None unless the bundle has two input sizes and the mode uses them.
    """

    bundle: Bundle
    mode: Mode
    options: Options
    pixels: Tensor
    entry: Entry | None = None
    dispatch: Dispatch | None = None
    resolution: Resolution | None = None

    @property
    def first(self) -> Prediction | None:
        """The answer of the first pass, if this is the second one."""
        return None if self.resolution is None else self.resolution.first

    @property
    def name(self) -> str | None:
        """Of its bundle."""
        return self.bundle.name


@dataclass(frozen=True, eq=False)
class OpenItem:
    """One decoded image without a bundle; ``cascade.engine.dispatch`` turns it into an ``Item``.

    Attributes:
        table: the bundles that it may be dispatched to.
        options: what the answer should contain.
        pixels: for each space of the table, as in ``Item``.
        larger: for the larger input sizes of the table, if the options may need them.
        file: the encoded image, if unknown ones are kept.
    """

    table: DispatchTable
    options: Options
    pixels: tuple[Tensor, ...]
    larger: Mapping[Preprocessing, Tensor] = field(default_factory=dict)
    file: bytes | None = None

    @property
    def first(self) -> None:
        """What a first pass has answered: nothing yet."""
        return None

    @property
    def name(self) -> str | None:
        """Of its bundle: none yet."""
        return None


@dataclass(frozen=True, eq=False)
class ColdItem:
    """One image that was dispatched to a bundle that is not in memory.

    Attributes:
        target: the bundle.
        settle: makes the image's item from the loaded bundle.
    """

    target: Target
    settle: Callable[[Bundle], Item | ItemError]


AnyItem = Item | OpenItem
PassAnswer = Prediction | ItemError | Item | ColdItem
"""What a pass gives for an image: its answer, or what another pass needs."""


def group_key(item: AnyItem) -> Hashable:
    """Items with equal keys wait together: those of one bundle, and those still to be dispatched."""
    return trunk(item), () if isinstance(item, OpenItem) else item.bundle.identity


def trunk(item: AnyItem) -> Hashable:
    """Items with equal keys share one pass of the plain backbone, up to their dispatchers' first stage."""
    if isinstance(item, OpenItem):
        return item.table
    bundle, preprocessing = item.bundle, item.bundle.preprocessing
    normalization = preprocessing.mean, preprocessing.std
    begin = 0 if item.entry is None else item.entry.stage
    return bundle.card.backbone.fingerprint, bundle.dispatcher.start, begin, item.pixels.shape, normalization


def passes(item: AnyItem) -> int:
    """The cost of an image in passes: one under the dispatcher, and one under each expert that its mode uses.

    At the larger of two input sizes, it is the equivalent number of passes at the smaller one.
    """
    if isinstance(item, OpenItem):
        return 2  # the trunk to dispatch it, and a pass; what it takes beyond that is charged after the pass
    if item.resolution is not None:
        return item.resolution.cost
    experts = len(item.bundle.experts)
    return 1 + (experts if item.mode == "unconditional" else min(experts, 1) if item.mode == "conditional" else 0)


def stack(items: Sequence[Item], device: str) -> Tensor:
    """The input of items that share a trunk, on the device: activations, or normalized pixels float32 [N, 3, H, W]."""
    entries = [item.entry.x for item in items if item.entry is not None]
    if entries:
        return torch.stack(entries)
    return stack_pixels([item.pixels for item in items], items[0].bundle.preprocessing, device)


def stack_pixels(pixels: Sequence[Tensor], preprocessing: Preprocessing, device: str) -> Tensor:
    """Normalized pixels, float32 [N, 3, H, W], on the device.

    Bytes take a quarter of the floats' memory, so bytes are transferred, from pinned memory, and the device normalizes.
    """
    if all(image.dtype == torch.uint8 for image in pixels):
        rows = [image.permute(1, 2, 0) for image in pixels]  # the decoders' layout, and channels last for the pass
        batch = torch.empty((len(rows), *rows[0].shape), dtype=torch.uint8, pin_memory=_pinned(device))
        torch.stack(rows, out=batch)
        images = batch.to(device, non_blocking=True).permute(0, 3, 1, 2)
        return normalize_on_device(images, preprocessing.mean, preprocessing.std)
    floats = [preprocessing.normalize(image.numpy()) if image.dtype == torch.uint8 else image for image in pixels]
    batch = torch.empty((len(floats), *floats[0].shape), pin_memory=_pinned(device))
    return torch.stack(floats, out=batch).to(device, non_blocking=True)


def upload(values: Sequence[Any], device: str | torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copy numbers, or rows of numbers, to the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=_pinned(device)).to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copy tensors to float32 arrays of the same shapes in one transfer, the only one that waits for the device.

    Integers must be below 2^24, which float32 holds exactly.
    """
    if not tensors:
        return []
    flat = torch.cat([tensor.float().flatten() for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(flat, ends[:-1]), tensors, strict=True)]


def _pinned(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group items with equal keys, in the order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [*groups.values()]
