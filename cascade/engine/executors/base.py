"""What the executors with weights of their own have in common: packing masks and swapping them."""

from functools import cached_property

from torch import Tensor

from cascade.engine.executors.weight_layout import Flat, Packed
from cascade.engine.weight_cache import Residency
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask


class FlatExecutor:
    """Swaps masks of a folded backbone; what runs under them is for a subclass, in ``point`` and ``run``.

    Attributes:
        backbone: gives names and sizes; its maskable weights may have been released.
        flat: the weights in this executor's order. residency: materialised weights, shared between backbones.
        plain: what runs without a mask, ordered like ``flat.pristine``.
    """

    backbone: Backbone
    flat: Flat
    residency: Residency
    plain: Tensor
    _now: Packed | None = None

    def pack(self, mask: Mask) -> Packed:
        """A mask as this executor keeps it, for ``swap``."""
        return self.flat.pack(mask)

    def size(self, mask: Mask) -> int:
        """Bytes of the mask's materialised weights."""
        return self.flat.size(mask.start)

    def swap(self, mask: Mask | None) -> None:
        """Put a packed mask in place from its first stage on; None: the plain backbone.

        Stages before it keep whatever they had: a caller runs a mask from its own first stage only.
        """
        if mask is self._now:
            return
        if self._now is not None:  # first, so that nothing keeps evicted weights alive
            first = self.flat.first(self._now.start)
            weights, shifts = self.plain[self.flat.begin[first] :], self.flat.shifts[self.flat.row[first] :]
            self.point(first, weights, shifts, {name: self.flat.loose[name] for name in self._now.loose})
            self._now = None
        if mask is None:
            return
        assert isinstance(mask, Packed), "a mask is packed before it is swapped"
        weights = self.residency.get(mask, self.size(mask), lambda out: self.materialise(mask, out))
        self.point(self.flat.first(mask.start), weights, mask.shifts, mask.loose)
        self._now = mask

    def ahead(self, mask: Mask) -> None:
        """Begin with the weights of the mask that comes next."""
        assert isinstance(mask, Packed), "a mask is packed before it is swapped"
        self.residency.ahead(mask, self.size(mask), lambda out: self.materialise(mask, out))

    def materialise(self, mask: Packed, out: Tensor | None) -> Tensor:
        """The mask's weights, from its first stage on, in ``out`` where one is given."""
        return self.flat.materialise(mask, out)

    def point(self, first: int, weights: Tensor, shifts: Tensor, loose: dict[str, Tensor]) -> None:
        """Make units from index ``first`` on read these weights and shifts, and the layers these loose tensors."""
        raise NotImplementedError

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Stages ``start`` to ``stop`` under the mask that is in place; see ``Backbone.run``."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Memory of the resident backbone, each tensor once."""
        return self._bytes

    @cached_property
    def _bytes(self) -> int:
        folded = self.flat.folded
        masked = {f"{u.module}.{part}" for u in folded.units for part in ("weight", "bias")} | set(folded.loose)
        models = {**self.backbone.model.state_dict(), **folded.model.state_dict()}
        held = [
            self.flat.pristine,
            self.flat.shifts,
            self.plain,
            *self.flat.loose.values(),
            *self.backbone.norms.values(),
        ]
        storages = [
            t.untyped_storage() for t in held + [t for name, t in models.items() if name not in masked] if not t.is_meta
        ]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values()) + folded.bytes()
