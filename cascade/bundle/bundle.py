"""A bundle in memory: everything an adapted backbone needs besides the backbone."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from cascade.bundle.map import Map
from cascade.bundle.schema import Card
from cascade.bundle.thumbnails import Thumbnails
from cascade.errors import CascadeError
from cascade.model.discriminant import Discriminant
from cascade.model.domain import Domain
from cascade.model.fusion import Fusion, Mode
from cascade.model.heads import Bank, Linear
from cascade.model.masks import Mask
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import Calibration, Router

T = TypeVar("T")


class BundleError(CascadeError):
    """A bundle can't be read, has been changed since it was written, or does not fit its backbone."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory.

    Attributes:
        name, version: from its folder.
        card: ``cascade.json``.
        preprocessing: images in, tensors out; one normalization per bundle.
        dispatcher, experts: the masks; a single-mask bundle has no experts.
        router, calibration: None and identity without experts.
        ood: None if not fitted.
        fusions, linear, banks: by mode.
        domain: statistics of its images under the plain backbone; None if images can't be dispatched to it.
        thumbnails: small images of the banks' rows; None without the option.
        map: places of the banks' rows in the plane, for people; None without a bank, and in older bundles.
        discriminant: statistics for adding classes (``cascade heads add``); None without the option. Not needed for
            serving.
        larger: the same model at a larger input size, with its own mask and head, for images about which this one is
            unsure; it has the same name and version. None if there is only one input size.
        digest: over every byte of its files, in hex; empty if it was not read from files.
    """

    name: str
    version: str
    card: Card
    preprocessing: Preprocessing
    dispatcher: Mask
    experts: tuple[Mask, ...]
    router: Router | None
    calibration: Calibration
    ood: OutOfDomain | None
    fusions: dict[Mode, Fusion]
    linear: dict[Mode, Linear] = field(default_factory=dict)
    banks: dict[Mode, Bank] = field(default_factory=dict)
    domain: Domain | None = None
    thumbnails: Thumbnails | None = None
    map: Map | None = None
    discriminant: Discriminant | None = None
    larger: "Bundle | None" = None
    digest: str = ""

    def __post_init__(self) -> None:
        if self.larger is not None and self.larger.identity != self.identity:
            object.__setattr__(self, "larger", replace(self.larger, name=self.name, version=self.version))

    @property
    def parts(self) -> "tuple[Bundle, ...]":
        """This bundle, and the larger input size if there is one."""
        return (self,) if self.larger is None else (self, self.larger)

    @property
    def masks(self) -> tuple[Mask, ...]:
        return (self.dispatcher, *self.experts)

    @property
    def identity(self) -> tuple[str, str]:
        return self.name, self.version

    def to(self, device: str) -> "Bundle":
        """The same bundle with its tensors on ``device`` (banks, thumbnails and map stay on the CPU)."""
        return replace(
            self,
            dispatcher=_moved(self.dispatcher, device),
            experts=tuple(_moved(m, device) for m in self.experts),
            router=None if self.router is None else _moved(self.router, device),
            ood=None if self.ood is None else _moved(self.ood, device),
            domain=None if self.domain is None else _moved(self.domain, device),
            fusions={mode: _moved(f, device) for mode, f in self.fusions.items()},
            linear={mode: _moved(h, device) for mode, h in self.linear.items()},
            larger=None if self.larger is None else self.larger.to(device),
        )

    def bytes(self) -> int:
        """Resident memory of the whole bundle, without materialized weights."""
        return self._bytes

    @cached_property
    def _bytes(self) -> int:
        parts: list[object] = [self.router, self.ood, self.domain, self.thumbnails, self.map, self.discriminant]
        parts += [*self.fusions.values(), *self.linear.values()]
        tensors = [getattr(p, f.name) for p in parts if p is not None for f in fields(p)]  # type: ignore[arg-type]
        sized: list[Mask | Bank] = [*self.masks, *self.banks.values()]
        total = sum(part.bytes() for part in sized) + sum(t.nbytes for t in tensors)
        return total + (0 if self.larger is None else self.larger.bytes())


def _moved(part: T, device: str) -> T:
    """Move a dataclass of tensors, or of dictionaries of tensors, to another device."""
    values = {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = value.to(device)
        elif isinstance(value, dict):
            values[name] = {k: t.to(device) for k, t in value.items()}
    return type(part)(**values)
