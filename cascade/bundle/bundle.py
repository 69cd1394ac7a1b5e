"""A bundle in memory: everything that an adapted backbone is beyond the backbone."""

from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from torch import Tensor

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
    """A bundle can't be read, was changed since it was written, or does not fit its backbone."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory.

    Attributes:
        name, version: from its folder.
        card: ``cascade.json``.
        preprocessing: images in, tensors out; one normalization a bundle.
        dispatcher, experts: the masks; no experts in a bundle that is one single mask.
        router, calibration: None and identity without experts.
        ood: None where none was fitted.
        fusions, linear, banks: by mode.
        domain: what its images look like to the plain backbone; None where it can't be dispatched to.
        thumbnails: pictures of the banks' rows; None without the option.
        discriminant: what a new class needs (``cascade heads add``); None without the option. Serving needs none of it.
        larger: the same model at a larger input size, with a mask and a head of its own, for images about which this
            one is unsure; it has the name and version of this one. None: there is one input size.
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
    discriminant: Discriminant | None = None
    larger: "Bundle | None" = None
    digest: str = ""

    def __post_init__(self) -> None:
        if self.larger is not None and self.larger.identity != self.identity:
            object.__setattr__(self, "larger", replace(self.larger, name=self.name, version=self.version))

    @property
    def parts(self) -> "tuple[Bundle, ...]":
        """Itself, and the larger input size where there is one."""
        return (self,) if self.larger is None else (self, self.larger)

    @property
    def masks(self) -> tuple[Mask, ...]:
        return (self.dispatcher, *self.experts)

    @property
    def identity(self) -> tuple[str, str]:
        return self.name, self.version

    def to(self, device: str) -> "Bundle":
        """The same bundle with its tensors on ``device`` (banks and thumbnails stay on the CPU)."""
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
        """Resident memory of the bundle, everything counted, materialized weights apart."""
        parts: list[object] = [self.router, self.ood, self.domain, self.thumbnails, self.discriminant]
        parts += [*self.fusions.values(), *self.linear.values()]
        held = [getattr(p, f.name) for p in parts if p is not None for f in fields(p)]  # type: ignore[arg-type]
        counted: list[Mask | Bank] = [*self.masks, *self.banks.values()]
        own = sum(part.bytes() for part in counted) + sum(t.nbytes for t in held)
        return own + (0 if self.larger is None else self.larger.bytes())


def _moved(part: T, device: str) -> T:
    """A dataclass of tensors (or of tables of tensors) on another device."""
    move = {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]
    for name, value in move.items():
        if isinstance(value, Tensor):
            move[name] = value.to(device)
        elif isinstance(value, dict):
            move[name] = {k: t.to(device) for k, t in value.items()}
    return type(part)(**move)
