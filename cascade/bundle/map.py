"""The map of a bundle: a place in the plane for each image of its neighbor bank, so that similar images are close.

It is drawn by people's browsers; answers do not depend on it. ``training.maps`` computes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

NO_CLUSTER = -1


@dataclass(frozen=True, eq=False)
class Map:
    """Places and clusters of the bank's images.

    Attributes:
        points: float16 [rows, 2], each number in [0, 1].
        clusters: int16 [rows], the router's cluster of each image; ``NO_CLUSTER`` if it is not known.
    """

    layout: ClassVar[dict[str, str]] = {"points": "float16 rows 2", "clusters": "int16 rows"}
    points: Tensor
    clusters: Tensor

    def take(self, rows: Sequence[int]) -> "Map":
        """The map of these rows."""
        return Map(self.points[rows], self.clusters[rows])

    def inconsistencies(self, clusters: int) -> Iterator[str]:
        """Yield what is wrong with its values; layout and number of rows are checked by the bundle.

        Args:
            clusters: of the bundle.
        """
        if not ((self.points >= 0) & (self.points <= 1)).all():  # also where a number is NaN
            yield "its points are not within 0 to 1"
        if not ((self.clusters >= NO_CLUSTER) & (self.clusters < clusters)).all():
            yield f"its clusters are not within {NO_CLUSTER} to {clusters - 1}"
