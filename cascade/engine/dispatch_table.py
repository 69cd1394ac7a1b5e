"""The dispatch table: all bundles with a domain, in matrices that compare an image with all of them at once.

A bundle need not be in memory to be a target: its card and its domain are enough to send an image to it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch

from cascade.bundle.bundle import Bundle
from cascade.bundle.schema import BackboneCard, Card
from cascade.bundle.store import Identity
from cascade.model.domain import Domain, Domains, calibrated_temperature
from cascade.model.preprocessing import Preprocessing
from cascade.model.reliability import reliability

MOST_LARGER = 4
"""Larger input sizes that an image without a bundle's name is prepared for; where it is sent to a bundle with another
one, it is not asked again. Else each bundle of any customer would add to the memory of everybody's images."""
SAMPLES = 2000  # most held-out images over all bundles that calibrate the confidence
SCORES = 2**22  # most of their scores
ROWS = 64  # of scores that are computed at a time


@dataclass(frozen=True, eq=False)
class Target:
    """A bundle that images may be dispatched to.

    Attributes:
        name, version: of the bundle. backbone: its card.
        stage, domain: where its domain was fitted, and the domain.
        preprocessing: of its images. larger: at its larger input size, if it has one.
        bundle: itself, so that it lives as long as a table of loaded bundles; None if it may have to be loaded.
    """

    name: str
    version: str
    backbone: BackboneCard
    stage: int
    domain: Domain
    preprocessing: Preprocessing
    larger: Preprocessing | None
    bundle: Bundle | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> Self | None:
        """A loaded bundle as a target; None if it has no domain."""
        device = "cpu" if bundle.domain is None else str(bundle.domain.samples.device)
        target = cls.read(*bundle.identity, bundle.card, bundle.domain, device)
        return None if target is None else replace(target, bundle=bundle)

    @classmethod
    def read(cls, name: str, version: str, card: Card, domain: Domain | None, device: str = "cpu") -> Self | None:
        """A target from the card and the domain of a bundle; None without a domain."""
        if domain is None or card.domain is None:
            return None
        domain = Domain(*(t.to(device) for t in (domain.prototypes, domain.scatter, domain.samples)))
        larger = None if card.deferral is None else Preprocessing.from_json(card.deferral.preprocessing)
        own = Preprocessing.from_json(card.preprocessing)
        return cls(name, version, card.backbone, card.domain.stage, domain, own, larger)

    @property
    def identity(self) -> Identity:
        return self.name, self.version

    def bytes(self) -> int:
        """Memory of the domain."""
        return sum(t.nbytes for t in (self.domain.prototypes, self.domain.scatter, self.domain.samples))


@dataclass(frozen=True, eq=False)
class Space:
    """Bundles with comparable domains: fitted on the same backbone, at the same stage, with the same preprocessing.

    Attributes:
        fingerprint: of the backbone. stage: the first stage that has not run when the activations are pooled.
        targets: B bundles. domains: those of the bundles, in one matrix.
        temperature: of the softmax over scores, so that the largest probability is a calibrated confidence.
    """

    fingerprint: str
    stage: int
    preprocessing: Preprocessing
    targets: tuple[Target, ...]
    domains: Domains
    temperature: float

    def reliability(self, identity: Identity, among: Collection[str] | None) -> dict[str, Any] | None:
        """How often the held-out images of a bundle are dispatched to it, by confidence.

        Args:
            among: names of the bundles to choose from; None for all.

        Returns:
            None if there is no other bundle to choose, or the bundle is not in this space.
        """
        allowed = [i for i, other in enumerate(self.targets) if among is None or other.name in among]
        own = next((n for n, i in enumerate(allowed) if self.targets[i].identity == identity), None)
        if own is None or len(allowed) < 2:
            return None
        scores = self.domains.scores(self.targets[allowed[own]].domain.samples.float())[:, allowed]
        confidence, answer = (scores / self.temperature).softmax(dim=1).max(dim=1)
        return reliability(confidence.cpu().numpy(), (answer == own).double().cpu().numpy())


@dataclass(frozen=True, eq=False)
class DispatchTable:
    """Every bundle that an image may be dispatched to.

    Attributes:
        spaces: their concatenated bundles are the columns of the scores.
        plain: for spaces in which an image fitted no bundle, the frozen backbone as a bundle; made when it is needed.
    """

    spaces: tuple[Space, ...]
    plain: dict[int, Bundle] = field(default_factory=dict)

    @cached_property
    def columns(self) -> list[tuple[int, Target]]:
        """The space's index and the bundle of each column of the scores."""
        return [(n, target) for n, space in enumerate(self.spaces) for target in space.targets]

    @cached_property
    def larger(self) -> list[Preprocessing]:
        """The most frequent larger input sizes; an image carries its pixels for all of them."""
        larger = Counter(target.larger for _, target in self.columns if target.larger is not None)
        return [preprocessing for preprocessing, _ in larger.most_common(MOST_LARGER)]

    @classmethod
    def of(cls, targets: Iterable[Target | None]) -> Self:
        """Build the table from bundles; those without a domain (None) are left out."""
        groups: dict[tuple[str, int, Preprocessing], list[Target]] = {}
        for target in targets:
            if target is not None:
                key = target.backbone.fingerprint, target.stage, target.preprocessing
                groups.setdefault(key, []).append(target)
        spaces = []
        for (fingerprint, stage, preprocessing), group in groups.items():
            own = [target.domain for target in group]
            domains = Domains.of(own)
            spaces.append(Space(fingerprint, stage, preprocessing, tuple(group), domains, _temperature(domains, own)))
        return cls(tuple(spaces))

    def of_backbones(self, fingerprints: Collection[str]) -> Self:
        """The part of the table whose backbones are in memory; all of it if none is."""
        spaces = tuple(space for space in self.spaces if space.fingerprint in fingerprints)
        return type(self)(spaces) if 0 < len(spaces) < len(self.spaces) else self

    @cached_property
    def bytes(self) -> int:
        """Memory of the domains and of the matrices."""
        domains = (space.domains for space in self.spaces)
        matrices = sum(d.weight.nbytes + d.bias.nbytes + d.center.nbytes + d.spread.nbytes for d in domains)
        return matrices + sum(target.bytes() for _, target in self.columns)


def _temperature(domains: Domains, own: Sequence[Domain]) -> float:
    """Calibrate the temperature on held-out samples, the same number from each bundle, or of some if there are many."""
    if len(own) < 2:
        return 1.0
    most = min(SAMPLES, max(1, SCORES // len(own)))
    chosen = range(0, len(own), -(-len(own) // most))
    samples = [own[i].samples[: max(1, most // len(own))].float() for i in chosen]
    owner = torch.repeat_interleave(torch.tensor(chosen), torch.tensor([*map(len, samples)]))
    scores = [domains.scores(rows).cpu() for rows in torch.cat(samples).split(ROWS)]  # the discriminants are larger
    return calibrated_temperature(torch.cat(scores), owner)
