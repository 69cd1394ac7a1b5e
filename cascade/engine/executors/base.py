"""Base class of executors with their own weights: packing and swapping masks."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from cascade.engine.weight_cache import WeightCache
from cascade.kernels.weight_layout import PackedMask, WeightLayout
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask


class BaseExecutor:
    """Swaps masks of a folded backbone; subclasses implement the forward pass in ``point`` and ``run``.

    Attributes:
        backbone: gives names and sizes; its maskable weights may have been released.
        layout: the weights in this executor's order. weight_cache: materialized weights, shared between backbones.
        plain: the weights without a mask, ordered like ``layout.pristine``.
        kind, error: see ``Executor``.
    """

    backbone: Backbone
    layout: WeightLayout
    weight_cache: WeightCache
    plain: Tensor
    kind: str = "folded"
    error: float = 0.0
    _now: PackedMask | None = None

    def pack(self, mask: Mask) -> PackedMask:
        """Convert a mask to this executor's form, for ``swap``."""
        return self.layout.pack(mask)

    def size(self, mask: Mask) -> int:
        """Bytes of the mask's materialized weights."""
        return self.layout.size(mask.start)

    def export(self, masks: Sequence[Mask], size: int, domain: int = 0) -> None:
        """Do nothing."""

    def prepare(self, masks: Sequence[Mask], size: int, domain: int = 0, batch: int = 32) -> None:
        """Do nothing: everything is built in the first pass."""

    def forget(self, masks: Sequence[Mask]) -> None:
        """Do nothing: what was built serves any mask."""

    def swap(self, mask: Mask | None) -> None:
        """Apply a packed mask from its first stage on; None: the plain backbone.

        Earlier stages are not touched: callers run a mask only from its own first stage on.
        """
        if mask is self._now:
            return
        if self._now is not None:  # first, so that nothing keeps evicted weights alive
            first = self.layout.first(self._now.start)
            weights, shifts = self.plain[self.layout.begin[first] :], self.layout.shifts[self.layout.row[first] :]
            self.point(first, weights, shifts, {name: self.layout.loose[name] for name in self._now.loose})
            self._now = None
        if mask is None:
            return
        assert isinstance(mask, PackedMask), "a mask is packed before it is swapped"
        weights = self.layout.pristine[:0]
        if self.size(mask):
            weights = self.weight_cache.get(mask, self.size(mask), lambda out: self.materialize(mask, out))
        self.point(self.layout.first(mask.start), weights, mask.shifts, mask.loose)
        self._now = mask

    def prefetch(self, mask: Mask) -> None:
        """Start to materialize the weights of the next mask."""
        assert isinstance(mask, PackedMask), "a mask is packed before it is swapped"
        if self.size(mask):
            self.weight_cache.prefetch(mask, self.size(mask), lambda out: self.materialize(mask, out))

    def materialize(self, mask: PackedMask, out: Tensor | None) -> Tensor:
        """Materialize the mask's weights from its first stage on, into ``out`` if given."""
        return self.layout.materialize(mask, out)

    def point(self, first: int, weights: Tensor, shifts: Tensor, loose: dict[str, Tensor]) -> None:
        """Point units from index ``first`` on at these weights and shifts, and the layers at these loose tensors."""
        raise NotImplementedError

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages ``start`` to ``stop`` under the current mask; see ``Backbone.run``."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Memory of the resident backbone, each tensor counted once."""
        return self._bytes

    @cached_property
    def _bytes(self) -> int:
        folded = self.layout.folded
        masked = {f"{u.module}.{part}" for u in folded.units for part in ("weight", "bias")} | set(folded.loose)
        models = {**self.backbone.model.state_dict(), **folded.model.state_dict()}
        tensors = [
            self.layout.pristine,
            self.layout.plain,
            self.layout.shifts,
            self.plain,
            *self.layout.loose.values(),
            *self.backbone.norms.values(),
        ]
        storages = [
            t.untyped_storage()
            for t in tensors + [t for name, t in models.items() if name not in masked]
            if not t.is_meta
        ]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) + folded.bytes()
