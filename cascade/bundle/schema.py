"""The schema of a bundle's card, ``cascade.json`` (docs/bundle-format.md)."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cascade.model.backbone import Backbone
from cascade.model.fusion import Mode

FORMAT = 2
"""The newest format. A bundle without new features is written as format 1, so that older versions can read it."""
MAX_WEIGHTS = 2**32  # per mask: half a gigabyte of bits
SOURCE = r"^(timm|random:[0-9]{0,18}|file:[^/\\\x00-\x1f]+|package:[A-Za-z_]\w*(/\w[\w.-]*)+)$"
"""Where weights come from. A file is given by name only, so that a card can't open an arbitrary path."""


class Finite(BaseModel):
    """A part of the card that rejects NaN and infinity."""

    model_config = ConfigDict(allow_inf_nan=False)


class BackboneCard(Finite):
    """The backbone that the masks belong to."""

    name: str
    source: str = Field(pattern=SOURCE)
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    features: int = Field(gt=0)
    stages: list[str]
    maskable: int = Field(gt=0, le=MAX_WEIGHTS)

    @classmethod
    def of(cls, backbone: Backbone) -> "BackboneCard":
        """The card of a loaded backbone."""
        return cls(
            name=backbone.name,
            source=backbone.source,
            fingerprint=backbone.fingerprint,
            features=backbone.features,
            stages=[stage.name for stage in backbone.stages],
            maskable=backbone.weights.numel(),
        )


class MaskCard(Finite):
    """One mask: its first stage, the number of weights that it covers, and the share that it keeps."""

    name: str
    start: int = Field(ge=0)
    weights: int = Field(ge=0, le=MAX_WEIGHTS)
    density: float = Field(ge=0, le=1)
    differs_from_dispatcher: float = Field(default=0.0, ge=0, le=1)


class RouterCard(Finite):
    """The router's kind, the shares of its clusters in training, and its calibration."""

    kind: str
    shares: list[float]
    slope: float = 1.0
    intercept: float = 0.0


class DomainCard(Finite):
    """The stage of the plain backbone before which the domain of the bundle's images was fitted."""

    stage: int = Field(ge=0)


class DeferralCard(Finite):
    """When images are deferred to a larger input size, and how that performed on held-out images.

    Attributes:
        threshold: an image is deferred if its most likely class has a lower probability than this.
        lose: points of accuracy, relative to always using the larger size, that the threshold may cost.
        share: of the validation images that were deferred.
        accuracy: measurements from training.
        preprocessing, mask: of the larger size.
    """

    threshold: float = Field(ge=0, le=1)
    lose: float = Field(ge=0)
    share: float = Field(ge=0, le=1)
    accuracy: dict[str, Any] = {}
    preprocessing: dict[str, Any]
    mask: MaskCard


class Versioned(BaseModel):
    """The one field that cards of every format have."""

    format: int


class Card(Versioned):
    """``cascade.json``: what the loader and the reader need to know."""

    model_config = ConfigDict(extra="forbid")
    backbone: BackboneCard
    preprocessing: dict[str, Any]
    masks: list[MaskCard] = Field(min_length=1, max_length=1025)
    router: RouterCard | None = None
    domain: DomainCard | None = None
    deferral: DeferralCard | None = None
    mode: Mode
    dim: int = Field(gt=0)
    classes: list[str] = []
    training: dict[str, Any] = {}
    accuracy: dict[str, Any] = {}
    bytes: dict[str, int] = {}

    def larger(self) -> "Card | None":
        """The card of the larger input size: a bundle with one mask and its head; the rest is shared."""
        if self.deferral is None:
            return None
        own = {"preprocessing": self.deferral.preprocessing, "masks": [self.deferral.mask], "mode": "dispatcher"}
        shared = {name: getattr(self, name) for name in ("format", "backbone", "dim", "classes")}
        return Card(**shared | own)
