"""An executor's own flat buffer: the folded weights in the order in which its kernels read them.

``Backbone.weights`` and the bits of a ``Mask`` are in the model's order. An executor may need another one (channels
last, blocks of 16 output channels). Its weights are then reordered once, and the bits of each mask when it is loaded,
so that a swap is still one pass over memory: bits and pristine weights in, masked and scaled weights out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cascade.cpus import cpu_count
from cascade.kernels.materialize import cut
from cascade.model.folding import Folded
from cascade.model.masks import Mask, pack, unpack

ALIGN = 16  # weights: each unit begins at a word of bits, and at a cache line


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """The order in which an executor stores the weights of one unit, which the model stores as ``[rows, columns]``.

    Attributes:
        block: rows that are interleaved weight by weight (1: row by row, 8 or 16: blocked).
        columns: int32 [places], the column at each place of a row, -1 for padding.
    """

    block: int
    columns: np.ndarray

    def arrange(self, matrix: Tensor) -> Tensor:
        """Arrange [rows, columns] in this order, flat, padded with zeros (False)."""
        rows, places = -(-len(matrix) // self.block) * self.block, torch.from_numpy(self.columns).to(matrix.device)
        padded = matrix.new_zeros(rows, matrix.shape[1] + 1)
        padded[: len(matrix), : matrix.shape[1]] = matrix
        return padded[:, places.long()].view(rows // self.block, self.block, -1).transpose(1, 2).reshape(-1)


@dataclass(frozen=True, eq=False)
class PackedMask(Mask):
    """A mask in an executor's form: bits in its order, and the folded scales and shifts.

    Attributes:
        scales, shifts: float32 [rows], padded to whole blocks, from the mask's first stage to the end.
        steps: for a 1-bit delta, the folded delta of each row, like ``scales``; empty for a mask.
        loose: the other tensors that it changes, by name, see ``Folded``.
    """

    scales: Tensor = field(default_factory=lambda: torch.empty(0))
    shifts: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: Tensor = field(default_factory=lambda: torch.empty(0))
    loose: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "PackedMask":
        """The same on another device."""
        loose = {name: t.to(device) for name, t in self.loose.items()}
        bits, scales, shifts, steps = (t.to(device) for t in (self.bits, self.scales, self.shifts, self.steps))
        return replace(self, bits=bits, scales=scales, shifts=shifts, steps=steps, loose=loose)

    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.bits, self.scales, self.shifts, self.steps, *self.loose.values()))


class WeightLayout:
    """The pristine weights of a folded backbone in an executor's order.

    Attributes:
        pristine: float32 [n], the folded weights, which masks multiply.
        plain: float32 [n], the weights of a pass without a mask; the same tensor as ``pristine``, unless the backbone
            switches channels off (BatchNorm scale 0).
        shifts: float32 [rows], the shifts without a mask. loose: the backbone's loose tensors, see ``Folded``.
        begin: where each unit's weights begin, int64 [units + 1]; row: where its rows begin.
    """

    def __init__(self, folded: Folded, orders: Sequence[BlockOrder]) -> None:
        self.folded, self.orders = folded, list(orders)
        units = folded.units
        blocks = [-(-u.rows // o.block) for u, o in zip(units, orders, strict=True)]
        sizes = [n * o.block * len(o.columns) for n, o in zip(blocks, orders, strict=True)]
        self.begin = np.cumsum([0, *(-(-size // ALIGN) * ALIGN for size in sizes)])
        self.row = np.cumsum([0, *(n * o.block for n, o in zip(blocks, orders, strict=True))])
        device = folded.backbone.weights.device
        state = folded.model.state_dict()
        self.loose = {name: state[name].detach().clone() for name in folded.loose}
        self.pristine = torch.zeros(int(self.begin[-1]), device=device)
        self.shifts = torch.zeros(int(self.row[-1]), device=device)
        off = {}  # the plain backbone's scales by unit, if they are not all 1
        for i, (unit, order) in enumerate(zip(units, orders, strict=True)):
            affine = folded.plain(unit)
            self.pristine[self.begin[i] : self.begin[i] + sizes[i]] = order.arrange(folded.weight(unit))
            self.shifts[self.row[i] : self.row[i] + unit.rows] = torch.from_numpy(affine.shift)
            if not (affine.scale == 1).all():
                off[i] = torch.from_numpy(affine.scale).float().to(device)
        self.plain = self.pristine.clone() if off else self.pristine
        for i, scale in off.items():
            weight = folded.weight(units[i]) * scale[:, None]
            self.plain[self.begin[i] : self.begin[i] + sizes[i]] = orders[i].arrange(weight)
        # Pieces that share a set of scales: a row, or a block of rows.
        per = [len(o.columns) * o.block for o in orders]
        begin = np.concatenate([b + np.arange(n) * p for b, n, p in zip(self.begin, blocks, per, strict=False)])
        end = begin + np.repeat(per, blocks)
        rows = np.concatenate([_lanes(r, n, o.block) for r, n, o in zip(self.row, blocks, orders, strict=False)])
        self._pieces = begin, end, rows
        self._plans: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._tiles: dict[int, Tensor] = {}
        self._paddings: dict[int, Tensor] = {}

    def first(self, stage: int) -> int:
        """Index of the first unit that belongs to ``stage`` or a later one."""
        return next((i for i, u in enumerate(self.folded.units) if u.stage >= stage), len(self.folded.units))

    def size(self, stage: int) -> int:
        """Bytes of the materialized weights of a mask that begins at ``stage``."""
        return 4 * int(self.begin[-1] - self.begin[self.first(stage)])

    def pack(self, mask: Mask) -> PackedMask:
        """Convert a mask to this order, on the CPU; the bits in the model's order are not kept."""
        first = self.first(mask.start)
        scales, shifts, steps = (np.zeros(self.row[-1] - self.row[first], np.float32) for _ in range(3))
        for i, affine in enumerate(self.folded.affines(mask), first):
            rows = slice(self.row[i] - self.row[first], self.row[i] - self.row[first] + len(affine.scale))
            scales[rows], shifts[rows], steps[rows] = affine.scale, affine.shift, affine.delta
        return PackedMask(
            mask.name,
            mask.start,
            self._reorder(mask),
            scales=torch.from_numpy(scales),
            shifts=torch.from_numpy(shifts),
            steps=torch.from_numpy(steps if mask.deltas else steps[:0]),
            loose=self.folded.loosened(mask),
        )

    def materialize(self, mask: PackedMask, out: Tensor | None = None) -> Tensor:
        """Masked and scaled weights, float32 [n], from the mask's first stage to the end.

        On a GPU ``out`` may be bfloat16.
        """
        pristine = self.pristine[self.begin[self.first(mask.start)] :]
        out = torch.empty_like(pristine) if out is None else out
        if pristine.is_cuda:
            from cascade.kernels import triton

            if not mask.steps.numel():
                triton.masked(mask.bits, pristine, self.tiles(mask.start), mask.scales, out)
                return out
            triton.signed(mask.bits, pristine, self.tiles(mask.start), mask.scales, mask.steps, out)
            return out.index_fill_(0, self._padding(mask.start), 0)
        from cascade.kernels import cpu  # importing numba takes a second

        begin, end, rows = self._plan(mask.start)
        bits, scales = mask.bits.numpy(), mask.scales.numpy()[rows]
        if not mask.steps.numel():
            cpu.masked(bits, pristine.numpy(), begin, end, scales, out.numpy())
            return out
        cpu.signed(bits, pristine.numpy(), begin, end, scales, mask.steps.numpy()[rows], out.numpy())
        out[self._padding(mask.start)] = 0  # padding bits are zero, which a delta reads as minus
        return out

    def materialize_plain(self, mask: PackedMask) -> Tensor:
        """``materialize`` in plain PyTorch: the reference for every kernel, on any device."""
        pristine = self.pristine[self.begin[self.first(mask.start)] :]
        rows = self._rows(mask.start)
        active = unpack(mask.bits, len(pristine))
        scale = torch.where(rows < 0, 0, mask.scales[rows])
        if not mask.steps.numel():
            return pristine * active * scale
        step = torch.where(rows < 0, 0, mask.steps[rows])
        return pristine * scale + torch.where(active, step, -step)

    def _rows(self, stage: int) -> Tensor:
        """The row of each weight from ``stage`` on, int64 [n]; -1 for padding."""
        first = self.first(stage)
        rows = torch.full((int(self.begin[-1] - self.begin[first]),), -1)
        for i, order in enumerate(self.orders[first:], first):
            unit = self.folded.units[i]
            row_of = torch.arange(unit.rows)[:, None].expand(-1, unit.columns) + int(self.row[i] - self.row[first]) + 1
            arranged = order.arrange(row_of.contiguous()) - 1  # padding is 0 before, -1 after
            rows[self.begin[i] - self.begin[first] :][: len(arranged)] = arranged
        return rows.to(self.pristine.device)

    def _padding(self, stage: int) -> Tensor:
        """Positions of padding from ``stage`` on, int64 [places]."""
        if stage not in self._paddings:
            self._paddings[stage] = (self._rows(stage) < 0).nonzero().flatten()
        return self._paddings[stage]

    def tiles(self, stage: int) -> Tensor:
        """The table of a GPU launch from ``stage`` on, see ``cascade.kernels.triton``; cached, shared by all masks."""
        if stage not in self._tiles:
            from cascade.kernels import triton

            i = self.first(stage)
            blocks = [order.block for order in self.orders[i:]]
            pieces = [len(order.columns) * order.block for order in self.orders[i:]]
            table = triton.tiles(self.begin[i:] - self.begin[i], self.row[i:-1] - self.row[i], pieces, blocks)
            self._tiles[stage] = table.to(self.pristine.device)
        return self._tiles[stage]

    def _plan(self, stage: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces from ``stage`` on, balanced over threads: begin, end, and the rows of their lanes, int64 [P, 16]."""
        if stage not in self._plans:
            i = self.first(stage)
            begin, end, rows = self._pieces
            keep = begin >= self.begin[i]
            starts, ends, which = cut(begin[keep] - self.begin[i], end[keep] - self.begin[i], 1 << 14)
            threads = cpu_count()  # a thread takes a run of pieces: deal them out, because late ones are larger
            dealt = np.concatenate([np.arange(len(starts))[t::threads] for t in range(threads)])
            self._plans[stage] = starts[dealt], ends[dealt], (rows[keep] - self.row[i])[which][dealt]
        return self._plans[stage]

    def _reorder(self, mask: Mask) -> Tensor:
        """Reorder the bits of ``mask``, uint8."""
        from cascade.kernels import cpu

        first = self.first(mask.start)
        out = np.zeros((self.begin[-1] - self.begin[first]) // 8, np.uint8)
        units, tasks, columns = self._tasks
        if len(tasks := tasks[units >= first]):
            tasks[:, 0] -= self.folded.backbone.offset(mask.start)
            cpu.reorder(mask.bits.cpu().numpy(), tasks, columns, out)
        return torch.from_numpy(out)

    @cached_property
    def _tasks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of ``kernels.cpu.reorder``: the unit of each task, the tasks, and the columns of all units."""
        units, tasks, end = [], [], 0
        for i, (unit, order) in enumerate(zip(self.folded.units, self.orders, strict=True)):
            span = (end, end := end + len(order.columns))
            groups = -(-unit.rows // order.block)
            # Row by row, rows may share a byte, so the unit is one task. Blocks begin at a byte, so each is a task.
            together = order.block == 1 or order.block * len(order.columns) % ALIGN
            for group in (0,) if together else range(groups):
                count = groups if together else 1
                task = (unit.offset, group * order.block, unit.rows, count, order.block, unit.columns, *span)
                tasks.append(task)
                units.append(i)
        columns = np.concatenate([order.columns for order in self.orders])
        return np.array(units), np.array(tasks), columns

    def reorder_plain(self, mask: Mask) -> Tensor:
        """``_reorder`` in plain PyTorch: its reference."""
        first, origin = self.first(mask.start), self.folded.backbone.offset(mask.start)
        active = unpack(mask.bits, self.folded.backbone.weights.numel() - origin)
        out = torch.zeros(int(self.begin[-1] - self.begin[first]), dtype=torch.bool)
        for i in range(first, len(self.orders)):
            unit = self.folded.units[i]
            bits = active[unit.offset - origin :][: unit.rows * unit.columns].view(unit.rows, unit.columns)
            arranged = self.orders[i].arrange(bits)
            out[self.begin[i] - self.begin[first] :][: len(arranged)] = arranged
        return pack(out)


def _lanes(row: int, groups: int, block: int) -> np.ndarray:
    """Rows of the sixteen lanes of each group: int64 [groups, 16]."""
    return row + np.arange(groups)[:, None] * block + np.arange(ALIGN)[None, :] % block
