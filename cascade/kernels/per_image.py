"""Layers for batches in which every image has its own mask: bits are applied in registers, inside the product.

Masked weights are never written to memory. A program loads a tile of one image's pixels and a tile of the pristine
weights, zeroes the weights that the image's mask switches off, multiplies, and applies the mask's scale and shift to
each row of the result. Programs of different images that need the same weights run side by side, so memory is read once
and the cache serves the rest. A table of addresses points to the masks, so none is copied (as in Punica's SGMV).

Each kernel has a plain reference beside it. Triton's interpreter runs the kernels without a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import conv2d, pad

from cascade.kernels.weight_layout import PackedMask
from cascade.model.masks import unpack


@dataclass(frozen=True)
class Layer:
    """A convolution in a flat buffer, row by row with the input channel innermost; a linear layer is a 1 x 1 one.

    Attributes:
        place: where its weights begin in the flat buffer, a multiple of 16. row: index of its first row there.
        shape: rows, input channels of a group, height and width of the kernel.
        padding: top, left, bottom and right, in pixels; None for "same" padding, with output ceil(size / stride).
    """

    place: int
    row: int
    shape: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def columns(self) -> int:
        return self.shape[1] * self.shape[2] * self.shape[3]

    def of(self, weights: Tensor) -> Tensor:
        """The layer's weights in a flat buffer, [rows * columns]."""
        return weights[self.place : self.place + self.shape[0] * self.columns]

    def output(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Padding at the top and left, and the output's height and width, for an input of this height and width."""
        before, out = [], []
        for axis in (0, 1):
            step, reach = self.stride[axis], self.dilation[axis] * (self.shape[2 + axis] - 1) + 1
            if self.padding is None:
                out.append(-(-size[axis] // step))
                before.append(max((out[-1] - 1) * step + reach - size[axis], 0) // 2)
            else:
                before.append(self.padding[axis])
                out.append((size[axis] + self.padding[axis] + self.padding[2 + axis] - reach) // step + 1)
        return before, out


class Masks:
    """The mask of each image in a batch.

    Args:
        masks: packed, on one device.
        begin, row: where each mask's weights and rows begin in the flat buffer.

    Attributes:
        table: int64 [N, 3]: the addresses of each mask's bits, scales and shifts, as if the mask covered the flat
            buffer from its start. They are valid as long as the masks are alive.
    """

    def __init__(self, masks: Sequence[PackedMask], begin: Sequence[int], row: Sequence[int]) -> None:
        self.masks, self.begin, self.row = list(masks), list(begin), list(row)
        addresses = [
            (m.bits.data_ptr() - b // 8, m.scales.data_ptr() - 4 * r, m.shifts.data_ptr() - m.shifts.itemsize * r)
            for m, b, r in zip(masks, begin, row, strict=True)
        ]
        device = masks[0].bits.device
        table = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.table = table.to(device, non_blocking=True)


def masked_linear(x: Tensor, weights: Tensor, layer: Layer, table: Tensor) -> Tensor:
    """Apply a linear layer, each image under its own mask.

    Args:
        x: float32 or bfloat16 [N * n, ..., in], image by image. weights: the flat buffer, of the same dtype.
        table: for the N images, see ``Masks``; the masks' shifts have the dtype of ``x``.

    Returns:
        [N * n, ..., out].
    """
    tokens = x.reshape(len(table), -1, x.shape[-1]).contiguous()
    out = x.new_empty(*x.shape[:-1], layer.shape[0])
    _launch(tokens, out, (tokens.shape[1], 1), weights, layer, table)
    return out


def masked_conv(x: Tensor, weights: Tensor, layer: Layer, table: Tensor) -> Tensor:
    """Apply a convolution, each image under its own mask.

    ``x`` is [N, in, height, width], channels last; the other arguments are those of ``masked_linear``.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, (height, width) = layer.output(x.shape[2:])
    size = (len(x), layer.shape[0], height, width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _launch(x, out, x.shape[2:], weights, layer, table)
    return out


def masked_linear_plain(x: Tensor, weights: Tensor, layer: Layer, masks: Masks) -> Tensor:
    """``masked_linear`` in plain PyTorch."""
    tokens = x.reshape(len(masks.masks), -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return masked_conv_plain(tokens, weights, layer, masks).permute(0, 2, 3, 1).reshape(*x.shape[:-1], layer.shape[0])


def masked_conv_plain(x: Tensor, weights: Tensor, layer: Layer, masks: Masks) -> Tensor:
    """``masked_conv`` in plain PyTorch: one image after another, each with its own weight."""
    (top, left), out = layer.output(x.shape[2:])
    rows, channels, *kernel = layer.shape
    # Pad the bottom and right as far as the last output reaches.
    reach = [
        (n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(out, layer.stride, layer.dilation, kernel, strict=True)
    ]
    x = pad(x, (left, reach[1] - x.shape[3] - left, top, reach[0] - x.shape[2] - top))
    outputs = []
    for image, mask, begin, row in zip(x, masks.masks, masks.begin, masks.row, strict=True):
        pristine = layer.of(weights)
        active = unpack(mask.bits[(layer.place - begin) // 8 :], len(pristine))
        scale, shift = (t[layer.row - row :][:rows] for t in (mask.scales, mask.shifts))
        weight = (pristine * active).view(rows, -1) * scale[:, None]
        weight = weight.view(rows, *kernel, channels).permute(0, 3, 1, 2).to(x.dtype)
        outputs.append(conv2d(image[None], weight, shift.to(x.dtype), layer.stride, 0, layer.dilation, layer.groups))
    return torch.cat(outputs)


def precision(device: torch.device) -> str:
    """Triton's precision of float32 products, following PyTorch's ``torch.set_float32_matmul_precision``.

    The default uses three tensor-core products of 19-bit parts, accurate to a bit or two of float32.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _launch(x: Tensor, out: Tensor, size: Sequence[int], weights: Tensor, layer: Layer, table: Tensor) -> None:
    """Launch any layer as a convolution over images of height and width ``size``."""
    largest = max(x.numel() // max(1, len(table)), out.numel() // max(1, len(table)), weights.numel())
    assert largest < 1 << 31, "offsets in one image, and in the flat buffer, are 32 bits"
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _launch_on(x, out, size, weights, layer, table)


def _launch_on(x: Tensor, out: Tensor, size: Sequence[int], weights: Tensor, layer: Layer, table: Tensor) -> None:
    (top, left), (height, width) = layer.output(size)
    (rows, channels, tall, across), pixels, groups = layer.shape, height * width, layer.groups
    if not pixels:
        return
    geometry = width, *size, across, *layer.stride, top, left, *layer.dilation
    ahead = layer.of(weights), table, out, layer.place, layer.row, pixels
    if groups == rows and channels == 1:
        wide = min(64, triton.next_power_of_2(rows))
        grid = (len(table), triton.cdiv(pixels, 32), triton.cdiv(rows, wide))
        _depthwise[grid](x, *ahead, rows, tall * across, *geometry, PIXELS=32, ROWS=wide, num_warps=4)
        return
    many = min(128, max(16, triton.next_power_of_2(pixels)))
    block = min(64, max(16, triton.next_power_of_2(rows // groups)))
    deep = min(32, max(16, triton.next_power_of_2(layer.columns)))
    grid = (len(table), triton.cdiv(pixels, many), groups * triton.cdiv(rows // groups, block))
    _product[grid](
        x,
        *ahead,
        rows // groups,
        channels,
        groups,
        layer.columns,
        *geometry,
        ONE_TAP=tall * across == 1 or channels % deep == 0,
        WORDS=layer.columns % 16 == 0,
        PRECISION=precision(x.device),
        WIDEN=not isinstance(_product, triton.JITFunction),  # the interpreter treats bfloat16 as integers
        PIXELS=many,
        ROWS=block,
        DEEP=deep,
        num_warps=8 if many == 128 else 4,
        num_stages=3,
    )


@triton.jit
def _bits(bits, o, r, begin, rows, columns, WORDS: tl.constexpr, DEEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of a step's weights: words [ROWS, DEEP / 16] if rows begin at a word, else shifted bits [ROWS, DEEP]."""
    if WORDS:
        word = begin // 16 + tl.arange(0, DEEP // 16)
        valid = (o < rows)[:, None] & (word * 16 < columns)[None, :]
        loaded = tl.load(bits + (r * columns // 16)[:, None] + word[None, :], mask=valid, other=0).to(tl.int32)
    else:
        k = begin + tl.arange(0, DEEP)
        valid = (o < rows)[:, None] & (k < columns)[None, :]
        at = (r * columns)[:, None] + k[None, :]
        loaded = tl.load(bits + at // 16, mask=valid, other=0).to(tl.int32) >> (at % 16)
    return loaded


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, weights, table, out, place, row, pixels, rows, channels, groups, columns,
    width_out, height, width, across, stride_y, stride_x, top, left, apart_y, apart_x,
    ONE_TAP: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """A tile [PIXELS, ROWS] of one image's output: an implicit matrix product over taps and channels."""
    image = tl.program_id(0).to(tl.int64)  # the fastest axis: neighbors share the weights
    blocks = tl.cdiv(rows, ROWS)
    group = tl.program_id(2) // blocks
    t = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    o = tl.program_id(2) % blocks * ROWS + tl.arange(0, ROWS)
    r = group * rows + o
    y, z = (t // width_out * stride_y - top)[:, None], (t % width_out * stride_x - left)[:, None]
    x += image * height * width * groups * channels + group * channels
    bits = tl.load(table + image * 3).to(tl.pointer_type(tl.int16)) + place // 16
    total = tl.zeros((PIXELS, ROWS), tl.float32)
    # Two-byte loads can't be asynchronous copies, so each step prefetches the bits of the next one before its product.
    ahead = _bits(bits, o, r, 0, rows, columns, WORDS, DEEP)
    for begin in range(0, columns, DEEP):
        active = ahead
        ahead = _bits(bits, o, r, begin + DEEP, rows, columns, WORDS, DEEP)
        k = begin + tl.arange(0, DEEP)
        if ONE_TAP:  # all columns of this step share a tap: their channels are adjacent
            tap = begin // channels
            channel = (k - tap * channels)[None, :]
        else:
            tap = (k // channels)[None, :]
            channel = (k % channels)[None, :]
        yy, zz = y + tap // across * apart_y, z + tap % across * apart_x
        inside = (yy >= 0) & (yy < height) & (zz >= 0) & (zz < width) & (t < pixels)[:, None]
        at = (yy * width + zz) * (groups * channels) + channel
        pixel = tl.load(x + at, mask=inside & (k < columns)[None, :], other=0.0)
        if WORDS:  # rows begin at a word of bits, which is read once for its sixteen weights
            word = begin // 16 + tl.arange(0, DEEP // 16)
            there = (o < rows)[:, None] & (word * 16 < columns)[None, :]
            first = (r * columns)[:, None] + (word * 16)[None, :]
            lane = tl.arange(0, 16)[None, None, :]
            weight = tl.load(weights + first[:, :, None] + lane, mask=there[:, :, None], other=0.0)
            weight = tl.where((active[:, :, None] >> lane) & 1 != 0, weight, 0.0)
            weight = tl.reshape(weight, (ROWS, DEEP))
        else:
            there = (o < rows)[:, None] & (k < columns)[None, :]
            at = (r * columns)[:, None] + k[None, :]
            weight = tl.where(active & 1 != 0, tl.load(weights + at, mask=there, other=0.0), 0.0)
        if WIDEN:
            pixel, weight = pixel.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(pixel, tl.trans(weight), total, input_precision=PRECISION)
    scales = tl.load(table + image * 3 + 1).to(tl.pointer_type(tl.float32)) + row
    shifts = tl.load(table + image * 3 + 2).to(tl.pointer_type(out.dtype.element_ty)) + row
    scale = tl.load(scales + r, mask=o < rows, other=0.0)
    shift = tl.load(shifts + r, mask=o < rows, other=0.0).to(tl.float32)
    result = total * scale[None, :] + shift[None, :]
    out += image * pixels * groups * rows
    keep = (t < pixels)[:, None] & (o < rows)[None, :]
    tl.store(out + t[:, None] * (groups * rows) + r[None, :], result.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _depthwise(  # type: ignore[no-untyped-def]
    x, weights, table, out, place, row, pixels, rows, taps,
    width_out, height, width, across, stride_y, stride_x, top, left, apart_y, apart_x,
    PIXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile [PIXELS, ROWS] of one image's depthwise output: memory-bound, no matrix product."""
    image = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    y, z = t // width_out * stride_y - top, t % width_out * stride_x - left
    x += image * height * width * rows
    bits = tl.load(table + image * 3).to(tl.pointer_type(tl.int16)) + place // 16
    total = tl.zeros((PIXELS, ROWS), tl.float32)
    for tap in range(taps):
        yy, zz = y + tap // across * apart_y, z + tap % across * apart_x
        inside = (yy >= 0) & (yy < height) & (zz >= 0) & (zz < width) & (t < pixels)
        mask = inside[:, None] & (r < rows)[None, :]
        pixel = tl.load(x + (yy * width + zz)[:, None] * rows + r[None, :], mask=mask, other=0.0).to(tl.float32)
        at = r * taps + tap
        active = tl.load(bits + at // 16, mask=r < rows, other=0).to(tl.int32) >> (at % 16)
        weight = tl.load(weights + at, mask=r < rows, other=0.0).to(tl.float32)
        total += pixel * tl.where(active & 1 != 0, weight, 0.0)[None, :]
    scales = tl.load(table + image * 3 + 1).to(tl.pointer_type(tl.float32)) + row
    shifts = tl.load(table + image * 3 + 2).to(tl.pointer_type(out.dtype.element_ty)) + row
    scale = tl.load(scales + r, mask=r < rows, other=0.0)
    shift = tl.load(shifts + r, mask=r < rows, other=0.0).to(tl.float32)
    result = total * scale[None, :] + shift[None, :]
    out += image * pixels * rows
    keep = (t < pixels)[:, None] & (r < rows)[None, :]
    tl.store(out + t[:, None] * rows + r[None, :], result.to(out.dtype.element_ty), mask=keep)
