"""The dispatch table: all bundles with a domain, in matrices that compare an image with all of them at once."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from cascade.bundle.bundle import Bundle
from cascade.model.domain import Domain, Domains, calibrated_temperature
from cascade.model.preprocessing import Preprocessing
from cascade.model.reliability import reliability

MOST_LARGER = 4
"""Larger input sizes that an image without a bundle's name is prepared for; where it is sent to a bundle with another
one, it is not asked again. Else each bundle of any customer would add to the memory of everybody's images."""
SAMPLES = 2000  # held-out images over all bundles that calibrate the confidence


@dataclass(frozen=True, eq=False)
class Space:
    """Bundles with comparable domains: fitted on the same backbone, at the same stage, with the same preprocessing.

    Attributes:
        fingerprint: of the backbone. stage: the first stage that has not run when the activations are pooled.
        bundles: B of them. domains: those of the bundles, in one matrix.
        temperature: of the softmax over scores, so that the largest probability is a calibrated confidence.
    """

    fingerprint: str
    stage: int
    preprocessing: Preprocessing
    bundles: tuple[Bundle, ...]
    domains: Domains
    temperature: float

    def reliability(self, bundle: Bundle, among: Collection[str] | None) -> dict[str, Any] | None:
        """How often the held-out images of a bundle are dispatched to it, by confidence.

        Args:
            among: names of the bundles to choose from; None for all.

        Returns:
            None if there is no other bundle to choose.
        """
        allowed = [i for i, other in enumerate(self.bundles) if among is None or other.name in among]
        if bundle.domain is None or len(allowed) < 2:
            return None
        scores = self.domains.scores(bundle.domain.samples.float())[:, allowed]
        confidence, answer = (scores / self.temperature).softmax(dim=1).max(dim=1)
        right = answer == allowed.index(self.bundles.index(bundle))
        return reliability(confidence.cpu().numpy(), right.double().cpu().numpy())


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
    def columns(self) -> list[tuple[int, Bundle]]:
        """The space's index and the bundle of each column of the scores."""
        return [(n, bundle) for n, space in enumerate(self.spaces) for bundle in space.bundles]

    @cached_property
    def larger(self) -> list[Preprocessing]:
        """The most frequent larger input sizes; an image carries its pixels for all of them."""
        larger = Counter(bundle.larger.preprocessing for _, bundle in self.columns if bundle.larger is not None)
        return [preprocessing for preprocessing, _ in larger.most_common(MOST_LARGER)]

    @classmethod
    def of(cls, bundles: Iterable[Bundle]) -> "DispatchTable":
        """Build the table from the bundles that have a domain."""
        groups: dict[tuple[str, int, Preprocessing], list[tuple[Bundle, Domain]]] = {}
        for bundle in bundles:
            if bundle.domain is not None and bundle.card.domain is not None:
                key = bundle.card.backbone.fingerprint, bundle.card.domain.stage, bundle.preprocessing
                groups.setdefault(key, []).append((bundle, bundle.domain))
        spaces = []
        for (fingerprint, stage, preprocessing), group in groups.items():
            domains = Domains.of([domain for _, domain in group])
            temperature = _temperature(domains, [domain for _, domain in group])
            named = tuple(bundle for bundle, _ in group)
            spaces.append(Space(fingerprint, stage, preprocessing, named, domains, temperature))
        return cls(tuple(spaces))


def _temperature(domains: Domains, own: Sequence[Domain]) -> float:
    """Calibrate the temperature on held-out samples, the same number from each bundle."""
    if len(own) < 2:
        return 1.0
    samples = [domain.samples[: max(1, SAMPLES // len(own))].float() for domain in own]
    owner = torch.repeat_interleave(torch.arange(len(own)), torch.tensor([*map(len, samples)]))
    return calibrated_temperature(domains.scores(torch.cat(samples)).cpu(), owner)
