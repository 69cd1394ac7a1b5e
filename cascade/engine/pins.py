"""Pins: the version that answers requests without one, instead of the latest.

A pin with several versions splits the traffic between them by weight, for a canary release.
"""

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cascade.errors import CascadeError


@dataclass(frozen=True)
class Pin:
    """Versions and their positive weights; a single version gets all the traffic."""

    weights: dict[str, float]

    def choose(self, loaded: Collection[str]) -> str | None:
        """Draw one of the loaded pinned versions by weight; None if none is loaded.

        The share of a missing version goes to the others, so a refused canary does not fail any request.
        """
        weights = {version: weight for version, weight in self.weights.items() if version in loaded}
        if len(weights) < 2:
            return next(iter(weights), None)
        return random.choices([*weights], [*weights.values()])[0]

    def main(self, loaded: Collection[str]) -> str | None:
        """The loaded version with the largest weight."""
        return max((v for v in self.weights if v in loaded), key=self.weights.__getitem__, default=None)

    @property
    def text(self) -> str:
        """The inverse of ``parse``."""
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return ",".join(f"{version}:{weight:g}" for version, weight in self.weights.items())

    def __str__(self) -> str:
        return " or ".join(self.weights)


def parse(text: str) -> Pin:
    """Parse ``3`` for one version, or ``1:95,2:5`` for several with their weights.

    Raises:
        CascadeError: the text is neither.
    """
    if ":" not in text and "," not in text and text.strip():
        return Pin({text: 1.0})
    pairs = [part.rpartition(":") for part in text.split(",")]
    weights = {version.strip(): _number(weight) for version, _, weight in pairs}
    if len(weights) < len(pairs) or not all(version and 0 < weight < 1e9 for version, weight in weights.items()):
        raise CascadeError(f"can't pin to {text!r}: write a version, like 3, or versions and weights, like 1:95,2:5")
    return Pin(weights)


def pinned(texts: Iterable[str]) -> dict[str, str]:
    """``paper@3`` as ``{"paper": "3"}``, and ``paper@1:95,2:5`` likewise. Raises CascadeError for anything else."""
    pairs = [text.rpartition("@") for text in texts]
    for text, (name, _, version) in zip(texts, pairs, strict=True):
        if not name or not version:
            raise CascadeError(f"can't pin {text!r}: write NAME@VERSION, like paper@3")
        parse(version)
    return {name: version for name, _, version in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
